#!/usr/bin/env python3
"""Wheels for a GPU machine without a network, which has torch and triton: gpu_ops.py, other libraries, engines.

    benchmarks/run_bare.sh pack FOLDER [PART...]         # by default the part base
    benchmarks/run_bare.sh pack --has has.txt FOLDER base flashinfer

Packs the named parts into FOLDER, which is emptied of wheels before; run_bare.sh --wheels FOLDER installs them.
Wheels are made thin: members that nothing here imports are left out, and device code of other architectures than
--arch. What `pip freeze` says on the GPU machine, given with --has, is left out too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thin_wheels import Rule, ThinError, thin_wheel

LIMIT = 64
"""MiB that a folder may weigh by default."""
PLATFORMS = tuple(
    f"manylinux{each}_x86_64" for each in ("_2_34", "_2_31", "_2_28", "_2_27", "_2_26", "_2_24", "2014", "1")
)
BASE = (
    *("numpy", "pydantic", "rich", "httpx", "prometheus-client", "platformdirs", "filelock"),
    *("pytest", "pytest-timeout", "pytest-xdist", "safetensors", "transformers>=5.16.1,<5.20"),
    *("fla-core", "einops", "setuptools>=77,<82"),
)
"""What gpu_ops.py, gpu_engines.py and the tests of the kernels import, and FLA."""
REQUIREMENTS, ENVIRONMENT = "requirements.txt", "environment.txt"
"""What run_bare.sh reads: what to install, without what that requires in its turn, and variables to set."""


@dataclass(frozen=True)
class Part:
    """What goes into a folder under one name."""

    about: str
    requirements: tuple[str, ...] = ()
    """Downloaded and installed without what they require themselves: most of it is never imported."""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """Of the wheels that are made thin, by distribution."""
    environment: Mapping[str, str] = field(default_factory=dict)


CUTLASS_LIBRARIES, CUTLASS_IR = "nvidia-cutlass-dsl-libs-cu13==4.7.1", "*/_cutlass_ir.*.so"
FLASHINFER_UNUSED = ("b12x/*", "build_*.py", "flashinfer/data/*")
# What the modules rope and silu_and_mul are compiled from, by nvcc at their first call.
FLASHINFER_SOURCES = (
    *("flashinfer/data/include/*", "flashinfer/data/cccl/libcudacxx/include/*"),
    *(f"flashinfer/data/csrc/{name}*" for name in ("rope.", "flashinfer_rope_", "tvm_ffi_utils.")),
)

VLLM_UNUSED = (
    *("*.so", "vllm/vllm-rs", "*.h", "*.hpp", "*.cuh", "*.cu", "*.inl", "*.css", "*.js", "*/configs/*.json"),
    *("vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*", "vllm/third_party/tml_fa4/*"),
    *("vllm/vllm_flash_attn/cute/*", "vllm/benchmarks/*", "vllm/kernels/helion/configs/*"),
)
VLLM_LIBRARIES = (
    *("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so"),
    *("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so", "vllm/cumem_allocator.abi3.so", "vllm/spinloop.abi3.so"),
)
VLLM_TUNED = ("*/configs/*NVIDIA_H100*.json", "*/configs/*NVIDIA_H200*.json")
SGLANG_UNUSED = ("sglang/multimodal_gen/*", "sglang/test/*", "sglang/benchmark/*", "sglang/bench_*.py")
STAND_INS = Path(__file__).with_name("sgl_kernel_stand_ins.py")
APACHE_TVM_FFI = "apache-tvm-ffi>=0.1.11,<0.1.13"
"""What FlashInfer, tilelang and SGLang agree on."""
TILELANG_SOURCES = (
    *("tilelang/3rdparty/cutlass/*", "tilelang/3rdparty/tvm/python/*", "tilelang/3rdparty/tvm/version.py"),
    *("tilelang/3rdparty/tvm/include/*", "tilelang/src/tl_templates/*"),
)

PARTS = {
    "base": Part("what gpu_ops.py, gpu_engines.py and the tests import, with fla-core"),
    "flashinfer": Part(
        "FlashInfer, our backends of that name and the peer; needs cutlass-ir too",
        (
            *("flashinfer-python==0.7.2", APACHE_TVM_FFI, "cuda-tile>=1.4", "tabulate", "nvidia-ml-py"),
            *(
                "nvidia-cutlass-dsl==4.7.1",
                "nvidia-cutlass-dsl-libs-base==4.7.1",
                "nvidia-cutlass-dsl-libs-core==4.7.1",
            ),
            CUTLASS_LIBRARIES,
        ),
        {
            "flashinfer-python": Rule(FLASHINFER_UNUSED, FLASHINFER_SOURCES),
            "nvidia-cutlass-dsl-libs-base": Rule(("*/iket/*",)),
            "nvidia-cutlass-dsl-libs-cu13": Rule((CUTLASS_IR, "*/stubs/*", "*.a")),
        },
    ),
    "cutlass-ir": Part(
        "the compiler of FlashInfer's CuTe kernels, which would weigh too much beside flashinfer",
        (CUTLASS_LIBRARIES,),
        {"nvidia-cutlass-dsl-libs-cu13": Rule(("*",), (CUTLASS_IR,), distribution="cutlass-ir-of-nvidia-cutlass-dsl")},
    ),
    "vllm": Part(
        "vLLM: its operators, the peer, and the engine with FlashAttention 3",
        (
            *("vllm==0.32.0", "compressed-tensors==0.17.0", "depyf==0.20.0", "fastapi>=0.133,<0.137", "openai>=2.25"),
            *("lm-format-enforcer==0.11.3", "llguidance>=1.7,<1.8", "outlines-core==0.2.14", "xgrammar==0.2.8"),
            *(APACHE_TVM_FFI, "annotated-doc", "astor", "blake3", "cachetools", "cbor2", "cloudpickle", "dill"),
            *("httpcore2", "httpx2", "interegular", "jiter", "jsonschema", "jsonschema-specifications", "loguru"),
            *("msgspec", "opentelemetry-api", "oss-harmony", "partial-json-parser", "pybase64", "pydantic-extra-types"),
            *("pydantic-settings", "python-dotenv", "python-json-logger", "python-multipart", "pyzmq", "referencing"),
            *("rpds-py", "setproctitle", "sniffio", "starlette>=1.0.1", "truststore"),
        ),
        # What is PTX alone are products of quantized weights that no row asks for.
        {"vllm": Rule(VLLM_UNUSED, VLLM_LIBRARIES + VLLM_TUNED, ptx=False)},
        {"VLLM_USE_FLASHINFER_SAMPLER": "0"},
    ),
    "sglang": Part(
        "SGLang's Triton kernels, the peer",
        (
            *("sglang==0.5.23", APACHE_TVM_FFI, "orjson", "ipython", "traitlets", "dill", "pybase64", "starlette"),
            *("msgspec", "pyzmq"),
        ),
        {"sglang": Rule(("*.so", *SGLANG_UNUSED))},
    ),
    "sglang-engine": Part(
        "the engine of SGLang with Triton for attention; compiles some kernels with nvcc at its first start",
        (
            *(
                "sglang==0.5.23",
                "sglang-kernel==0.4.10",
                "apache-tvm-ffi==0.1.11",
                "compressed-tensors==0.18.0",
                "dill",
            ),
            *("distro", "fastapi", "gguf", "importlib-metadata", "interegular", "ipython", "jiter", "jsonschema"),
            *("jsonschema-specifications", "loguru", "msgspec", "openai==2.8.0", "opentelemetry-api"),
            *("opentelemetry-sdk", "opentelemetry-semantic-conventions", "orjson", "partial-json-parser", "pybase64"),
            *("pydantic-extra-types", "pydantic-settings", "python-dotenv", "python-multipart", "pyzmq", "referencing"),
            *("rpds-py", "setproctitle", "sniffio", "starlette", "traitlets", "uvicorn>=0.51", "watchfiles"),
            *("xgrammar==0.2.7", "zipp", "nvidia-ml-py", "xxhash", "ml-dtypes"),
        ),
        {
            "sglang": Rule(("*.so", *SGLANG_UNUSED)),
            "sglang-kernel": Rule(("*.so",), stand_ins={"sgl_kernel/load_utils.py": STAND_INS}),
        },
        {
            "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
            "SGLANG_DISABLE_VERSION_CHECK": "1",
            "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
        },
    ),
    "flash-qla": Part(
        "FlashQLA, our backend of that name and the peer",
        (
            *("flash-qla==0.1.3", "tilelang==0.1.15", APACHE_TVM_FFI, "z3-solver>=4.13,<4.15.5", "ml-dtypes"),
            *("torch-c-dlpack-ext", "cloudpickle"),
        ),
        {
            # Programs that tilelang writes include CUTLASS and its own templates.
            "tilelang": Rule(("tilelang/3rdparty/*", "tilelang/src/*"), TILELANG_SOURCES),
            "z3-solver": Rule(("*/data/bin/*", "z3/include/*", "*/libz3.so.*")),
        },
    ),
}


class PackError(Exception):
    """A part cannot be packed; the message is for the user."""


def canonical(name: str) -> str:
    """A distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The distribution of a line of requirements, or of a line of ``pip freeze``."""
    return canonical(re.split(r"[\s<>=!~;@\[]", requirement.strip(), maxsplit=1)[0])


def download(requirements: Iterable[str], folder: Path, python: str, resolve: bool) -> None:
    """Have pip download wheels, with what they require if ``resolve``; raises PackError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *([] if resolve else ["--no-deps"]), *requirements], check=False)
    if done.returncode:
        raise PackError(f"pip has not downloaded {', '.join(requirements)}")


def pack(
    folder: Path, parts: Sequence[str], has: frozenset[str], architecture: int, python: str, limit: int = LIMIT
) -> None:
    """Write the parts and what run_bare.sh reads beside them; raises PackError and ThinError."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    wanted: list[str] = []
    environment: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in parts:
            part, published = PARTS[name], Path(temporary) / name
            requirements = BASE if name == "base" else part.requirements
            # What the base requires comes along.
            missing = [each for each in requirements if name == "base" or name_of(each) not in has]
            if missing:
                download(missing, published, python, resolve=name == "base")
            for wheel in sorted(published.glob("*.whl")):
                _place(wheel, folder, part, has, architecture)
            renamed = {each: rule.distribution for each, rule in part.rules.items() if rule.distribution is not None}
            wanted += [renamed.get(name_of(each), each) for each in requirements]
            environment |= part.environment
    # pip comes along: the environment that it installs into is made without.
    download(["pip"], folder, python, resolve=False)
    named = {name_of(each) for each in wanted}
    carried = sorted(canonical(each.name.partition("-")[0]) for each in folder.glob("*.whl"))
    wanted += [each for each in carried if each not in named]
    (folder / REQUIREMENTS).write_text("".join(f"{each}\n" for each in dict.fromkeys(wanted)))
    (folder / ENVIRONMENT).write_text("".join(f"{key}={value}\n" for key, value in environment.items()))
    size = sum(each.stat().st_size for each in folder.iterdir())
    count = len(list(folder.glob("*.whl")))
    print(f"{count} wheels for Python {python} in {folder}, {size / 2**20:.1f} MiB: {', '.join(parts)}")
    if size > limit << 20:
        raise PackError(f"expected at most {limit} MiB in {folder}, got {size / 2**20:.1f} MiB: pack fewer parts")


def _place(wheel: Path, folder: Path, part: Part, has: frozenset[str], architecture: int) -> None:
    """Put a wheel into the folder, compressed anew, thin where the part has a rule for it; not what the machine has."""
    name = canonical(wheel.name.partition("-")[0])
    if name in part.rules or name not in has:
        thin_wheel(wheel, folder, part.rules.get(name, Rule()), architecture)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "\n".join(f"  {name:15} {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="run_bare.sh pack",
        description=__doc__,
        epilog=f"parts:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", nargs="?", default=Path(__file__).parent / "wheels")
    parser.add_argument("parts", metavar="PART", nargs="*", default=["base"], help="see below")
    parser.add_argument("--has", type=Path, metavar="FILE", help="what `pip freeze` says on the GPU machine")
    parser.add_argument("--limit", type=int, default=LIMIT, metavar="MIB", help=f"by default {LIMIT}")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten, by default 90")
    parser.add_argument("--python", default="3.12", help="version on the GPU machine, by default 3.12")
    args = parser.parse_args(arguments)
    if unknown := [each for each in args.parts if each not in PARTS]:
        parser.error(f"PART: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    if not re.fullmatch(r"3\.\d+", args.python):
        parser.error(f"--python: expected a version as 3.12, got {args.python!r}")
    if args.has is not None and not args.has.is_file():
        parser.error(f"--has: expected a file, got {args.has}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    lines = args.has.read_text().splitlines() if args.has is not None else []
    has = frozenset(name_of(line) for line in lines if line.strip() and not line.startswith(("#", "-")))
    try:
        pack(args.folder, args.parts, has, args.arch, args.python, args.limit)
    except (PackError, ThinError) as error:
        print(f"run_bare.sh pack: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
