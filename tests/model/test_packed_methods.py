"""Weights that an engine's layers hold packed: the same results, and they can be loaded again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qnext_kernels import force_backend, topk_softmax
from qnext_plugins import packed_methods
from qnext_plugins.packed_methods import PackedExperts, PackedLinear, replace_method, unpacked_weights
from tests.kernels.kernel_inputs import same_bits


class EngineMethod:
    """What an engine puts on a layer of its own."""


class OurLinear(PackedLinear, EngineMethod):
    pass


class EngineExperts:
    def create_weights(self, layer: Any, w13: Tensor, w2: Tensor) -> None:
        layer.w13_weight, layer.w2_weight = nn.Parameter(w13), nn.Parameter(w2)


class OurExperts(PackedExperts, EngineExperts):
    pass


def linear_layer(weight: Tensor, packable: bool = True) -> Any:
    layer: Any = nn.Module()
    layer.weight, layer.quant_method = nn.Parameter(weight.clone()), EngineMethod()
    return replace_method(layer, {EngineMethod: OurLinear}, packable)


def test_linear_is_packed_behind_loading_and_unpacked_before_it_is_loaded_again() -> None:
    weight, x = torch.randn(130, 32), torch.randn(3, 32)
    with torch.no_grad(), force_backend("native"):
        model = nn.ModuleList([linear_layer(weight)])
        before = model[0].quant_method.apply(model[0], x)
        model[0].quant_method.process_weights_after_loading(model[0])
        assert model[0].packed
        assert not same_bits(model[0].weight.data, weight)
        assert same_bits(model[0].quant_method.apply(model[0], x), before)
        with unpacked_weights(model):
            assert not model[0].packed
            assert same_bits(model[0].weight.data, weight)
        assert same_bits(model[0].quant_method.apply(model[0], x), before)


def test_weights_that_graphs_read_are_packed_again_with_what_has_been_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_methods, "_graphs_read", lambda layer: True)
    weight, x = torch.randn(128, 32), torch.randn(3, 32)
    with torch.no_grad(), force_backend("native"):
        model, expected = nn.ModuleList([linear_layer(torch.randn(128, 32))]), linear_layer(weight)
        model[0].quant_method.process_weights_after_loading(model[0])
        with unpacked_weights(model):
            model[0].weight.copy_(weight)
        assert model[0].packed
        # As an engine may do on its part.
        model[0].quant_method.process_weights_after_loading(model[0])
        assert same_bits(model[0].quant_method.apply(model[0], x), expected.quant_method.apply(expected, x))


def test_weights_that_an_engine_puts_in_the_place_of_packed_ones_are_packed_and_others_stay_so() -> None:
    weight, x = torch.randn(130, 32), torch.randn(3, 32)
    with torch.no_grad(), force_backend("native"):
        model = nn.ModuleList([linear_layer(torch.randn(130, 32)), linear_layer(torch.randn(130, 32))])
        for layer in model:
            layer.quant_method.process_weights_after_loading(layer)
        old = [layer.weight for layer in model]
        before = model[1].quant_method.apply(model[1], x)
        model.to("meta")
        with unpacked_weights(model):
            model[0].weight = nn.Parameter(weight.clone())
            model[0].quant_method.process_weights_after_loading(model[0])
        with unpacked_weights(model):  # for the next tensor
            model[1].weight = old[1]  # for which none came
        expected = linear_layer(weight)
        assert model[0].packed
        assert same_bits(model[0].quant_method.apply(model[0], x), expected.quant_method.apply(expected, x))
        assert same_bits(model[1].quant_method.apply(model[1], x), before)


def test_weight_that_another_layer_reads_is_not_packed() -> None:
    weight = torch.randn(64, 32)
    with force_backend("native"):
        layer = linear_layer(weight, packable=False)
        layer.quant_method.process_weights_after_loading(layer)
    assert not layer.packed
    assert same_bits(layer.weight.data, weight)


def test_layer_without_our_kernel_keeps_the_engines_method() -> None:
    with force_backend("cpu"):
        assert type(linear_layer(torch.randn(64, 32)).quant_method) is EngineMethod


def test_experts_are_packed_behind_loading_and_unpacked_before_they_are_loaded_again() -> None:
    w13, w2, x = torch.randn(4, 256, 64), torch.randn(4, 64, 128), torch.randn(5, 64)
    routing = topk_softmax(torch.randn(5, 4), 2, True)
    model = nn.ModuleList([nn.Module()])
    layer: Any = model[0]
    layer.quant_method, layer.shared_expert = (method := OurExperts()), (None,)
    with torch.no_grad(), force_backend("native"):
        method.create_weights(layer, w13.clone(), w2.clone())
        before = method.run(layer, x, *routing)
        method.process_weights_after_loading(layer)
        assert layer.packed
        assert same_bits(method.run(layer, x, *routing), before)
        method.process_weights_after_loading(layer)
        with unpacked_weights(model):
            assert same_bits(layer.w13_weight.data, w13)
            assert same_bits(layer.w2_weight.data, w2)
            assert same_bits(method.run(layer, x, *routing), before)


def test_quantized_layer_that_may_have_no_weight_keeps_the_engines_method() -> None:
    layer: Any = nn.Module()
    layer.quant_method = of_the_engine = object()
    assert replace_method(layer, {EngineMethod: OurLinear}, packable=True).quant_method is of_the_engine
