"""The vLLM side: makes ``Qwen3NextForCausalLM`` and ``Qwen3NextMTP`` ours, in every process.

vLLM calls :func:`register` in each of its processes through the entry point group ``vllm.general_plugins``. It imports
nothing heavy and never takes the engine down: where it cannot serve, it says so in one line and leaves vLLM's own model
in place (``QNEXT_STRICT=1`` makes that an error, and so does ``QNEXT_DETERMINISTIC=1``, which that model cannot keep).
"""

from __future__ import annotations

import logging

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
    from qnext_plugins.strict import strict

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
        if strict():
            raise UnsupportedEngineError(f"qnext-plugins: {reason}")
        logger.warning("qnext-plugins leaves vLLM's own Qwen3-Next in place: %s", reason)


def refusal() -> str | None:
    """Return why this vLLM on this machine is not served, or None."""
    import vllm
    from packaging.specifiers import SpecifierSet
    from vllm.platforms import current_platform

    if not SpecifierSet(SUPPORTED_VLLM).contains(vllm.__version__, prereleases=True):
        return f"vLLM {vllm.__version__} is not supported (supported: {SUPPORTED_VLLM})"
    if not current_platform.is_cpu():
        return f"this release has kernels for CPUs only, and the platform is {current_platform.device_name}"
    return None
