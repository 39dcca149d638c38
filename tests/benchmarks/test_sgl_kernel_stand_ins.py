"""The operators that stand in for sglang-kernel's: as its Python part calls them, without SGLang's kernels below."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks.conftest import script


@pytest.fixture(scope="module")
def ops() -> Iterator[Any]:
    stand_ins = script("sgl_kernel_stand_ins")
    stand_ins._load_architecture_specific_ops()
    yield torch.ops.sgl_kernel
    stand_ins.LIBRARY._destroy()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """In the place of every module of SGLang's kernels."""
    module = ModuleType("kernels")
    for name in ("layernorm.norm", "moe", "moe.fused_moe_triton_kernels"):
        monkeypatch.setitem(sys.modules, f"sglang.kernels.ops.{name}", module)
    module.moe_align = module  # type: ignore[attr-defined]
    return module


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def test_a_norm_multiplies_with_one_plus_the_weight(ops: Any, kernels: Any) -> None:
    def rmsnorm(x: Tensor, weight: Tensor, out: Tensor, eps: float) -> None:
        assert x.dim() == out.dim() == 2
        out.copy_(rms_norm(x, weight, eps))

    def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        residual.add_(x)
        x.copy_(rms_norm(residual, weight, eps))

    kernels.rmsnorm, kernels.fused_add_rmsnorm = rmsnorm, fused_add_rmsnorm
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    out = torch.empty_like(x)
    ops.gemma_rmsnorm.default(out, x, weight, 1e-6, False)
    torch.testing.assert_close(out, rms_norm(x, 1 + weight, 1e-6))
    total = x + residual
    ops.gemma_fused_add_rmsnorm.default(x, residual, weight, 1e-6, False)
    torch.testing.assert_close(residual, total)
    torch.testing.assert_close(x, rms_norm(total, 1 + weight, 1e-6))


def test_a_sum_over_experts_goes_to_sglangs_own_kernel(ops: Any, kernels: Any) -> None:
    kernels.moe_sum_reduce_triton = lambda x, out, factor: out.copy_(factor * x.sum(1))
    x, out = torch.randn(4, 3, 8), torch.empty(4, 8)
    ops.moe_sum_reduce.default(x, out, 2.0)
    torch.testing.assert_close(out, 2 * x.sum(1))


def test_blocks_of_experts_are_aligned_by_sglangs_own_kernel(ops: Any, kernels: Any) -> None:
    seen: list[Any] = []
    kernels.moe_align_block_size = lambda *given: seen.append(given)
    ids = torch.zeros(5, 2, dtype=torch.int32)
    tensors = [torch.zeros(8, dtype=torch.int32) for _ in range(4)]
    ops.moe_align_block_size.default(ids, 7, 16, *tensors, True, False)
    ((given_ids, experts, block, *rest, padded),) = seen
    assert given_ids.data_ptr() == ids.data_ptr()
    assert (experts, block, padded) == (7, 16, True)
    assert [each.data_ptr() for each in rest] == [each.data_ptr() for each in tensors]
    with pytest.raises(NotImplementedError, match="ignore_invalid_expert"):
        ops.moe_align_block_size.default(ids, 7, 16, *tensors, True, True)


def test_a_weak_reference_is_the_tensor(ops: Any) -> None:
    tensor = torch.randn(3)
    assert ops.weak_ref_tensor.default(tensor).data_ptr() == tensor.data_ptr()
