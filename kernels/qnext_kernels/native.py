"""The C++ kernels of ``csrc/``: compiled once on first use for this processor, kept in a cache, called through ctypes.

They need AVX2 with FMA, and a C++ compiler ($CXX, else g++, else clang++) the first time. The library lies in
$QNEXT_CACHE_DIR, else in the user's cache folder; its name contains a digest of sources, compiler and flags, so that a
stale one is never loaded. Threads are those of PyTorch: the library is linked against the
same OpenMP runtime, and so respects ``torch.set_num_threads`` and the engines' binding.

They are compiled for AMX where the processor has it, else for AVX-512 with BF16 dot products, else for AVX2; QNEXT_ISA
chooses.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from qnext_kernels.dispatch import Backend

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
AVX512BF16 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mavx2", "-mfma", "-mf16c")
FLAGS_OF_ISA = {
    "amx": (*AVX512BF16, "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"),
    "avx512bf16": AVX512BF16,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "amx-emulated": (*AVX512BF16, "-mavx512vbmi", "-DQNEXT_EMULATE_TILES"),
}
"""Instruction sets that the kernels are written for, the best first, and what makes a compiler use them.

The last is AMX as AVX-512 does it, slowly and with the same bits, for tests.
"""
CPU_AVX512BF16 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
FURTHER_FLAGS = {"avx512bf16": {"avx512vbmi": "-mavx512vbmi"}}
"""Of an instruction set where the processor has what is named too, as almost all of them have."""
CPU_FLAGS_OF_ISA = {
    "amx": {*CPU_AVX512BF16, "avx512vbmi", "amx_tile", "amx_bf16"},
    "avx512bf16": CPU_AVX512BF16,
    "avx2": {"avx2", "fma", "f16c"},
    "amx-emulated": {*CPU_AVX512BF16, "avx512vbmi"},
}
SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LONGEST_WAIT = 300
"""Seconds for another process that compiles; then this one goes on without the library."""


class NativeError(RuntimeError):
    """The native library cannot be had here; the message says why."""


def usable_instruction_sets() -> list[str]:
    """Those that the processor has, the best first; AMX where the system and the compiler have it too.

    Raises:
        NativeError: there is none.
    """
    have = _cpu_flags()
    usable = [isa for isa, needed in CPU_FLAGS_OF_ISA.items() if needed <= have]
    if "amx" in usable and not (_tiles_permitted() and _compiles("amx")):
        usable.remove("amx")
    if not usable:
        raise NativeError("needs a processor with AVX2 and FMA")
    return usable


@cache
def _tiles_permitted() -> bool:
    """Ask Linux for the registers of AMX, which a process has to before it uses them (arch_prctl(2))."""
    return ctypes.CDLL(None).syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


@cache
def _compiles(isa: str) -> bool:
    """Whether the compiler knows an instruction set: AMX is younger than others that still serve."""
    try:
        run([*compiler(), *FLAGS_OF_ISA[isa], "-E", "-x", "c++", os.devnull])
    except NativeError:
        return False
    return True


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        raise NativeError("needs Linux on x86-64") from None
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def compiler_flags(isa: str) -> list[str]:
    """What makes a compiler use an instruction set, as far as this processor has it."""
    further = FURTHER_FLAGS.get(isa, {})
    return [*FLAGS_OF_ISA[isa], *(flag for name, flag in further.items() if name in _cpu_flags())]


def instruction_set() -> str:
    """The one in QNEXT_ISA, else the best that the processor has.

    Raises:
        NativeError: the processor does not have it.
    """
    usable = usable_instruction_sets()
    wanted = os.environ.get("QNEXT_ISA") or usable[0]
    if wanted not in usable:
        raise NativeError(f"QNEXT_ISA: expected one of {', '.join(usable)} on this processor, got {wanted!r}")
    return wanted


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("QNEXT_CACHE_DIR") or user_cache_path("qnext-kernels"))


def compiler() -> list[str]:
    """The C++ compiler's command; raises NativeError where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++"):
        if (path := shutil.which(name)) is not None:
            return [path]
    raise NativeError("needs a C++ compiler once (g++ or clang++, or its name in CXX)")


def build(isa: str, folder: Path) -> Path:
    """Compile ``csrc/`` for an instruction set into ``folder``, unless it lies there already; return the library.

    Raises:
        NativeError: the compiler is missing or fails.
    """
    command = [*compiler(), *FLAGS, *compiler_flags(isa)]
    sources = sorted(SOURCES.glob("*.cpp"))
    library = folder / f"qnext_kernels-{isa}-{_digest(command)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library}.lock", timeout=LONGEST_WAIT), tempfile.TemporaryDirectory(dir=folder) as work:
        if library.exists():
            return library
        logger.warning("qnext-kernels: compiling the CPU kernels for %s, once, into %s", isa, library)
        start = time.monotonic()
        objects = [Path(work) / f"{source.stem}.o" for source in sources]
        compile_commands = [[*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, compile_commands))
        linked = Path(work) / "linked.so"
        # PyTorch's own OpenMP runtime, under the name that it is loaded by, lies beside its libraries.
        runtime = Path(torch.__file__).parent / "lib"
        run([*command, "-shared", *map(str, objects), "-o", str(linked), f"-L{runtime}"])
        linked.replace(library)
        logger.warning("qnext-kernels: compiled in %.0f s", time.monotonic() - start)
    return library


def _digest(command: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(run([command[0], "--version"]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> str:
    """What a command of the compiler prints; raises NativeError where it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NativeError(f"the C++ compiler cannot be run: {error}") from error
    if done.returncode:
        raise NativeError(f"the C++ compiler failed: {' '.join(command)}\n{done.stderr[-2000:]}")
    return done.stdout


@cache
def _load() -> ctypes.CDLL | NativeError:
    try:
        return ctypes.CDLL(str(build(instruction_set(), cache_folder())))
    except (NativeError, OSError) as error:
        logger.warning("qnext-kernels: PyTorch's operators serve on this CPU instead of the C++ kernels: %s", error)
        return error if isinstance(error, NativeError) else NativeError(str(error))


def library() -> ctypes.CDLL:
    """The loaded library, compiled first where need be; raises NativeError where it cannot be had."""
    loaded = _load()
    if isinstance(loaded, NativeError):
        raise loaded
    return loaded


# Not traced by torch.compile, in whose graphs the answer is a constant.
@torch.compiler.assume_constant_result
def why_missing() -> str | None:
    """None where the library can be had, else the reason."""
    loaded = _load()
    return str(loaded) if isinstance(loaded, NativeError) else None


class NativeBackend(Backend):
    """A backend in C++; it declines, with the reason, where the library cannot be had."""

    name = "native"
    devices = ("cpu",)
    batch_invariant = True

    def supports(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if (reason := super().supports(device, dtype)) is not None:
            return reason
        if dtype not in DTYPES:
            return f"needs {' or '.join(map(str, DTYPES))}, got {dtype}"
        return why_missing()
