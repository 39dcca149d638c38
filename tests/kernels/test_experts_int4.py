"""Experts over weights in group-wise int4."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qnext_kernels import experts, experts_int4, force_backend, pack_experts_int4_, unpack_experts_int4_
from qnext_kernels.dispatch import BackendError
from qnext_kernels.integers import INT4, INT8, INT_GROUPS, dequantize_int4
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits
from tests.kernels.moe_inputs import INT4_SIZES, in_float64, random_int4, rows_of

ROUTED = ("w13", "w13_scale", "w2", "w2_scale")
SHARED = ("shared_w13", "shared_w13_scale", "shared_w2", "shared_w2_scale", "shared_gate")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def sums(group: int) -> int:
    """Columns that are summed up in the two products of a routed expert."""
    hidden, middle, _ = INT4_SIZES[group]
    return hidden + middle


def beside(shared: torch.dtype | str | None, dtype: torch.dtype) -> torch.dtype | None:
    """How a shared expert is stored: in a dtype, or as the activations are."""
    return dtype if shared == "plain" else shared  # type: ignore[return-value]


@pytest.mark.parametrize("shared", [None, "plain", INT4, INT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("tokens", [0, 1, 9, 70])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_agree_with_float64(
    backend: str, tokens: int, group: int, dtype: torch.dtype, shared: torch.dtype | str | None
) -> None:
    arguments = random_int4(tokens, dtype, group=group, shared=beside(shared, dtype))
    with force_backend(backend):
        out = experts_int4(**arguments)
    with force_backend("reference"):
        truth = experts_int4(**in_float64(arguments))
    assert out.dtype == dtype
    hidden, _, shared_middle = INT4_SIZES[group]
    extra = shared is not None
    assert_close(out, truth, {dtype: 2 + 4 * extra, torch.float32: sums(group) + (hidden + shared_middle) * extra})


@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_are_those_of_the_numbers_that_the_weights_stand_for(backend: str, group: int) -> None:
    arguments = random_int4(9, torch.float32, group=group)
    w13 = dequantize_int4(arguments["w13"], arguments["w13_scale"], torch.float64)
    w2 = dequantize_int4(arguments["w2"], arguments["w2_scale"], torch.float64)
    with force_backend("reference"):
        truth = experts(arguments["x"].double(), w13, w2, arguments["topk_weights"], arguments["topk_ids"])
    with force_backend(backend):
        assert_close(experts_int4(**arguments), truth, {torch.float32: sums(group)})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_of_another_rank_are_skipped(backend: str) -> None:
    arguments = random_int4(9, torch.float32)
    arguments["topk_ids"][2], arguments["topk_ids"][4, 1] = -1, -1
    arguments["topk_weights"][arguments["topk_ids"] < 0] = torch.nan
    first = {name: arguments[name][:, :1] for name in ("topk_weights", "topk_ids")}
    with force_backend(backend):
        out, alone = experts_int4(**arguments), experts_int4(**(arguments | first))
    assert not out[2].any()
    assert_close(out[4], alone[4], {torch.float32: 2 * sums(32)})


@pytest.mark.parametrize("shared", [INT4, INT8])
@pytest.mark.parametrize("group", INT_GROUPS)
def test_native_experts_in_int4_do_not_depend_on_the_batch_or_on_threads(group: int, shared: torch.dtype) -> None:
    arguments = random_int4(200, torch.bfloat16, group=group, shared=shared)
    with force_backend("native"):
        together = experts_int4(**arguments)
        for begin, tokens in enumerate((1, 2, 3, 5, 6, 7, 12, 13, 19, 70)):
            some = slice(begin, begin + tokens)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert same_bits(experts_int4(**rows_of(arguments, some)), together[some])


@pytest.mark.parametrize("shared_stored", ["plain", INT4, INT8])
@pytest.mark.parametrize("group", INT_GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_packed_experts_in_int4_give_the_bits_of_the_plain_ones(
    dtype: torch.dtype, group: int, shared_stored: torch.dtype | str
) -> None:
    arguments = random_int4(300, dtype, group=group, shared=beside(shared_stored, dtype))
    *extra, gate = arguments["shared"]
    plain = [*(arguments[name] for name in ROUTED), *extra]
    packed = [weight.clone() for weight in plain]
    routed, shared = packed[:4], packed[4:]
    with force_backend("native"):
        assert pack_experts_int4_(*routed, tuple(shared))
        assert not same_bits(shared[0], extra[0])
        laid_out = dict(zip(ROUTED, routed, strict=True)) | {"shared": (*shared, gate), "packed": True}
        for some in (slice(0, 1), slice(1, 3), slice(3, 23), slice(0, 300)):
            rows = rows_of(arguments, some)
            assert same_bits(experts_int4(**(rows | laid_out)), experts_int4(**rows))
        unpack_experts_int4_(*routed, tuple(shared))
    assert all(map(same_bits, packed, plain))


@pytest.mark.parametrize("shared", [INT4, INT8])
@pytest.mark.parametrize("part", range(8))
def test_experts_that_cannot_be_packed_stay_as_they_are(part: int, shared: torch.dtype) -> None:
    arguments = random_int4(1, torch.bfloat16, shared=shared)
    weights = [*(arguments[name] for name in ROUTED), *arguments["shared"][:-1]]
    weights[part] = torch.stack([weights[part], weights[part]], dim=-1)[..., 0]
    before = [weight.clone() for weight in weights]
    with force_backend("native"):
        assert not pack_experts_int4_(*weights[:4], tuple(weights[4:]))
    assert all(map(same_bits, weights, before))


@pytest.mark.parametrize("name", ROUTED)
def test_strided_weights_give_what_contiguous_ones_do(name: str) -> None:
    arguments = random_int4(5, torch.float32)
    spread = torch.stack([arguments[name], torch.zeros_like(arguments[name])], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    with force_backend("native"):
        out, truth = experts_int4(**(arguments | {name: spread})), experts_int4(**arguments)
    assert_close(out, truth, {torch.float32: 2 * sums(32)})


@pytest.mark.parametrize("shared", [INT4, INT8])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_torch_compile_keeps_experts_in_int4(backend: str, shared: torch.dtype) -> None:
    arguments = random_int4(3, torch.float32, shared=shared)
    torch._dynamo.reset()
    with force_backend(backend):
        compiled = torch.compile(experts_int4, backend="aot_eager", fullgraph=True)
        assert same_bits(compiled(**arguments), experts_int4(**arguments))


def test_backend_that_reads_no_packed_experts_says_so() -> None:
    with force_backend("cpu"), pytest.raises(BackendError, match=r"^packed: backend cpu"):
        experts_int4(**random_int4(3, torch.float32), packed=True)


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "of columns not in eights", lambda x: x[:, :-4], ValueError),
        Bad("w13", "in float32", lambda x: x.float(), TypeError),
        Bad("w13", "of fewer columns", lambda x: x[..., :-1], ValueError),
        Bad("w13", "of an odd number of rows", lambda x: x[:, :-1], ValueError),
        Bad("w13", "of a middle not in eights", lambda x: x[:, :-8], ValueError),
        Bad("w13_scale", "in bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("w13_scale", "of fewer rows", lambda x: x[:, :-1], ValueError),
        Bad("w13_scale", "of groups of 16", lambda x: x.repeat_interleave(4, dim=-1), ValueError),
        Bad("w2", "in int64", lambda x: x.long(), TypeError),
        Bad("w2", "of fewer columns", lambda x: x[..., :-1], ValueError),
        Bad("w2_scale", "in bfloat16", lambda x: x.bfloat16(), TypeError),
        Bad("w2_scale", "of fewer experts", lambda x: x[:-1], ValueError),
        Bad("w2_scale", "of groups of another size than w13", lambda x: x.repeat_interleave(2, dim=-1), ValueError),
        Bad("topk_ids", "of an expert too many", lambda x: torch.full_like(x, 4), IndexError),
        Bad("topk_ids", "below −1", lambda x: torch.full_like(x, -2), IndexError),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_experts_in_int4_refuse_bad_input_by_name(backend: str, bad: Bad) -> None:
    arguments = random_int4(5, torch.float32, group=64)
    with force_backend(backend), pytest.raises(bad.error, match=f"^{bad.argument}:"):
        experts_int4(**(arguments | {bad.argument: bad.change(arguments[bad.argument])}))


@pytest.mark.parametrize(
    "bad",
    [
        Bad("shared_w13", "in int64", lambda x: x.long(), TypeError),
        Bad("shared_w13", "of fewer columns", lambda x: x[:, :-1], ValueError),
        Bad("shared_w13_scale", "in float64", lambda x: x.double(), TypeError),
        Bad("shared_w13_scale", "of groups of 32", lambda x: x.repeat_interleave(2, dim=1), ValueError),
        Bad("shared_w2", "in int8 as PyTorch has it", lambda x: x.to(torch.int8), TypeError),
        Bad("shared_w2", "of fewer rows", lambda x: x[:-1], ValueError),
        Bad("shared_w2_scale", "of groups of 32", lambda x: x.repeat_interleave(2, dim=1), ValueError),
        Bad("shared_gate", "in float64", lambda x: x.double(), TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [INT4, INT8])
def test_a_shared_expert_refuses_bad_input_by_name(stored: torch.dtype, bad: Bad) -> None:
    arguments = random_int4(5, torch.float32, group=64, shared=stored)
    shared = dict(zip(SHARED, arguments["shared"], strict=True))
    shared[bad.argument] = bad.change(shared[bad.argument])
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        experts_int4(**(arguments | {"shared": tuple(shared.values())}))


@pytest.mark.parametrize("part", ["shared_w13", "shared_w2"])
def test_a_shared_expert_is_stored_in_one_way_with_its_scales(part: str) -> None:
    arguments = random_int4(5, torch.float32, shared=INT4)
    first, other = SHARED.index(part), random_int4(5, torch.float32, shared=INT8)["shared"]
    mixed = list(arguments["shared"])
    mixed[first : first + 2] = other[first : first + 2]
    before = [arguments[name].clone() for name in ROUTED]
    with pytest.raises(TypeError, match=r"^shared_w2:"):
        experts_int4(**(arguments | {"shared": tuple(mixed)}))
    weights = [arguments[name] for name in ROUTED]
    with force_backend("native"):
        with pytest.raises(TypeError, match=r"^shared_w2:"):
            pack_experts_int4_(*weights, tuple(mixed[:-1]))
        with pytest.raises(TypeError, match=r"^shared_w13:"):
            pack_experts_int4_(*weights, tuple(mixed[:-1:2]))
    assert all(same_bits(arguments[name], old) for name, old in zip(ROUTED, before, strict=True))


def test_routed_experts_in_int8_are_refused() -> None:
    arguments = random_int4(5, torch.float32)
    with pytest.raises(TypeError, match=r"^w13: expected torch.int32, got torch.uint8"):
        experts_int4(**(arguments | {"w13": arguments["w13"].to(INT8)}))
