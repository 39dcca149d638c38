"""Which GPUs both engines' sides serve, and what of the model ours serve there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

ENGINES_OWN = ("linear", "paged_attention")
"""Operations that the engine's own code serves on a GPU."""


def gpu_refusal(
    *, platform: str, served: bool, triton_missing: str | None, capability: tuple[int, int] | None
) -> str | None:
    """Return why a GPU is not served, or None. Nothing here touches a device.

    Args:
        platform: what the engine calls it.
        served: whether it is a GPU of NVIDIA or AMD.
        triton_missing: why Triton does not work here, or None.
        capability: its compute capability; None for one of AMD, or where it is not known.
    """
    from qnext_kernels import without_kernels
    from qnext_plugins.settings import Settings

    if not served:
        return f"it serves CPUs and GPUs of NVIDIA and AMD, and the platform is {platform}"
    if triton_missing is not None:
        return triton_missing
    if capability is not None and capability[0] < 8:
        return f"it needs compute capability 8.0, and this GPU has {'.'.join(map(str, capability))}"
    slow = [name for name in without_kernels("cuda") if name not in ENGINES_OWN]
    if slow and not Settings().backend:
        return f"it has no GPU kernels for {', '.join(slow)} (QNEXT_BACKEND=reference tries it, slowly)"
    return None


def experts_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why unquantized experts are not ours on a GPU, or None."""
    from qnext_kernels import OPERATIONS
    from qnext_plugins.settings import Settings

    if OPERATIONS["moe"].select(device, dtype).name == "reference" and not Settings().backend:
        return f"only the reference serves them in {dtype}"
    return None


def fp8_experts_obstacle(
    method: str, block: list[int] | None, middle: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Return why quantized experts are not ours, or None.

    Args:
        method: what the engine calls the quantization.
        block: rows and columns that share a scale, where that is FP8; else None.
        middle: this rank's columns between the two products of an expert.
        device, dtype: of the activations.
    """
    from qnext_kernels import OPERATIONS
    from qnext_kernels.dispatch import Call
    from qnext_kernels.fp8 import FP8_GROUP

    if block is None or list(block) != [FP8_GROUP] * 2:
        return f"their weights are quantized ({method})"
    if middle % FP8_GROUP:
        return f"a rank's {middle} columns of them are not whole blocks of FP8"
    backend = OPERATIONS["moe"].select(device, dtype)
    if device.type != "cpu" and backend.name not in ("triton", "flashinfer"):
        return f"the {backend.name} backend serves them, without FP8"
    reason = backend.supports_call(device, dtype, Call("experts_fp8", tokens=0, shape=(middle,)))
    return None if reason is None else f"the {backend.name} backend {reason}"


def triton_works() -> bool:
    """Whether Triton is installed and has a driver for a GPU of this machine."""
    try:
        from triton.backends import backends
    except ImportError:
        return False
    return any(backend.driver.is_active() for backend in backends.values())


def joins(device: torch.device, output_sizes: Sequence[int], ranks: int) -> bool:
    """Whether column linears of one input are one product on ``device``, which then has a launch less.

    Kernels read their parts of its rows: 16 bytes at once where Triton sees that widths are multiples of 16.
    """
    return device.type != "cpu" and all(size // ranks % 16 == 0 for size in output_sizes)
