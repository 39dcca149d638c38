"""Compiling ahead of the timing, in several processes: a GPU is idle while one process compiles for a minute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def only_compiling(share: int, shares: int) -> Iterator[None]:
    """Triton compiles into its cache on disk what is launched in here, and launches nothing.

    Every process sees the same launches; those that differ are dealt out, and number n is compiled by share n mod
    ``shares``. Of an autotuned kernel each configuration is such a launch. None is tuned: that is left to a process
    that has the GPU for itself. What FlashInfer compiles it launches, too.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    run, tune = JITFunction.run, Autotuner.run
    numbers: dict[object, int] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        known, kernel = len(numbers), compiled_for(self, args, options)
        if numbers.setdefault(kernel, known) == known and known % shares == share:
            run(self, *args, grid=grid, warmup=True, **options)

    def each_configuration(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(options):
            # One that this GPU cannot run is passed over by the tuner too.
            with suppress(Exception):
                if config.pre_hook is not None:
                    config.pre_hook({**self.nargs, **options, **config.all_kwargs()})
                self.fn.run(*args, **options, **config.all_kwargs())
        self.nargs = None

    JITFunction.run, Autotuner.run = compile_only, each_configuration
    try:
        with _flashinfer_beside_others():
            yield
    finally:
        JITFunction.run, Autotuner.run = run, tune


@contextmanager
def _flashinfer_beside_others() -> Iterator[None]:
    """FlashInfer compiles kernels written in CuTe in every process at once; by itself it does so one by one in all."""
    try:
        from flashinfer.jit.cute_dsl_core import JitSpecCuteDsl
    # It is not here, or half of it, or of a version without.
    except Exception:
        yield
        return
    one_by_one = JitSpecCuteDsl.build_and_load

    def build_and_load(self: Any) -> Any:
        if (kernel := self.try_load()) is not None:
            return kernel
        self.compile_and_persist()
        return self.load()

    JitSpecCuteDsl.build_and_load = build_and_load
    try:
        yield
    finally:
        JitSpecCuteDsl.build_and_load = one_by_one


def compiled_for(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> object:
    """What Triton compiles a launch for, so far as its arguments say: launches that differ in it are different."""
    parameters = {parameter.name: parameter for parameter in function.params}
    named = dict(zip(parameters, args, strict=False)) | options
    return function.fn, tuple((name, _kind(value, parameters.get(name))) for name, value in sorted(named.items()))


def _kind(value: Any, parameter: Any) -> object:
    """What counts of an argument; ``parameter``: None for an option of the launch."""
    if parameter is None or parameter.is_constexpr:
        return repr(value)
    alike = parameter.do_not_specialize
    if hasattr(value, "data_ptr"):
        unaligned = value.data_ptr() % 16 != 0
        return value.dtype, unaligned and not (alike or parameter.do_not_specialize_on_alignment)
    if isinstance(value, int):
        return value.bit_length() > 31, not alike and (value == 1, value % 16 == 0)
    return type(value)
