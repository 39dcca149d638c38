"""The vLLM side: makes ``Qwen3NextForCausalLM`` and ``Qwen3NextMTP`` ours, in every process.

vLLM calls :func:`register` in each of its processes through the entry point group ``vllm.general_plugins``. It imports
nothing heavy and never takes the engine down: where it cannot serve, it says so in one line and leaves vLLM's own model
in place (``QNEXT_STRICT=1`` makes that an error, and so does ``QNEXT_DETERMINISTIC=1``, which that model cannot keep).
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger("vllm.qnext")

SUPPORTED_VLLM = ">=0.32,<0.34"
ARCHITECTURES = {
    "Qwen3NextForCausalLM": "qnext_vllm.model:Qwen3NextForCausalLM",
    "Qwen3NextMTP": "qnext_vllm.mtp:Qwen3NextMTP",
}


class UnsupportedEngineError(RuntimeError):
    """``QNEXT_STRICT=1`` and this vLLM, or this machine, is not served."""


def register() -> None:
    """Register the models with vLLM's registry, unless :func:`refusal` has a reason not to.

    Raises:
        UnsupportedEngineError: only with ``QNEXT_STRICT=1``.
    """
    try:
        from qnext_plugins.settings import Settings

        settings = Settings()
        if settings.disable:
            return
        settings.forced_backends()
        reason = refusal()
        if reason is None:
            from vllm.model_executor.models.registry import ModelRegistry

            from qnext_vllm.config_hook import register_config_hook
            from qnext_vllm.determinism import turn_on_where_asked

            for architecture, target in ARCHITECTURES.items():
                ModelRegistry.register_model(architecture, target)
            register_config_hook()
            turn_on_where_asked()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if reason is not None:
        step_back("qnext-plugins leaves vLLM's own Qwen3-Next in place: %s", reason)


def step_back(line: str, reason: str) -> None:
    """Log ``line`` with the reason in it, where something of vLLM's own stays in place.

    Raises:
        UnsupportedEngineError: only with ``QNEXT_STRICT=1``.
    """
    from qnext_plugins.strict import strict

    if strict():
        raise UnsupportedEngineError(f"qnext-plugins: {reason}")
    logger.warning(line, reason)


def refusal() -> str | None:
    """Return why this vLLM on this machine is not served, or None."""
    import vllm
    from packaging.specifiers import SpecifierSet
    from vllm.platforms import current_platform

    if not SpecifierSet(SUPPORTED_VLLM).contains(vllm.__version__, prereleases=True):
        return f"vLLM {vllm.__version__} is not supported (supported: {SUPPORTED_VLLM})"
    return None if current_platform.is_cpu() else gpu_refusal(current_platform)


def gpu_refusal(platform: Any) -> str | None:
    """Return why no GPU of vLLM's ``platform`` is served, or None; no device is touched, as this process may fork."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    from qnext_kernels.dispatch import is_deterministic
    from qnext_plugins import gpus

    if is_deterministic() and not envs.VLLM_BATCH_INVARIANT:
        return "on a GPU the deterministic mode needs vLLM's own with it, which VLLM_BATCH_INVARIANT=1 turns on"
    capability = platform.get_device_capability() if platform.is_cuda() else None
    return gpus.gpu_refusal(
        platform=platform.device_name,
        served=platform.is_cuda_alike(),
        triton_missing=None if HAS_TRITON else "vLLM finds no Triton that works on this machine",
        capability=capability and (capability.major, capability.minor),
    )
