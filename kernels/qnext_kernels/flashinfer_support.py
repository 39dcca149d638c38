"""What the backends that call FlashInfer share: whether it is here, and tensors as its kernels want them.

FlashInfer is imported with the first call on a GPU that it supports; a process that serves on a CPU never imports it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from qnext_kernels.dispatch import Backend

PACKAGE = "flashinfer-python"
VERSIONS = ("0.7.0", "0.8")
"""From the first, below the second. vLLM 0.32 pins 0.7.0.post1, SGLang 0.5.23 pins 0.7.2."""
CAPABILITY = (9, 0)


class FlashInferBackend(Backend):
    """Serves GPUs of NVIDIA from compute capability 9.0, in bfloat16 and float16.

    Not batch invariant: kernels and block sizes follow the batch, and none of our bitwise promises is FlashInfer's.
    """

    name = "flashinfer"
    devices = ("cuda",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := super().supports(device, dtype)) is not None:
            return reason
        if dtype not in self.dtypes:
            return f"computes in {', '.join(map(str, self.dtypes))}, got {dtype}"
        return why_missing(PACKAGE, "flashinfer", VERSIONS) or why_unsuitable(device.index)


@torch.compiler.assume_constant_result
@cache
def why_missing(package: str, module: str, versions: tuple[str, str]) -> str | None:
    """Why a package of these versions (from the first, below the second) is not here; None if it is."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    first, end = map(Version, versions)
    if not first <= Version(found) < end:
        return f"needs {package} from {first}, below {end}, got {found}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    try:
        import_module(module)
    # Half an installation, or one for another GPU, fails in any way.
    except Exception as error:
        return f"{module} cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


@torch.compiler.assume_constant_result
@cache
def why_unsuitable(index: int | None) -> str | None:
    """Why the GPU of this index cannot run the kernels; None if it can."""
    if torch.version.hip is not None:
        return "runs on GPUs of NVIDIA"
    if (capability := torch.cuda.get_device_capability(index)) < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, got {capability[0]}.{capability[1]}"
    return None
