"""Cores for the ranks of a CPU engine."""

from __future__ import annotations

import os


def binding_for(ranks: int, numa_nodes: int) -> str | None:
    """The cores of each rank, written as both engines' binding variables are ("0,1|2,3"), or None where not needed.

    Both engines bind one rank to one NUMA node and refuse to start with fewer nodes than ranks; then each rank gets an
    equal share of the cores that this process may use. None too where there are fewer cores than ranks.
    """
    cores = sorted(os.sched_getaffinity(0))
    if ranks <= numa_nodes or len(cores) < ranks:
        return None
    share = len(cores) // ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(ranks))
