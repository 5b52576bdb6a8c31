"""A layer whose attention and MLP have one input (Cohere)."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.split_sums import Pair, Unfinished
from engine.layers.attention import Attention
from engine.layers.build import BuildContext
from engine.layers.decoder_config import DecoderConfig
from engine.layers.experts import ExpertsMLP
from engine.layers.mlp import GatedMLP
from engine.layers.norm import LayerNorm, RMSNorm
from engine.layers.rotary import Rotary


class ParallelLayer(nn.Module):
    """Adds attention and a gated MLP, or a mixture of experts, of one input, which a norm makes, to the
    residual."""

    def __init__(self, config: DecoderConfig, layer: int, rotary: Rotary, build: BuildContext) -> None:
        super().__init__()
        hidden, eps, act = config.hidden_size, config.rms_norm_eps, config.activation
        self.input_layernorm: LayerNorm | RMSNorm = (
            LayerNorm(hidden, eps, build, shift=False) if config.layer_norms else RMSNorm(hidden, eps, build)
        )
        self.self_attn = Attention(config, layer, rotary, build.at("self_attn"))
        self.mlp: GatedMLP | ExpertsMLP
        if config.experts is not None and layer in config.experts.layers:
            self.mlp = ExpertsMLP(hidden, config.experts, act, build.at("mlp"))
        else:
            self.mlp = GatedMLP(hidden, config.intermediate_size, act, build.at("mlp"), bias=config.mlp_bias)
            self.mlp.down_proj.before_norm = True
        self.self_attn.o_proj.before_norm = True

    def forward(
        self,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        rows: torch.Tensor | None,
        given: torch.Tensor | None,
    ) -> tuple[Unfinished, torch.Tensor]:
        """See :meth:`engine.layers.decoder.DecoderLayer.forward`; there are no inputs of a layer's own."""
        norm, project = self.input_layernorm, self.self_attn.qkv_proj
        if isinstance(self.mlp, GatedMLP) and project.fuses_norm(x):
            qkv, total = project.after_norm(norm, x, residual)
            total = total if rows is None else total.index_select(0, rows)
            inner, _ = self.mlp.after_norm(norm, total, None)
        else:
            normed, total = norm.add(x, residual)
            qkv = project.normed(normed)
            if rows is not None:
                normed, total = normed.index_select(0, rows), total.index_select(0, rows)
            inner = self.mlp.normed(normed) if isinstance(self.mlp, GatedMLP) else self.mlp(normed)
        # Attention first, as Transformers rounds the sum.
        return Pair(self.self_attn.attend(qkv, positions, cache, meta, rows), inner), total
