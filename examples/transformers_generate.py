#!/usr/bin/env python3
"""transformers' Qwen3-Next with our convolution, gated delta rule and gated norm in place of its PyTorch ones.

python examples/transformers_generate.py                      random weights, the layer widths of the 80B model
python examples/transformers_generate.py examples/tiny/checkpoint

Needs `pip install "transformers>=5.16.1,<5.20"` where neither engine has brought it.
Generates the same tokens twice, says whether they agree and by how much faster ours are. Ends with status 1 if tokens
differ in float32; in bfloat16 both round, each in its own order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet, apply_mask_to_padding_states
from transformers.utils import logging

from qnext_kernels import selected_backends
from qnext_plugins.model import CoreWeights, RecurrentBatch, Segment, StatePools
from qnext_plugins.model.gated_delta_net import gated_delta_net_core

# transformers takes gates that are computed already; our kernels compute them, so the layer's forward is what changes.


class OurGatedDeltaNet(Qwen3NextGatedDeltaNet):
    """The layer with our kernels; its states lie in transformers' cache, a slot a sequence."""

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Map [B, L, hidden] to [B, L, hidden]."""
        hidden_states = apply_mask_to_padding_states(hidden_states, attention_mask)
        size, length = hidden_states.shape[:2]
        qkvz, ba = (project(hidden_states).flatten(0, 1) for project in (self.in_proj_qkvz, self.in_proj_ba))
        pools, known = self._pools(cache_params, qkvz, size)
        slots, starts = torch.arange(size), torch.arange(0, size * length + 1, length)
        if known and length == 1:
            batch = RecurrentBatch(decode=Segment(slice(None), slots))
        else:
            batch = RecurrentBatch(prefill=Segment(slice(None), slots, starts, torch.full((size,), known)))
        weights = CoreWeights(self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias, self.norm.weight)
        out = gated_delta_net_core(qkvz, ba, weights, self.norm.variance_epsilon, pools, batch)
        return self.out_proj(out.view(size, length, -1))

    def _pools(self, cache_params: Any, qkvz: Tensor, size: int) -> tuple[StatePools, bool]:
        """The states [B, channels, W − 1] and [B, HV, V, K] float32, and whether they hold something already."""
        conv = qkvz.new_zeros(size, self.conv1d.weight.shape[0], self.conv_kernel_size - 1)
        state = torch.zeros(size, self.num_v_heads, self.head_v_dim, self.head_k_dim)
        if cache_params is None:
            return StatePools(conv, state), False
        layer, known = cache_params.layers[self.layer_idx], cache_params.has_previous_state(self.layer_idx)
        if not known:
            layer.lazy_initialization(conv_states=conv, recurrent_states=state)
            layer.has_previous_state[0] = True
        return StatePools(layer.conv_states[0], layer.recurrent_states[0]), known


@contextmanager
def our_kernels(model: Qwen3NextForCausalLM) -> Iterator[None]:
    """Our kernels in every Gated DeltaNet layer of ``model``, as long as the block runs."""
    layers = [module for module in model.modules() if type(module) is Qwen3NextGatedDeltaNet]
    for layer in layers:
        layer.__class__ = OurGatedDeltaNet
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = Qwen3NextGatedDeltaNet


class Clock(BaseStreamer):
    """Notes, when the prompt and each token come by, the time and the seconds spent in what is replaced so far.

    That is the Gated DeltaNet layers without their projections, which stay transformers'.
    """

    def __init__(self, model: Qwen3NextForCausalLM) -> None:
        self.notes: list[tuple[float, float]] = []
        self._spent = 0.0
        self._hooks: list[RemovableHandle] = []
        for layer in (module for module in model.modules() if isinstance(module, Qwen3NextGatedDeltaNet)):
            self._count(layer, 1)
            for projection in (layer.in_proj_qkvz, layer.in_proj_ba, layer.out_proj):
                self._count(projection, -1)

    def _count(self, module: torch.nn.Module, sign: int) -> None:
        """Add the seconds in ``module``, or take them off."""
        entered: list[float] = []

        def leave(*_: Any) -> None:
            self._spent += sign * (time.perf_counter() - entered.pop())

        self._hooks.append(module.register_forward_pre_hook(lambda *_: entered.append(time.perf_counter())))
        self._hooks.append(module.register_forward_hook(leave))

    def put(self, value: Tensor) -> None:
        self.notes.append((time.perf_counter(), self._spent))

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Run(NamedTuple):
    """Tokens, and seconds: of the whole model, and of what is replaced."""

    tokens: list[int]
    prefill: tuple[float, float]
    """To the first token."""
    decode: tuple[float, float]
    """A token after it."""


@torch.inference_mode()
def generate(model: Qwen3NextForCausalLM, prompt: Tensor, count: int) -> Run:
    """``count`` greedy tokens behind ``prompt`` [1, T]."""
    clock = Clock(model)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        streamer=clock,
    )
    asked, first, *_, last = clock.notes
    prefill = (first[0] - asked[0], first[1] - asked[1])
    decode = ((last[0] - first[0]) / (count - 1), (last[1] - first[1]) / (count - 1))
    return Run(out[0, prompt.shape[1] :].tolist(), prefill, decode)


def random_model(layers: int, experts: int, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    """Random weights; transformers' defaults are the widths of Qwen3-Next-80B-A3B."""
    config = Qwen3NextConfig(num_hidden_layers=layers, num_experts=experts, vocab_size=8192)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Qwen3NextForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def load(checkpoint: Path | None, layers: int, experts: int, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    """The checkpoint's model, or a random one."""
    if checkpoint is None:
        return random_model(layers, experts, dtype).eval()
    if not (checkpoint / "config.json").is_file():
        raise typer.BadParameter(f"expected a folder with a config.json, got {checkpoint}", param_hint="CHECKPOINT")
    return Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()


def report(theirs: Run, ours: Run, dtype: torch.dtype) -> bool:
    """Print the comparison; returns whether the tokens agree."""
    kernels = selected_backends(torch.device("cpu"), dtype)
    names = ("causal_conv1d", "gated_delta_rule", "gated_norm")
    print(f"kernels: {', '.join(f'{name}={kernels[name]}' for name in names)}; {torch.get_num_threads()} threads")
    print(f"{'milliseconds':32}{'transformers':>14}{'ours':>10}{'ratio':>8}")
    for what, a, b in (("prefill", theirs.prefill, ours.prefill), ("decode, a token", theirs.decode, ours.decode)):
        for n, where in enumerate((what, "  convolution, rule, norm")):
            print(f"{where:32}{a[n] * 1e3:14.1f}{b[n] * 1e3:10.1f}{a[n] / b[n]:8.2f}")
    same = next((n for n, pair in enumerate(zip(theirs.tokens, ours.tokens, strict=True)) if pair[0] != pair[1]), None)
    print(f"tokens: {'the same' if same is None else f'differ from token {same} on'}")
    return same is None


def main(
    checkpoint: Annotated[Path | None, typer.Argument(help="A folder; by default random weights.")] = None,
    layers: Annotated[int, typer.Option(min=4, help="Of a random model; every fourth is full attention.")] = 4,
    experts: Annotated[int, typer.Option(min=10, help="Of a random model (the 80B one has 512).")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the random prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2, help="How many tokens to generate.")] = 32,
) -> None:
    """Generate with transformers' Qwen3-Next, without our kernels and with them."""
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"expected float32 or bfloat16, got {dtype!r}", param_hint="--dtype")
    kind = getattr(torch, dtype)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = load(checkpoint, layers, experts, kind)
    prompt = torch.randint(model.config.vocab_size, (1, prompt_tokens))
    generate(model, prompt[:, :8], 2)  # what is only done once is done before the clock runs
    theirs = generate(model, prompt, new_tokens)
    with our_kernels(model):
        generate(model, prompt[:, :8], 2)
        ours = generate(model, prompt, new_tokens)
    if not report(theirs, ours, kind) and kind == torch.float32:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
