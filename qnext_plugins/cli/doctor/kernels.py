"""Which kernels would serve here, and whether the C++ ones can be had."""

from __future__ import annotations

from typing import Any

from qnext_plugins.cli.doctor.findings import Finding, Subject, failure, note, ok, warning
from qnext_plugins.cli.doctor.machine import device_type
from qnext_plugins.cli.doctor.report import Library, Serving

DTYPES = ("bfloat16", "float32")
FAST = {"cpu": "native", "cuda": "triton"}
"""The backend that is meant to serve every operation on a device."""
SERVES_TOO = "serves too"
"""In place of a reason: the backend would serve if the one before it did not."""


def library() -> Library:
    """The C++ kernels: found, or compiled now as a first start would."""
    from qnext_kernels import native

    folder = native.cache_folder()
    before = set(folder.glob("*.so"))
    reason = native.why_missing()
    path = None if reason else native.build(native.instruction_set(), folder)
    return Library(
        compiler=_compiler(native),
        cache_folder=str(folder),
        path=None if path is None else str(path),
        compiled_now=path is not None and path not in before,
        reason=reason and reason.partition("\n")[0],
    )


def _compiler(native: Any) -> str | None:
    try:
        return " ".join(native.compiler())
    except native.NativeError:
        return None


def backends() -> list[Serving]:
    """For each operation and dtype, the backend that would serve and the others' reasons."""
    import torch

    from qnext_kernels import OPERATIONS, explain
    from qnext_kernels.dispatch import BackendError

    device, table = torch.device(device_type()), []
    for dtype in DTYPES:
        for operation, reasons in explain(device, getattr(torch, dtype)).items():
            try:
                serving = OPERATIONS[operation].select(device, getattr(torch, dtype)).name
            except BackendError:
                serving = None
            others = {
                name: (reason or SERVES_TOO).partition("\n")[0] for name, reason in reasons.items() if name != serving
            }
            table.append(Serving(operation=operation, dtype=dtype, backend=serving, others=others))
    return table


def native_library(subject: Subject) -> Finding | None:
    """On a CPU, C++ kernels serve, or PyTorch's operators in their place."""
    if device_type() != "cpu":
        return None
    found = library()
    if found.path is not None:
        return ok(f"the C++ kernels {'were compiled now, into' if found.compiled_now else 'lie in'} {found.path}")
    return warning(f"the C++ kernels cannot be had ({found.reason}); PyTorch's operators serve, slower", _fix(found))


def _fix(found: Library) -> str:
    if found.compiler is None:
        return "install g++ (Debian, Ubuntu: sudo apt-get install g++), or name a compiler in CXX"
    if "QNEXT_ISA" in str(found.reason):
        return "unset QNEXT_ISA"
    return (
        f"mend the compiler ({found.compiler}), or name another in CXX; "
        f"QNEXT_CACHE_DIR names a folder that can be written, now {found.cache_folder}"
    )


def selection(subject: Subject) -> Finding:
    """Every operation has a backend, and a fast one unless the user forces another."""
    from qnext_kernels.dispatch import deterministic, parse_forced
    from qnext_plugins.gpus import ENGINES_OWN
    from qnext_plugins.settings import Settings

    device = device_type()
    with deterministic(False):  # which has a check of its own
        table = [row for row in backends() if device == "cpu" or row.operation not in ENGINES_OWN]
    forced = parse_forced(Settings().backend)
    unserved = sorted({f"{row.operation} in {row.dtype}" for row in table if row.backend is None})
    if unserved:
        return failure(f"QNEXT_BACKEND={Settings().backend} cannot serve {', '.join(unserved)}", "unset QNEXT_BACKEND")
    fast = FAST.get(device)
    slow = sorted({row.operation for row in table if row.backend != fast})
    if fast is None:
        return note(f"this release has no fast kernels for {device}: the engine's own model stays in place there")
    if not slow:
        others = "" if device == "cpu" else f"; {' and '.join(ENGINES_OWN)} are the engine's"
        return ok(f"{fast} kernels serve all {len(table) // len(DTYPES)} operations in {' and '.join(DTYPES)}{others}")
    if forced:
        return note(f"QNEXT_BACKEND={Settings().backend} keeps {fast} kernels from {', '.join(slow)}")
    return warning(f"{fast} kernels do not serve {', '.join(slow)}", "see the reasons in the table of kernels")


def measured_backends(subject: Subject) -> Finding | None:
    """On a GPU, what the table of measured backends says of it."""
    from qnext_kernels import backend_table, dispatch

    try:
        table = dispatch.measured_backends()
    except backend_table.TableError as error:
        return failure(str(error), "install the package again")
    if device_type() != "cuda":
        return None
    names = backend_table.device_names(None)
    lines = [line for line in table.lines if line.device in names]
    if not lines:
        return note(f"no backend has been measured on {names[0]}: the first that supports a call serves it")
    said = [f"{'.'.join(line.key[:2])} {line.cells()[4]} of {line.tokens} tokens: {line.backend}" for line in lines]
    return ok(f"measured as the fastest on {names[0]}: {'; '.join(said)}")


def deterministic_mode(subject: Subject) -> Finding:
    """Whether QNEXT_DETERMINISTIC=1 is, or could be, served."""
    from qnext_plugins.settings import Settings

    return judge_determinism("QNEXT_DETERMINISTIC=1", Settings().deterministic, subject)


def judge_determinism(variable: str, asked: bool, subject: Subject) -> Finding:
    """The mode needs a batch-invariant backend for every operation, and on a CPU weights that our kernels read.

    On a GPU the engine's own mode has its part in it, and the engine says at its start what stands against either.

    Args:
        variable: that turns the mode on, with its value.
        asked: whether it is set.
        subject: with the checkpoint, if there is one.
    """
    from qnext_kernels.dispatch import deterministic
    from qnext_plugins.gpus import ENGINES_OWN
    from qnext_plugins.model import integer_obstacle, is_block_fp8

    on_gpu, quantization = device_type() != "cpu", (subject.config or {}).get("quantization_config")
    ours = not quantization or is_block_fp8(quantization) or integer_obstacle(quantization) is None
    with deterministic():
        table = [row for row in backends() if not (on_gpu and row.operation in ENGINES_OWN)]
    if missing := sorted({row.operation for row in table if row.backend is None}):
        obstacle, fix = f"no batch-invariant kernel for {', '.join(missing)}", "see the reasons in the table of kernels"
    elif not on_gpu and not ours:
        obstacle = "the checkpoint is quantized, neither in block-wise FP8 nor in group-wise int4"
        fix = "take the checkpoint in bfloat16"
    else:
        beside = ", beside the engine's own mode, which linears and attention need on a GPU" if on_gpu else ""
        every = "every operation of ours" if on_gpu else "every operation"
        return ok(f"{variable} {'is' if asked else 'can be'} served{beside}: {every} has a batch-invariant kernel")
    if asked:
        return failure(f"{variable} cannot be served: {obstacle}", f"{fix}, or unset {variable.partition('=')[0]}")
    return note(f"{variable} could not be served: {obstacle}")


CHECKS = (native_library, selection, measured_backends, deterministic_mode)
