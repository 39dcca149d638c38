"""What ``qnext bench`` needs of SGLang: its own kernels as peers. Importing this imports nothing of SGLang."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from qnext_plugins.cli.bench import EngineBench

if TYPE_CHECKING:
    from qnext_plugins.cli.bench.inputs import Library


def peers(device: str) -> Library | str:
    """SGLang's kernels for a device type, or the reason why there are none."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        return "SGLang is not installed here"
    if device == "cuda":
        from qnext_sglang.bench.cuda_peers import CudaPeers

        return CudaPeers(found)
    return f"SGLang's kernels for {device} are not known here"


BENCH = EngineBench(name="sglang", peers=peers)
