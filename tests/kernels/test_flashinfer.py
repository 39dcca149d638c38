"""FlashInfer and FlashQLA: what their backends decline, that the packages have what is called, and numbers on a GPU.

The packages are no part of the environment of the tests. To check the calls against them, on any machine:

    pip install flashinfer-python flash-qla    # in an environment with the tests' packages
    python -m pytest tests/kernels/test_flashinfer.py

and to compare numbers with the reference, on a GPU that they support: the same with ``-m gpu``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from qnext_kernels import (
    OPERATIONS,
    flashinfer_support,
    force_backend,
    gated_delta_rule_decode,
    gated_delta_rule_prefill,
    gated_delta_rule_verify,
    rms_norm,
)
from qnext_kernels.dispatch import Call, deterministic, reason_to_decline
from qnext_kernels.gated_attention import flashinfer as heads_flashinfer
from qnext_kernels.gated_delta_rule import flash_qla, flashinfer, padded_verify, step_features
from qnext_kernels.gated_delta_rule.flash_qla import FlashQlaGatedDeltaRule
from qnext_kernels.gated_delta_rule.flashinfer import FlashInferGatedDeltaRule
from qnext_kernels.moe import flashinfer as moe_flashinfer
from qnext_kernels.rms_norm import flashinfer as rms_norm_flashinfer
from qnext_kernels.rms_norm.flashinfer import ALIGNMENT, FlashInferRmsNorm
from qnext_kernels.triton_support import aligned_rows
from tests.kernels.delta_rule_runs import Shape, random_gates, random_state, random_tokens
from tests.kernels.kernel_inputs import assert_close, distinct_slots, nan_pool, nan_steps, start_offsets

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (16, 32, 128, 128)
FLASHINFER = flashinfer_support.PACKAGE, flashinfer_support.VERSIONS
FLASH_QLA = flash_qla.PACKAGE, flash_qla.VERSIONS
BACKENDS = (FlashInferGatedDeltaRule(), FlashQlaGatedDeltaRule(), FlashInferRmsNorm())


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def reason(backend: Any, method: str, dtype: torch.dtype = BF16, **facts: Any) -> str | None:
    given = {"tokens": 8, "shape": SHAPE, "dtypes": (FP32, BF16)} | facts
    return backend.supports_call(GPU, dtype, Call(method, **given))


# What they decline.


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_serve_no_cpu_no_float32_and_not_the_deterministic_mode(backend: Any) -> None:
    assert backend.supports(CPU, BF16) == "runs on cuda, not on cpu"
    assert backend.supports(GPU, FP32) == "computes in torch.bfloat16, torch.float16, got torch.float32"
    with deterministic():
        why = reason_to_decline(backend, GPU, BF16)
    assert why == "is not batch invariant, as the deterministic mode requires"


def test_without_the_package_or_with_another_version_the_reason_says_so() -> None:
    why_missing = flashinfer_support.why_missing
    assert why_missing("no-such-package", "no_such_package", ("1", "2")) == "no-such-package is not installed"
    expected = f"needs torch from 1.0, below 1.1, got {version('torch')}"
    assert why_missing("torch", "torch", ("1.0", "1.1")) == expected


def test_an_old_gpu_and_one_of_amd_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_support.why_unsuitable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    assert flashinfer_support.why_unsuitable(0) == "needs compute capability 9.0, got 8.6"
    assert flash_qla._why_unsuitable(0) == "needs compute capability 9.0, 10.0, 10.3, 12.0, 12.1, got 8.6"
    flashinfer_support.why_unsuitable.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert flashinfer_support.why_unsuitable(0) == "runs on GPUs of NVIDIA"
    flashinfer_support.why_unsuitable.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_flashinfer_serves_the_published_model() -> None:
    backend = FlashInferGatedDeltaRule()
    for ranks in (1, 2, 4, 8):
        shape = (16 // ranks, 32 // ranks, 128, 128)
        for method in ("decode", "verify", "prefill"):
            assert reason(backend, method, shape=shape) is None
    assert reason(backend, "verify", features=step_features(torch.empty(1, 1, 32, 128, 128))) is None
    assert reason(backend, "prefill", FP16) is None


@pytest.mark.usefixtures("hopper")
def test_flashinfer_declines_what_would_not_be_exact() -> None:
    backend = FlashInferGatedDeltaRule()
    padding = "uses slot 0 for padding unless states are in torch.float32, got torch.bfloat16"
    rounding = "rounds states at the end of a call alone: needs them in torch.float32, got torch.bfloat16"
    rounded_steps = step_features(torch.empty(1, 1, 32, 128, 128, dtype=BF16))
    assert reason(backend, "verify", features=rounded_steps) == "has no step pool in torch.bfloat16"
    assert reason(backend, "prefill", features=("snapshots",)) == "has no snapshots"
    assert reason(backend, "prefill", dtypes=(BF16, BF16)) == rounding
    for method in ("decode", "verify"):
        assert reason(backend, method, dtypes=(BF16, BF16)) == padding
        assert reason(backend, method, FP16) == "decodes and verifies in torch.bfloat16, got torch.float16"
        assert reason(backend, method, dtypes=(FP32, FP32)) == "needs a and b in torch.bfloat16, got torch.float32"
        small = reason(backend, method, shape=(16, 32, 64, 128))
        assert small == "needs head dimensions of 128 and 128, got 64 and 128"


def test_flashinfer_has_a_prefill_for_some_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FlashInferGatedDeltaRule()
    found = {}
    for capability in ((9, 0), (10, 0), (11, 0), (12, 0)):
        for cuda in ("12.9", "13.0"):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
            monkeypatch.setattr(torch.version, "cuda", cuda)
            found[capability, cuda] = reason(backend, "prefill")
    assert {case for case, why in found.items() if why is not None} == {
        ((10, 0), "12.9"),
        ((11, 0), "12.9"),
        ((11, 0), "13.0"),
    }
    assert found[(10, 0), "12.9"] == "needs CUDA 13 for a prefill on compute capability 10.0, got 12.9"


def test_flash_qla_serves_prefills_alone() -> None:
    backend = FlashQlaGatedDeltaRule()
    assert reason(backend, "prefill") is None
    assert reason(backend, "decode") == "has no decode"
    assert reason(backend, "verify") == "has no verify"
    assert reason(backend, "prefill", features=("snapshots",)) == "has no snapshots"
    assert reason(backend, "prefill", shape=(1, 1, 128, 256)) == "needs head dimensions of 128 and 128, got 128 and 256"
    states = "rounds states at the end of a call alone: needs them in torch.float32, got torch.float16"
    assert reason(backend, "prefill", dtypes=(FP16, BF16)) == states


def test_the_norm_needs_a_weight_of_the_same_dtype() -> None:
    backend = FlashInferRmsNorm()
    assert reason(backend, "rms_norm", shape=(2048,), dtypes=(BF16,)) is None
    assert (
        reason(backend, "rms_norm", shape=(2048,), dtypes=(FP32,))
        == "needs a weight in torch.bfloat16, got torch.float32"
    )


def test_rows_for_the_norm_are_copied_only_where_their_address_forbids_it() -> None:
    buffer = torch.randn(200).bfloat16()
    first = -buffer.data_ptr() % ALIGNMENT // buffer.itemsize
    allowed, forbidden = (buffer[start : start + 128].view(2, 64) for start in (first, first + 8))
    assert aligned_rows(allowed, ALIGNMENT).data_ptr() == allowed.data_ptr()
    copy = aligned_rows(forbidden, ALIGNMENT)
    assert copy.data_ptr() != forbidden.data_ptr()
    assert torch.equal(copy, forbidden)


def test_none_serves_unless_it_is_asked_for() -> None:
    for operation in OPERATIONS.values():
        names = [backend.name for backend in operation.backends]
        theirs = [names.index(name) for name in ("flashinfer", "flash_qla") if name in names]
        ours = [names.index(name) for name in ("native", "triton") if name in names]
        assert all(mine < other for mine in ours for other in theirs)
        assert names[-1] == "reference"


# What the packages have.


def calls(adapter: ModuleType, name: str) -> Iterator[ast.Call]:
    """The calls of a library's function in the source of a backend."""
    for node in ast.walk(ast.parse(inspect.getsource(adapter))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


def signature(package: str, file: str, name: str) -> inspect.Signature:
    """Of a function in the source of a package: importing one may need a GPU."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse((Path(spec.origin).parent / file).read_text()).body
    (found,) = (node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    assert found.vararg is None
    assert found.kwarg is None
    places = [*found.posonlyargs, *found.args]
    defaults: list[Any] = [inspect.Parameter.empty] * (len(places) - len(found.defaults)) + [None] * len(found.defaults)
    parameters = [
        inspect.Parameter(argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for argument, default in zip(places, defaults, strict=True)
    ]
    for argument, value in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        default = inspect.Parameter.empty if value is None else None
        parameters.append(inspect.Parameter(argument.arg, inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)


@pytest.mark.parametrize(
    ("distribution", "versions", "adapter", "file", "name"),
    [
        (*FLASHINFER, flashinfer, "flashinfer/gdn_prefill.py", "chunk_gated_delta_rule"),
        (*FLASHINFER, flashinfer, "flashinfer/gdn_decode.py", "gated_delta_rule_decode_pretranspose"),
        (*FLASHINFER, flashinfer, "flashinfer/gdn_decode.py", "gated_delta_rule_mtp"),
        (*FLASHINFER, rms_norm_flashinfer, "flashinfer/norm/__init__.py", "gemma_rmsnorm"),
        (*FLASHINFER, heads_flashinfer, "flashinfer/rope.py", "apply_rope_with_cos_sin_cache"),
        (*FLASHINFER, moe_flashinfer, "flashinfer/fused_moe/core.py", "cutlass_fused_moe"),
        (*FLASH_QLA, flash_qla, "flash_qla/ops/gated_delta_rule/chunk/__init__.py", "chunk_gated_delta_rule"),
    ],
)
def test_the_package_has_what_is_called(
    distribution: str, versions: tuple[str, str], adapter: ModuleType, file: str, name: str
) -> None:
    try:
        found = Version(version(distribution))
    except PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")
    assert Version(versions[0]) <= found < Version(versions[1])
    package, _, path = file.partition("/")
    (call,) = calls(adapter, name)
    assert not any(isinstance(argument, ast.Starred) for argument in call.args)
    assert all(keyword.arg for keyword in call.keywords)
    # Raises TypeError unless the function takes these arguments.
    signature(package, path, name).bind(*call.args, **{str(each.arg): each.value for each in call.keywords})


# Numbers, on a GPU.


@pytest.fixture
def serving() -> Any:
    """A backend, where it serves here; else the test is skipped with the reason."""

    def use(operation: str, name: str) -> Any:
        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no GPU")
        (backend,) = (each for each in OPERATIONS[operation].backends if each.name == name)
        if (why := backend.supports(GPU, BF16)) is not None:
            pytest.skip(f"{name}: {why}")
        return force_backend(f"{operation}={name}")

    return use


HEADS = Shape(4, 2, 128, 128)


def to_gpu(x: Tensor) -> Tensor:
    """A copy with the same strides: pools keep the gaps between their slots."""
    everything = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return everything.to(GPU).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flashinfer", "flash_qla"])
@pytest.mark.parametrize("lengths", [[1], [64], [65, 0, 1, 300], [2000, 3]])
def test_a_prefill_agrees_with_float64(serving: Any, name: str, lengths: list[int]) -> None:
    served, lengths = serving("gated_delta_rule", name), [*lengths, 5]  # the last is padding
    tokens, gates = random_tokens(HEADS, sum(lengths), BF16), random_gates(HEADS)
    pool, slots = nan_pool(8, HEADS.state, FP32, gap=64), torch.randperm(8)[: len(lengths)].int()
    known = torch.arange(len(lengths)) % 2 == 0
    slots[-1] = -1
    for slot in slots[known & (slots >= 0)]:
        pool[slot] = random_state(HEADS, FP32)
    truth_pool, offsets = pool.double(), start_offsets(lengths)
    with force_backend("reference"):
        truth = gated_delta_rule_prefill(*tokens.double(), *gates, truth_pool, slots, offsets, known)
    on_gpu = [to_gpu(x) for x in (*tokens, *gates, pool, slots, offsets, known)]
    with served:
        out = gated_delta_rule_prefill(*on_gpu)
    written = slots[(slots >= 0) & (offsets.diff() > 0)]
    # A term has a query, a key written, a key read, a state, what is written and a weight of the chunk's inverse.
    expected = {FP32: 8 * max(lengths) + HEADS.key_dim, BF16: 6}
    assert_close(out.cpu(), truth, expected)
    assert not out[-5:].any()
    found = on_gpu[7].cpu()
    assert_close(found[written], truth_pool[written], expected)
    others = torch.ones(8, dtype=torch.bool).index_fill(0, written.long(), False)
    assert torch.equal(found[others].isnan(), pool[others].isnan())


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_decode_agrees_with_float64_and_can_be_captured(serving: Any, count: int) -> None:
    served = serving("gated_delta_rule", "flashinfer")
    tokens, gates = random_tokens(HEADS, count, BF16), random_gates(HEADS)
    pool, slots = nan_pool(count + 2, HEADS.state, FP32, gap=64), torch.randperm(count + 2)[:count].int()
    slots[count // 2 : count // 2 + (count > 1)] = -1
    live = slots[slots >= 0]
    for slot in live:
        pool[slot] = random_state(HEADS, FP32)
    truth_pool = pool.double()
    with force_backend("reference"):
        truth = gated_delta_rule_decode(*tokens.double(), *gates, truth_pool, slots)
    on_gpu = [to_gpu(x) for x in (*tokens, *gates, pool, slots)]
    graph, before = torch.cuda.CUDAGraph(), to_gpu(pool)
    with served:
        gated_delta_rule_decode(*on_gpu)
        with torch.cuda.graph(graph):
            out = gated_delta_rule_decode(*on_gpu)
    on_gpu[7].copy_(before)
    graph.replay()
    # Gates come from fast exponentials, whose last bits are not float32's.
    expected = {FP32: 64 + HEADS.key_dim}
    assert_close(out.cpu(), truth, expected)
    assert not out[(slots < 0).to(GPU)].any()
    assert_close(on_gpu[7].cpu()[live], truth_pool[live], expected)
    others = torch.ones(count + 2, dtype=torch.bool).index_fill(0, live.long(), False)
    assert on_gpu[7].cpu()[others].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("in_steps", [False, True])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_a_verify_agrees_with_float64_and_can_be_captured(
    serving: Any, count: int, in_steps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the kernels for few and for many heads, and in parts; a sequence has no slots, another one to start from."""
    served, columns = serving("gated_delta_rule", "flashinfer"), 3
    monkeypatch.setattr(padded_verify, "BUFFER", 33 * columns * HEADS.value_heads * HEADS.value_dim * HEADS.key_dim)
    lengths, rows = [1 + n % columns for n in range(count)], torch.arange(count)
    tokens, gates = random_tokens(HEADS, sum(lengths), BF16), random_gates(HEADS)
    pool = nan_pool(columns * count + 2, HEADS.state, FP32, gap=64)
    slots = distinct_slots(columns * count, len(pool)).view(count, columns)
    accepted = torch.randint(1, columns + 1, (count,))
    for slot in slots[rows, accepted - 1]:
        pool[slot] = random_state(HEADS, FP32)
    if count > 1:
        slots[2] = -1
        slots[3] = torch.where(torch.arange(columns) == accepted[3] - 1, slots[3], -1)
    where = slots, start_offsets(lengths), accepted
    steps = (nan_steps(count, columns, HEADS.state, FP32, steps_first=True), rows.flip(0)) if in_steps else ()
    truth_pools = pool.double(), *(x.double() for x in steps[:1])
    with force_backend("reference"):
        truth = gated_delta_rule_verify(*tokens.double(), *gates, truth_pools[0], *where, *truth_pools[1:], *steps[1:])
    on_gpu = [to_gpu(x) for x in (*tokens, *gates, pool, *where, *steps)]
    written = 11 if in_steps else 7
    graph, before = torch.cuda.CUDAGraph(), on_gpu[written].clone()
    with served:
        gated_delta_rule_verify(*on_gpu)
        with torch.cuda.graph(graph):
            out = gated_delta_rule_verify(*on_gpu)
    on_gpu[written].copy_(before)
    graph.replay()
    expected = {FP32: columns * (64 + HEADS.key_dim)}
    assert_close(out.cpu(), truth, expected)
    found, states = on_gpu[written].cpu(), truth_pools[-1]
    assert torch.equal(found.isnan(), states.isnan())
    assert_close(found.nan_to_num(), states.nan_to_num(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 2048), (65, 2048), (3, 5, 128), (0, 128)])
def test_a_norm_agrees_with_float64(serving: Any, shape: tuple[int, ...], with_residual: bool) -> None:
    served = serving("rms_norm", "flashinfer")
    x, weight = torch.randn(shape).to(BF16), torch.randn(shape[-1]).to(BF16)
    residual = torch.randn(shape).to(BF16) if with_residual else None
    with served:
        normed, total = rms_norm(x.to(GPU), weight.to(GPU), 1e-6, None if residual is None else residual.to(GPU))
    with force_backend("reference"):
        truth, _ = rms_norm(total.cpu().double(), weight.double(), 1e-6)
    assert torch.equal(total.cpu(), x if residual is None else x + residual)
    assert_close(normed.cpu(), truth, {FP32: shape[-1]})
