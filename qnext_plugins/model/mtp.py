"""Multi-token prediction, the draft of speculative decoding: one layer that looks one token further.

It sees, at position t, the embedding of token t + 1 and the target's hidden state behind its final norm, and predicts
token t + 2; a further draft feeds it its own output. Embedding and head are the target's (DeepSeek-V3, arXiv
2412.19437, section 2.2; the ``mtp.*`` tensors of the checkpoint).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qnext_plugins.model.config import FULL_ATTENTION, Qwen3NextConfig
from qnext_plugins.model.decoder_layer import DecoderLayer
from qnext_plugins.model.port import Engine


class MultiTokenPredictor(nn.Module):
    """Parameters are named as in the checkpoint, without the leading ``mtp.``."""

    def __init__(self, config: Qwen3NextConfig, engine: Engine, *, prefix: str) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = engine.replicated_linear(2 * hidden, hidden, quantized=True, prefix=f"{prefix}.fc")
        self.pre_fc_norm_embedding = engine.norm(hidden, eps)
        self.pre_fc_norm_hidden = engine.norm(hidden, eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, engine, FULL_ATTENTION, sparse=config.num_experts > 0, prefix=f"{prefix}.layers.{n}")
            for n in range(config.num_nextn_predict_layers)
        )
        self.norm = engine.norm(hidden, eps)

    def draft(self, embeddings: Tensor, hidden_states: Tensor, positions: Tensor, step: int = 0) -> Tensor:
        """Return the hidden states [T, hidden] from which the head predicts the token after the next.

        Args:
            embeddings: [T, hidden] of the next tokens.
            hidden_states: [T, hidden] of the target's final norm, or of the draft's for a further step.
            positions: [T] of the hidden states.
            step: which draft step this is; layer ``step`` modulo the number of layers serves it.
        """
        embeddings, _ = self.pre_fc_norm_embedding(embeddings)
        hidden_states, _ = self.pre_fc_norm_hidden(hidden_states)
        joined = self.fc(torch.cat([embeddings, hidden_states], dim=-1))
        hidden_states, residual = self.layers[step % len(self.layers)](joined, None, positions)
        return self.norm(hidden_states, residual)[0]
