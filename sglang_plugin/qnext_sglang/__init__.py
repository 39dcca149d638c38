"""The SGLang side: makes ``Qwen3NextForCausalLM`` and its NEXTN draft ours, in every process.

SGLang calls :func:`activate` to find its platform (entry point group ``sglang.srt.platforms``) and :func:`register` in
each of its processes (``sglang.srt.plugins``). Neither imports anything heavy nor takes the engine down: where they
cannot serve, they say so in one line and leave SGLang's own model in place (``QNEXT_STRICT=1`` makes that an error, and
so does ``QNEXT_DETERMINISTIC=1``, which that model cannot keep).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

logger = logging.getLogger("sglang.qnext")

SUPPORTED_SGLANG = ">=0.5.23,<0.5.24"
MODELS_PACKAGE = "qnext_sglang.models"
MODELS_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


class UnsupportedEngineError(RuntimeError):
    """``QNEXT_STRICT=1`` and this SGLang, machine or configuration is not served; or nothing else can serve it."""


def activate() -> str | None:
    """Return our CPU platform where there is no accelerator and the user has not chosen SGLang's own CPU engine."""
    import torch

    own_cpu_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"  # needs AMX
    try:
        served = not _settings().disable and _version_refusal() is None
    except Exception:
        served = False  # register() says why
    if own_cpu_engine or torch.accelerator.is_available() or not served:
        return None
    return "qnext_sglang.cpu.platform.CpuPlatform"


def register() -> None:
    """Put our models into SGLang's registry, unless :func:`refusal` has a reason not to.

    Raises:
        SystemExit: only with ``QNEXT_STRICT=1``; any other exception SGLang would log and go on without us.
    """
    try:
        settings = _settings()
        if settings.disable:
            return
        settings.forced_backends()
        reason = refusal()
        if reason is None:
            _register_models()
            _register_choices()
            _register_gptq()
            return
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        decline(reason)
    except UnsupportedEngineError as error:
        raise SystemExit(str(error)) from None


def refusal() -> str | None:
    """Return why this SGLang on this machine is not served, or None."""
    if (reason := _version_refusal()) is not None:
        return reason
    from sglang.srt.platforms import current_platform

    return cpu_refusal() if current_platform.device_type == "cpu" else gpu_refusal(current_platform)


def cpu_refusal() -> str | None:
    """Return why this CPU is not served, or None."""
    import torch

    from qnext_kernels import selected_backends

    backends = selected_backends(torch.device("cpu"), torch.bfloat16)
    slow = [name for name, backend in backends.items() if backend == "reference"]
    if slow and not _settings().backend:
        return f"it has no fast kernels on a CPU for {', '.join(slow)} (QNEXT_BACKEND=reference tries it)"
    return None


def gpu_refusal(platform: Any) -> str | None:
    """Return why no GPU of SGLang's ``platform`` is served, or None."""
    from qnext_plugins import gpus

    cuda = platform.is_cuda()
    return gpus.gpu_refusal(
        platform=platform.device_name,
        served=cuda or platform.is_rocm(),
        triton_missing=None if gpus.triton_works() else "no Triton works on this machine",
        capability=tuple(platform.get_device_capability()) if cuda else None,
    )


def decline(reason: str) -> None:
    """Say that SGLang's own model stays in place; raises as :func:`step_back` does."""
    step_back("qnext-plugins leaves SGLang's own Qwen3-Next in place: %s", reason)


def step_back(line: str, reason: str) -> None:
    """Log ``line`` with the reason in it, where something of SGLang's own stays in place.

    Raises:
        UnsupportedEngineError: with ``QNEXT_STRICT=1``.
    """
    from qnext_plugins.strict import strict

    if strict():
        raise UnsupportedEngineError(f"qnext-plugins: {reason}")
    # Not a warning: sglang.Engine's default log level hides those, and its own model would look like ours.
    logger.error(line, reason)


def _settings():  # type: ignore[no-untyped-def]
    from qnext_plugins.settings import Settings

    return Settings()


def _version_refusal() -> str | None:
    # From the metadata: the platform is looked for while the sglang package is being imported.
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    found = version("sglang")
    if SpecifierSet(SUPPORTED_SGLANG).contains(found, prereleases=True):
        return None
    return f"SGLang {found} is not supported (supported: {SUPPORTED_SGLANG})"


def _register_gptq() -> None:
    """SGLang knows GPTQ on a GPU and on a CPU with AMX, and refuses the name elsewhere before it asks our platform."""
    from sglang.srt.platforms import current_platform

    if getattr(current_platform, "is_qnext", False):
        from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS

        QUANTIZATION_METHODS.setdefault("gptq", CPU_QUANTIZATION_METHODS["gptq"])


def _register_models() -> None:
    registry = sys.modules.get("sglang.srt.models.registry")
    if registry is None and os.environ.get(MODELS_VARIABLE, "") in ("", MODELS_PACKAGE):
        # The registry then reads our package first and its own two hundred models only if asked for another one.
        os.environ[MODELS_VARIABLE] = MODELS_PACKAGE
        return
    from sglang.srt.models.registry import ModelRegistry, import_model_classes

    ModelRegistry.models.update(import_model_classes(MODELS_PACKAGE, strict=True))


def _register_choices() -> None:
    from sglang.srt.platforms import current_platform

    if getattr(current_platform, "is_qnext", False):
        from sglang.srt.arg_groups import choices

        from qnext_sglang.cpu.platform import ATTENTION_BACKEND

        choices.add_attention_backend_choices([ATTENTION_BACKEND])
        choices.add_deterministic_attention_backend_choices([ATTENTION_BACKEND])
        choices.add_radix_supported_deterministic_attention_backend_choices([ATTENTION_BACKEND])
