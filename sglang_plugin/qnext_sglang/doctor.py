"""What ``qnext doctor`` checks where SGLang is installed: each trap as SGLang's own code sees it.

Nothing of SGLang is imported before a check runs.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points

from qnext_plugins.cli.doctor import EngineDoctor, Finding, Subject, failure, note, ok, warning
from qnext_plugins.cli.doctor.machine import check_binding, cpu_flags, device_type
from qnext_plugins.settings import Settings
from qnext_sglang import MODELS_VARIABLE, SUPPORTED_SGLANG, refusal

PLUGINS, PLATFORMS = "sglang.srt.plugins", "sglang.srt.platforms"
THREADS_BIND = "SGLANG_CPU_OMP_THREADS_BIND"


def plugins_variable(subject: Subject) -> Finding | None:
    """SGLANG_PLUGINS lists the plugins that SGLang loads, platforms among them; without it, all."""
    from sglang.srt.environ import envs

    allowed = envs.SGLANG_PLUGINS.get()
    if not allowed:
        return None
    if "qnext" in (name.strip() for name in allowed.split(",")):
        return ok(f"SGLANG_PLUGINS={allowed} lets the plugin in")
    return failure(f"SGLANG_PLUGINS={allowed!r} keeps the plugin out", "unset SGLANG_PLUGINS, or add qnext")


def platform_variable(subject: Subject) -> Finding | None:
    """SGLANG_PLATFORM chooses one platform plugin, and leaves the packages of the others out."""
    from sglang.srt.environ import envs

    chosen = envs.SGLANG_PLATFORM.get()
    if not chosen:
        return None
    if chosen == "qnext" and device_type() == "cpu":
        return ok("SGLANG_PLATFORM=qnext chooses the plugin's platform")
    if chosen == "qnext":
        problem = f"is the plugin's platform for CPUs, which is not there beside a {device_type()} device"
    elif chosen not in entry_points(group=PLATFORMS).names:
        problem = "is no platform that is installed: SGLang ends at once"
    else:
        problem = "chooses another platform, and with it keeps the plugin out"
    return failure(f"SGLANG_PLATFORM={chosen} {problem}", "unset SGLANG_PLATFORM")


def cpu_engine(subject: Subject) -> Finding | None:
    """SGLANG_USE_CPU_ENGINE=1 chooses SGLang's own CPU engine, which is made for AMX."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1":
        return None
    if "amx_tile" in cpu_flags():
        return note("SGLANG_USE_CPU_ENGINE=1 chooses SGLang's own CPU engine; the plugin's platform steps aside")
    return failure(
        "SGLANG_USE_CPU_ENGINE=1 chooses SGLang's own CPU engine, whose kernels need AMX, which this processor lacks",
        "unset SGLANG_USE_CPU_ENGINE",
    )


def platform(subject: Subject) -> Finding:
    """SGLang finds one platform, ours where there is no accelerator."""
    from sglang.srt.platforms import current_platform

    name = type(current_platform).__name__
    if getattr(current_platform, "is_qnext", False):
        return ok(f"SGLang runs on the plugin's platform, on a {current_platform.device_type}")
    return note(f"SGLang runs on {name}, not on the plugin's platform for CPUs")


def registration(subject: Subject) -> Finding:
    """After SGLang has loaded its plugins, the architecture is ours."""
    if Settings().disable:
        return note("QNEXT_DISABLE leaves SGLang's own Qwen3-Next in place", "unset QNEXT_DISABLE to have the plugin's")
    if (reason := refusal()) is not None:
        return warning(
            f"SGLang's own Qwen3-Next stays in place: {reason}", "serve on a machine that the plugin has kernels for"
        )
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.models.registry import ModelRegistry

    served = ModelRegistry.models.get("Qwen3NextForCausalLM")
    module = getattr(served, "__module__", "none")
    if not module.startswith("qnext_sglang."):
        return failure(
            f"Qwen3NextForCausalLM is {module}'s, not the plugin's", "see the other findings about the plugin"
        )
    return ok("SGLang has loaded the plugin: it serves Qwen3NextForCausalLM")


def model_package(subject: Subject) -> Finding | None:
    """One package of models can be named in a variable, which the plugin uses unless the user does."""
    # This process sets it itself when it registers, which is why the check stands before the registration.
    package = os.environ.get(MODELS_VARIABLE, "")
    if package in ("", "qnext_sglang.models"):
        return None
    return note(f"{MODELS_VARIABLE}={package}: SGLang then starts slower, since all its models are imported")


def hooks(subject: Subject) -> Finding:
    """Every function of SGLang that the plugin replaces or wraps is there."""
    from sglang.srt.platforms import current_platform

    from qnext_sglang import determinism
    from qnext_sglang import hooks as own

    wanted = [*own.HOOKS, *determinism.HOOKS]
    if getattr(current_platform, "is_qnext", False):
        from qnext_sglang.cpu import hooks as cpu_hooks

        wanted += cpu_hooks.HOOKS
    if missing := own.unresolved(wanted):
        return failure(f"this SGLang has no {', '.join(missing)}", f"install sglang {SUPPORTED_SGLANG}")
    return ok(f"all {len(wanted)} functions that the plugin hooks are there")


def convolution_state(subject: Subject) -> Finding | None:
    """SGLang keeps the convolution's state in bfloat16, whatever the dtype of the model; ours follows the model."""
    chosen = os.environ.get("SGLANG_MAMBA_CONV_DTYPE")
    if chosen in (None, "float32"):
        return None
    return warning(
        f"SGLANG_MAMBA_CONV_DTYPE={chosen}: the convolution's state is rounded, and float32 gives no exact tokens",
        "unset SGLANG_MAMBA_CONV_DTYPE: the plugin keeps the state as exact as the model",
    )


def threads_bind(subject: Subject) -> Finding | None:
    """SGLANG_CPU_OMP_THREADS_BIND names cores that this process may use."""
    return check_binding(THREADS_BIND, ("all",))


def interval(subject: Subject) -> Finding | None:
    """SGLang sizes its caches by full_attention_interval and drops layer_types."""
    if subject.config is None:
        return None
    from qnext_plugins.model import ConfigError
    from qnext_sglang.serving import check_interval

    try:
        check_interval(subject.config.get("full_attention_interval"))
    except ConfigError as error:
        problem, _, fix = str(error).partition("; ")
        return failure(problem, fix)
    return ok(f"full_attention_interval is there: {subject.config['full_attention_interval']}")


def quantization(subject: Subject) -> Finding | None:
    """On a CPU ours serve block-wise FP8 and group-wise int4 alone; on a GPU quantized checkpoints are untried."""
    quantized = (subject.config or {}).get("quantization_config") or {}
    if not quantized:
        return None
    from qnext_plugins.model import IntegerWeights, is_block_fp8

    method, block = quantized.get("quant_method"), quantized.get("weight_block_size")
    instead = "take the checkpoint in bfloat16"
    if device_type() != "cpu":
        return warning(f"the checkpoint is quantized ({method}), untried with the plugin on SGLang", instead)
    if is_block_fp8(quantized):
        return ok("block-wise FP8: linears and experts run on the plugin's kernels, with activations as they are")
    if (integers := IntegerWeights.of(quantized)) is not None:
        return ok(f"int4 in groups of {integers.group}: linears and experts run on the plugin's kernels")
    blocks = "" if block is None else f" in blocks of {block}"
    return failure(
        f"the checkpoint is quantized ({method}{blocks}), and on a CPU the plugin serves FP8 in blocks of 128 × 128, "
        "symmetric int4 in groups of 32, 64 or 128 (compressed-tensors, GPTQ or AutoRound), or no quantization",
        f"{instead}, in block-wise FP8 or in int4",
    )


DOCTOR = EngineDoctor(
    name="sglang",
    distributions=("sglang",),
    supported=SUPPORTED_SGLANG,
    tested=("0.5.23",),
    entry_points=(PLUGINS, PLATFORMS),
    checks=(
        plugins_variable,
        platform_variable,
        cpu_engine,
        model_package,
        platform,
        registration,
        hooks,
        convolution_state,
        threads_bind,
        interval,
        quantization,
    ),
)
