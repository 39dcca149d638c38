from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from qnext_kernels import force_backend, qk_norm_rope_gate, sigmoid_gate
from tests.kernels.kernel_inputs import DTYPES, NATIVE_BACKENDS, Bad, assert_close, same_bits

EPS = 1e-6
MAX_POSITION = 512
# heads, key-value heads, head_dim, rotary_dim: the model's quarter, a whole head, nothing to rotate, parts of vectors
LAYOUTS = [(4, 2, 32, 8), (4, 2, 256, 64), (3, 1, 20, 20), (2, 2, 16, 0), (2, 1, 45, 26)]
Layout = tuple[int, int, int, int]


def arguments(layout: Layout, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    heads, kv_heads, head_dim, rotary_dim = layout
    angles = torch.arange(MAX_POSITION)[:, None] * 0.1 ** torch.arange(rotary_dim // 2)
    return {
        "qkv": torch.randn(tokens, 2 * (heads + kv_heads) * head_dim).to(dtype),
        "positions": torch.randint(MAX_POSITION, (tokens,)),
        "q_weight": torch.randn(head_dim).to(dtype),
        "k_weight": torch.randn(head_dim).to(dtype),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "eps": EPS,
    }


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    names = ("qkv", "q_weight", "k_weight", "cos_sin")
    return arguments | {name: arguments[name].double() for name in names}


@pytest.mark.parametrize("tokens", [0, 1, 11])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_float64_and_rounds_once(backend: str, layout: Layout, dtype: torch.dtype, tokens: int) -> None:
    given = arguments(layout, tokens, dtype)
    with force_backend(backend):
        q, k, v, gate = qk_norm_rope_gate(**given)
    with force_backend("reference"):
        truth_q, truth_k, truth_v, truth_gate = qk_norm_rope_gate(**in_float64(given))
    assert q.shape == gate.shape == (tokens, layout[0] * layout[2])
    assert k.shape == v.shape == (tokens, layout[1] * layout[2])
    assert {x.dtype for x in (q, k, v, gate)} == {dtype}
    for actual, truth in ((q, truth_q), (k, truth_k)):
        assert_close(actual, truth, {torch.float32: layout[2]})
    assert torch.equal(v.double(), truth_v)
    assert torch.equal(gate.double(), truth_gate)


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_agrees_with_the_lines_of_transformers_attention(backend: str) -> None:
    heads, kv_heads, head_dim, tokens = 4, 2, 32, 11
    config = Qwen3NextConfig(num_attention_heads=heads, head_dim=head_dim, max_position_embeddings=MAX_POSITION)
    q_norm, k_norm = Qwen3NextRMSNorm(head_dim, eps=EPS), Qwen3NextRMSNorm(head_dim, eps=EPS)
    torch.nn.init.normal_(q_norm.weight)
    torch.nn.init.normal_(k_norm.weight)
    q_and_gate, k, v = (torch.randn(1, tokens, n * head_dim) for n in (2 * heads, kv_heads, kv_heads))
    positions = torch.randint(MAX_POSITION, (tokens,))

    rotary = Qwen3NextRotaryEmbedding(config)
    query, gate = torch.chunk(q_and_gate.view(1, tokens, -1, head_dim * 2), 2, dim=-1)
    query = q_norm(query).transpose(1, 2)
    key = k_norm(k.view(1, tokens, -1, head_dim)).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *rotary(query, positions[None]))

    cos, sin = rotary(query, torch.arange(MAX_POSITION)[None])
    half = cos.shape[-1] // 2
    with force_backend(backend):
        ours = qk_norm_rope_gate(
            torch.cat([q_and_gate, k, v], dim=-1)[0],
            positions,
            q_norm.weight,
            k_norm.weight,
            torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1),
            heads,
            kv_heads,
            EPS,
        )
    assert_close(ours[0], query[0].transpose(0, 1).flatten(1), {torch.float32: 2 * head_dim})
    assert_close(ours[1], key[0].transpose(0, 1).flatten(1), {torch.float32: 2 * head_dim})
    assert torch.equal(ours[2], v[0])
    assert torch.equal(ours[3], gate.reshape(tokens, -1))


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_reads_a_projection_that_is_a_slice_of_a_wider_tensor(backend: str) -> None:
    given = arguments(LAYOUTS[0], 5, torch.float32)
    wide = torch.cat([given["qkv"], torch.full((5, 3), float("nan"))], dim=1)
    with force_backend(backend):
        for sliced, whole in zip(
            qk_norm_rope_gate(**(given | {"qkv": wide[:, :-3]})), qk_norm_rope_gate(**given), strict=True
        ):
            assert same_bits(sliced, whole)


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_weights_and_table_may_have_other_dtypes(
    backend: str, dtype: torch.dtype, table_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    given = arguments(LAYOUTS[0], 5, dtype)
    given["q_weight"], given["cos_sin"] = given["q_weight"].to(weight_dtype), given["cos_sin"].to(table_dtype)
    with force_backend(backend):
        q, k, _, _ = qk_norm_rope_gate(**given)
    with force_backend("reference"):
        truth_q, truth_k, _, _ = qk_norm_rope_gate(**in_float64(given))
    assert_close(q, truth_q, {torch.float32: LAYOUTS[0][2]})
    assert_close(k, truth_k, {torch.float32: LAYOUTS[0][2]})


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_weights_table_and_positions_of_any_stride_are_read(backend: str) -> None:
    given = arguments(LAYOUTS[0], 5, torch.float32)
    strided = {
        name: given[name].repeat_interleave(2, dim=-1)[..., ::2] for name in ("positions", "q_weight", "k_weight")
    }
    strided["cos_sin"] = torch.cat([given["cos_sin"]] * 2, dim=1)[:, : given["cos_sin"].shape[1]]
    with force_backend(backend):
        for ours, whole in zip(qk_norm_rope_gate(**(given | strided)), qk_norm_rope_gate(**given), strict=True):
            assert same_bits(ours, whole)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_a_token_does_not_depend_on_the_batch(backend: str, layout: Layout, dtype: torch.dtype) -> None:
    given = arguments(layout, 25, dtype)

    def rows(index: slice | Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope_gate(**(given | {"qkv": given["qkv"][index], "positions": given["positions"][index]}))

    order = torch.randperm(25)
    with force_backend(backend):
        together, shuffled = rows(slice(None)), rows(order)
        alone = [torch.cat(parts) for parts in zip(*(rows(slice(n, n + 1)) for n in range(25)), strict=True)]
    for whole, one, other in zip(together, alone, shuffled, strict=True):
        assert same_bits(whole, one)
        assert same_bits(whole[order], other)


@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_positions_may_be_int32_or_int64(backend: str, positions_dtype: torch.dtype) -> None:
    given = arguments(LAYOUTS[0], 5, torch.float32)
    with force_backend(backend):
        q, *_ = qk_norm_rope_gate(**(given | {"positions": given["positions"].to(positions_dtype)}))
        assert same_bits(q, qk_norm_rope_gate(**given)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "gate_shape"),
    [
        ((7, 48), (7, 48)),
        ((7, 48), (7, 1)),
        ((2, 3, 5), (2, 3, 1)),
        ((2, 1, 3, 17), (2, 1, 3, 17)),
        ((31,), (31,)),
        ((3, 1), (3, 1)),
        ((0, 4), (0, 1)),
    ],
)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_sigmoid_gate_agrees_with_float64_and_rounds_once(
    backend: str, shape: tuple[int, ...], gate_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, gate = torch.randn(shape, dtype=dtype), torch.randn(gate_shape, dtype=dtype) * 3
    with force_backend(backend):
        out = sigmoid_gate(x, gate)
    assert out.dtype == dtype
    assert_close(out, x.double() * torch.sigmoid(gate.double()), {torch.float32: 5})


@pytest.mark.parametrize("gate_dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_sigmoid_gate_reads_views_and_other_dtypes(backend: str, dtype: torch.dtype, gate_dtype: torch.dtype) -> None:
    x, gate = torch.randn(5, 4, 3, 40).to(dtype), torch.randn(5, 4, 3, 40).to(gate_dtype)
    with force_backend(backend):
        for a, b in ((x[:, 1, 1], gate[:, 2, 2]), (x[..., 3:20], gate[..., 7:8]), (x[0].mT, gate[0].mT)):
            out = sigmoid_gate(a, b)
            assert same_bits(out, sigmoid_gate(a.contiguous(), b.contiguous()))
            assert_close(out, a.double() * torch.sigmoid(b.double()), {torch.float32: 5})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("width", "gate_width"), [(33, 1), (33, 33), (2048, 1), (2048, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
def test_sigmoid_gate_of_a_row_does_not_depend_on_the_batch(
    backend: str, dtype: torch.dtype, width: int, gate_width: int
) -> None:
    x, gate = torch.randn(25, width, dtype=dtype), torch.randn(25, gate_width, dtype=dtype)
    order = torch.randperm(25)
    with force_backend(backend):
        together = sigmoid_gate(x, gate)
        assert same_bits(together[order], sigmoid_gate(x[order], gate[order]))
        alone = torch.cat([sigmoid_gate(x[n : n + 1], gate[n : n + 1]) for n in range(25)])
    assert same_bits(together, alone)


@pytest.mark.parametrize("backend", NATIVE_BACKENDS)
@pytest.mark.parametrize(
    "bad",
    [
        Bad("qkv", "another width", lambda x: x[:, :-1], ValueError),
        Bad("qkv", "one dimension", lambda x: x[0], ValueError),
        Bad("qkv", "integers", lambda x: x.long(), TypeError),
        Bad("positions", "of fewer tokens", lambda x: x[:-1], ValueError),
        Bad("positions", "floats", lambda x: x.float(), TypeError),
        Bad("positions", "booleans", lambda x: x > 0, TypeError),
        Bad("positions", "beyond the table", lambda x: x + MAX_POSITION, IndexError),
        Bad("positions", "negative", lambda x: x - MAX_POSITION, IndexError),
        Bad("q_weight", "two dimensions", lambda x: x[None], ValueError),
        Bad("k_weight", "another head dim", lambda x: x[:-1], ValueError),
        Bad("cos_sin", "one dimension", lambda x: x[0], ValueError),
        Bad("cos_sin", "odd", lambda x: x[:, :-1], ValueError),
        Bad("cos_sin", "wider than a head", lambda x: torch.cat([x] * 5, dim=1), ValueError),
        Bad("cos_sin", "integers", lambda x: x.int(), TypeError),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(bad: Bad, backend: str) -> None:
    given = arguments(LAYOUTS[0], 5, torch.float32)
    with force_backend(backend), pytest.raises(bad.error, match=f"^{bad.argument}:"):
        qk_norm_rope_gate(**(given | {bad.argument: bad.change(given[bad.argument])}))


@pytest.mark.parametrize(
    "bad",
    [
        Bad("x", "integers", lambda x: x.long(), TypeError),
        Bad("gate", "integers", lambda x: x.long(), TypeError),
        Bad("gate", "another width", lambda x: x[:, :-1], ValueError),
        Bad("gate", "more tokens", lambda x: torch.cat([x, x]), ValueError),
        Bad("gate", "more dimensions", lambda x: x.expand(2, -1, -1), ValueError),
    ],
    ids=str,
)
def test_sigmoid_gate_refuses_bad_input_by_name(bad: Bad) -> None:
    given = {"x": torch.ones(4, 8), "gate": torch.ones(4, 8)}
    with pytest.raises(bad.error, match=f"^{bad.argument}:"):
        sigmoid_gate(**(given | {bad.argument: bad.change(given[bad.argument])}))


def test_sigmoid_gate_refuses_a_gate_that_would_widen_the_result() -> None:
    with pytest.raises(ValueError, match=r"^gate:"):
        sigmoid_gate(torch.ones(4, 1), torch.ones(4, 8))
