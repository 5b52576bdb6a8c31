"""The gated delta net: linear attention whose past is a state of fixed size (Qwen3.5)."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

import torch
from torch import nn

from engine.kernels.causal_conv import causal_conv
from engine.kernels.delta_rule import DeltaGates
from engine.kernels.dispatch import delta_rule, norm_linear
from engine.kernels.gated_norm import gated_norm
from engine.kernels.paged import AttentionMetadata
from engine.kernels.recurrent_state import StateCache
from engine.kernels.split_sums import Unfinished
from engine.layers.build import BuildContext, WeightSlot
from engine.layers.causal_conv import conv_slot
from engine.layers.decoder_config import DecoderConfig, DeltaNetConfig
from engine.layers.linear import FusedColumnLinear, FusedPart, RowLinear, join_weights
from engine.layers.norm import RMSNorm


class GatedDeltaNet(nn.Module):
    """One block in the place of attention; ranks split its heads.

    In order: norm, projections, causal convolution of queries, keys and values, delta rule, norm with gate,
    output projection.
    """

    def __init__(self, config: DecoderConfig, build: BuildContext) -> None:
        super().__init__()
        net = config.recurrence
        assert isinstance(net, DeltaNetConfig)
        rank, hidden = build.tp.rank, config.hidden_size
        self.key_heads = build.share(net.key_heads, "linear attention key heads")
        self.value_heads = build.share(net.value_heads, "linear attention value heads")
        keys, values = self.key_heads * net.key_dim, self.value_heads * net.value_dim
        all_keys, all_values = net.key_heads * net.key_dim, net.value_heads * net.value_dim
        self._qkv = [
            FusedPart("in_proj_q", all_keys, rank * keys, keys),
            FusedPart("in_proj_k", all_keys, rank * keys, keys),
            FusedPart("in_proj_v", all_values, rank * values, values),
        ]
        gates = [
            FusedPart(name, net.value_heads, rank * self.value_heads, self.value_heads)
            for name in ("in_proj_b", "in_proj_a")
        ]
        self.in_proj_qkv = FusedColumnLinear(hidden, self._qkv, build, fused_name="in_proj_qkv", bias=False)
        self.in_proj_z = FusedColumnLinear(
            hidden,
            [FusedPart("in_proj_z", all_values, rank * values, values)],
            build,
            fused_name="in_proj_z",
            bias=False,
        )
        # Rounding a loaded model to fp8 leaves these out: they are small, and errors of the decay add up.
        kept = replace(build, formats=build.formats and replace(build.formats, every=None))
        self.in_proj_ba = FusedColumnLinear(hidden, gates, kept, fused_name="in_proj_ba", bias=False)
        # One GEMM computes all projections. A decode step would launch each on its own otherwise.
        self._projections = join_weights([self.in_proj_qkv, self.in_proj_z, self.in_proj_ba])
        self._sizes = [keys + keys + values, values, self.value_heads, self.value_heads]
        self.conv = build.parameter(keys + keys + values, net.conv_width)
        self.log_rate = build.parameter(self.value_heads, dtype=torch.float32)
        self.shift = build.parameter(self.value_heads, dtype=torch.float32)
        self.norm = RMSNorm(net.value_dim, config.rms_norm_eps, build)
        self.out_proj = RowLinear(all_values, hidden, build.at("out_proj"), bias=False)
        self.tp = build.tp

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
        """Compute ``net(norm(x + residual))``, and bring the sequences' states behind their new tokens.

        Arguments and result as for :meth:`engine.layers.attention.Attention.forward`; positions don't matter.
        """
        qkv, gate, strength, decay, residual = self._project(norm, x, residual)
        qkv = causal_conv(qkv, self.conv, cache, meta)
        out = delta_rule(qkv, DeltaGates(strength, decay, self.log_rate, self.shift), cache, meta)
        if rows is not None:
            out, gate, residual = (part.index_select(0, rows) for part in (out, gate, residual))
        return self.out_proj(gated_norm(out, gate, self.norm.weight, self.norm.eps)), residual

    def _project(
        self, norm: RMSNorm, x: torch.Tensor | Unfinished, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Project ``norm(x + residual)``: queries, keys and values together, the norm's gate, the strengths,
        the decays; and ``x + residual``."""
        if self._projections is None:
            normed, total = norm.add(x, residual)
            both = self.in_proj_ba(normed).split(self.value_heads, dim=1)
            return self.in_proj_qkv(normed), self.in_proj_z(normed), *both, total
        projected, total = norm_linear(
            x, residual, norm.weight, norm.eps, self._projections, offset=norm.offset
        )
        return *projected.split(self._sizes, dim=1), total

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        """Describe the convolution and the gates' weights; the layers within describe their own."""
        heads = self.value_heads
        of_rank = (slice(self.tp.rank * heads, (self.tp.rank + 1) * heads),)
        gates = [
            WeightSlot(prefix + name, (heads * self.tp.size,), [(of_rank, parameter.data)])
            for name, parameter in (("A_log", self.log_rate), ("dt_bias", self.shift))
        ]
        return [conv_slot(prefix + "conv1d.weight", self.conv, self._qkv), *gates]
