"""The short convolution between two gates, in place of attention (LFM2)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch
from torch import nn

from engine.kernels.causal_conv import gated_conv
from engine.kernels.paged import AttentionMetadata
from engine.kernels.recurrent_state import StateCache
from engine.kernels.split_sums import Unfinished
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.causal_conv import conv_slot
from engine.layers.decoder_config import DecoderConfig, ShortConvConfig
from engine.layers.linear import FusedColumnLinear, FusedPart, RowLinear
from engine.layers.norm import RMSNorm


class ShortConv(nn.Module):
    """One block; ranks split its channels.

    In order: norm, three projections, gate, causal convolution, gate, output projection.
    """

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__()
        conv = config.recurrence
        assert isinstance(conv, ShortConvConfig)
        own = build.share(conv.width, "channels of short convolutions")
        self._channels = FusedPart("conv", conv.width, build.tp.rank * own, own)
        parts = [replace(self._channels, name=f"in_proj_{name}") for name in "bcu"]
        self.in_proj = FusedColumnLinear(
            config.hidden_size, parts, build, fused_name="in_proj", bias=conv.bias
        )
        self.conv = build.parameter(own, conv.conv_width)
        self.bias = build.parameter(own) if conv.bias else None
        self.out_proj = RowLinear(conv.width, config.hidden_size, build.at("out_proj"), bias=conv.bias)

    def forward(
        self,
        norm: RMSNorm,
        x: torch.Tensor | Unfinished,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        cache: StateCache,
        meta: AttentionMetadata,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the block for ``norm(x + residual)``, and bring the states behind the new tokens.

        Arguments and result as for :meth:`engine.layers.attention.Attention.forward`; positions don't matter.
        """
        inputs, residual = self.in_proj.after_norm(norm, x, residual)
        out = gated_conv(inputs, self.conv, self.bias, cache, meta)
        if rows is not None:
            out, residual = out.index_select(0, rows), residual.index_select(0, rows)
        return self.out_proj(out), residual

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        """Describe the convolution; the layers within describe their own."""
        slots = [conv_slot(prefix + "conv.weight", self.conv, [self._channels])]
        if self.bias is not None:
            own = slice(self._channels.start, self._channels.start + self._channels.size)
            slots.append(
                WeightSlot(prefix + "conv.bias", (self._channels.total,), [((own,), self.bias.data)])
            )
        return slots
