"""The deterministic mode of the dispatcher, and the promises of kernels that it stands on."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qnext_kernels import (
    OPERATIONS,
    dispatch,
    experts,
    explain,
    force_backend,
    gated_delta_rule_prefill,
    linear,
    triton_support,
)
from qnext_kernels.dispatch import Backend, BackendError, Operation, deterministic, is_deterministic, selected_backends

CPU = torch.device("cpu")


class FastBackend(Backend):
    name = "native"


class InvariantBackend(Backend):
    name = "reference"
    batch_invariant = True


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> Operation:
    monkeypatch.setattr(dispatch, "OPERATIONS", {})
    return Operation("moe", [FastBackend(), InvariantBackend()])


def test_a_backend_that_is_not_batch_invariant_is_skipped_in_the_mode_alone(two_backends: Operation) -> None:
    assert two_backends.select(CPU, torch.float32).name == "native"
    with deterministic():
        assert two_backends.select(CPU, torch.float32).name == "reference"
    assert two_backends.select(CPU, torch.float32).name == "native"


@pytest.mark.usefixtures("two_backends")
def test_the_reason_is_told() -> None:
    with deterministic():
        assert explain(CPU, torch.float32)["moe"] == {
            "native": "is not batch invariant, as the deterministic mode requires",
            "reference": None,
        }


def test_a_forced_backend_that_is_not_batch_invariant_is_an_error_that_names_the_operation() -> None:
    with deterministic(), force_backend("linear=cpu"), pytest.raises(BackendError) as raised:
        selected_backends(CPU, torch.float32)
    assert str(raised.value) == (
        "no backend serves linear on cpu with torch.float32; "
        "cpu: is not batch invariant, as the deterministic mode requires"
    )


def test_the_mode_ends_with_its_block_even_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), deterministic():
        raise ZeroDivisionError
    assert not is_deterministic()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("off", False), ("", False)])
def test_the_variable_turns_the_mode_on(value: str, on: bool) -> None:
    script = "from qnext_kernels.dispatch import is_deterministic; print(is_deterministic())"
    environment = os.environ | {"QNEXT_DETERMINISTIC": value}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operation_is_served_in_the_mode_by_what_serves_it_outside(dtype: torch.dtype) -> None:
    before = selected_backends(CPU, dtype)
    with deterministic():
        assert selected_backends(CPU, dtype) == before == dict.fromkeys(OPERATIONS, "native")


def test_on_a_gpu_triton_serves_in_the_mode_and_libraries_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type, index: None)
    gpu = torch.device("cuda")
    with deterministic():
        served = selected_backends(gpu, torch.bfloat16, but=("linear", "paged_attention"))
        reasons = explain(gpu, torch.bfloat16)
    assert set(served.values()) == {"triton"}
    declined = [reasons["gated_delta_rule"][name] for name in ("flashinfer", "flash_qla")]
    assert [*declined, reasons["rms_norm"]["flashinfer"]] == [
        "is not batch invariant, as the deterministic mode requires"
    ] * 3


def test_what_a_batch_invariant_backend_leaves_to_pytorch_is_refused_in_the_mode() -> None:
    strided = torch.ones(1, 4, 8)[:, :, ::2]
    routed = (torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    arguments = (torch.ones(2, 4), strided, torch.ones(1, 4, 2), *routed)
    experts(*arguments)
    with deterministic(), pytest.raises(BackendError, match=r"^moe: PyTorch's linear is not batch invariant"):
        experts(*arguments)


def prefill(tokens: tuple[Tensor, ...], splits: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Outputs and final state of one sequence whose tokens come in pieces of ``splits``."""
    q, k, v, a, b, A_log, dt_bias = tokens
    state = torch.zeros(1, v.shape[1], v.shape[2], q.shape[2], dtype=dtype)
    outputs, start = [], 0
    for length in splits:
        piece = (x[start : start + length] for x in (q, k, v, a, b))
        ends = torch.tensor([0, length])
        outputs.append(
            gated_delta_rule_prefill(*piece, A_log, dt_bias, state, torch.tensor([0]), ends, torch.tensor([start > 0]))
        )
        start += length
    return torch.cat(outputs), state


@pytest.fixture
def tokens() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads, values, key_dim, value_dim = 2, 4, 32, 48
    shapes = ((heads, key_dim), (heads, key_dim), (values, value_dim), (values,), (values,))
    return (*(random(201, *shape).bfloat16() for shape in shapes), random(values), random(values))


@pytest.mark.parametrize("splits", [[1, 200], [63, 138], [5, 64, 132], [100, 1, 100], [1] * 201])
def test_a_prefill_split_anywhere_has_the_bits_of_the_unsplit_one(
    tokens: tuple[Tensor, ...], splits: list[int]
) -> None:
    with deterministic():
        whole, pieces = prefill(tokens, [201], torch.float32), prefill(tokens, splits, torch.float32)
    assert all(torch.equal(*pair) for pair in zip(whole, pieces, strict=True))


def test_a_state_that_is_rounded_wherever_a_call_ends_is_refused_in_the_mode(tokens: tuple[Tensor, ...]) -> None:
    whole, pieces = prefill(tokens, [201], torch.bfloat16), prefill(tokens, [100, 101], torch.bfloat16)
    assert not torch.equal(whole[0], pieces[0])
    with deterministic(), pytest.raises(BackendError, match=r"^gated_delta_rule: a state in torch\.bfloat16"):
        prefill(tokens, [201], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 25])
def test_log_softmax_of_a_heads_row_does_not_depend_on_the_batch(rows: int, dtype: torch.dtype) -> None:
    """Both engines take log-probabilities so; the vocabulary is that of the published checkpoints."""
    generator = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(26, 8, generator=generator), torch.randn(151_936, 8, generator=generator)
    logits = linear(hidden.to(dtype), head.to(dtype)).float()
    whole = torch.log_softmax(logits, dim=-1)
    for start in range(0, 26, rows):
        part = slice(start, start + rows)
        assert torch.equal(torch.log_softmax(logits[part], dim=-1), whole[part])
