"""A layer whose norms come behind attention and MLP alone (EXAONE 4, OLMo)."""

from __future__ import annotations

import torch
from torch import nn

from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.rms_norm import sum_with
from engine.kernels.split_sums import Unfinished, whole
from engine.layers.attention import Attention
from engine.layers.build import BuildContext
from engine.layers.decoder_config import DecoderConfig
from engine.layers.mlp import GatedMLP
from engine.layers.norm import RMSNorm
from engine.layers.rotary import Rotary


class PostNormLayer(nn.Module):
    """Applies attention, then a gated MLP, to the residual itself, and adds the norm of each result to it."""

    def __init__(self, config: DecoderConfig, layer: int, rotary: Rotary, build: BuildContext) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, rotary, build.at("self_attn"))
        self.attention_out_norm = RMSNorm(hidden, eps, build, offset=config.norm_offset)
        self.mlp = GatedMLP(
            hidden, config.intermediate_size, config.activation, build.at("mlp"), bias=config.mlp_bias
        )
        self.mlp_out_norm = RMSNorm(hidden, eps, build, offset=config.norm_offset)

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
        project = self.self_attn.qkv_proj
        if project.fuses_norm(x):
            attended, total = self.self_attn(None, x, residual, positions, cache, meta, rows)
            inner, total = self.mlp.after_norm(None, self.attention_out_norm.of(attended), total)
        else:
            # Those two calls took 1 % longer with 64 rows of EXAONE 4.5's sizes than torch's GEMMs do.
            total = whole(x) if residual is None else sum_with(x, residual)
            qkv = project(total)
            total = total if rows is None else total.index_select(0, rows)
            attended = self.self_attn.attend(qkv, positions, cache, meta, rows)
            total = sum_with(self.attention_out_norm.of(attended), total)
            inner = self.mlp(total)
        return self.mlp_out_norm.of(inner), total
