"""The blocks of Gemma 4's tower: norms before and after attention and MLP, and linear layers with bounds."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn

from engine.kernels.act_mul import act_mul
from engine.kernels.dispatch import vision_attention
from engine.kernels.rotary import RotaryTable, rotary
from engine.kernels.shares import part_counters
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm, UnitNorm
from engine.vision.segments import VisionSegments
from engine.vision.transformer_config import VisionConfig

_BOUNDS = ("input_min", "input_max", "output_min", "output_max")


class BoundedLinear(Linear):
    """A linear layer without bias, whose inputs and outputs may be cut to bounds of the checkpoint.

    Args:
        bounded: they are.
    """

    input_min: torch.Tensor
    input_max: torch.Tensor
    output_min: torch.Tensor
    output_max: torch.Tensor

    def __init__(self, in_features: int, out_features: int, build: BuildContext, *, bounded: bool) -> None:
        super().__init__(in_features, out_features, build, bias=False)
        for name in _BOUNDS if bounded else ():
            self.register_parameter(name, build.parameter(1))
        self.bounded = bounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if not self.bounded:
            return super().forward(x)
        out = super().forward(x.clamp(self.input_min, self.input_max))
        return out.clamp(self.output_min, self.output_max)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        bounds = _BOUNDS if self.bounded else ()
        slots = [plain_slot(prefix + name, self.get_parameter(name)) for name in bounds]
        return [*super().weight_slots(prefix, names), *slots]


class SandwichAttention(nn.Module):
    """Full attention within each segment, of normalised queries, keys and values, without a scale."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            BoundedLinear(width, width, build, bounded=config.bounded) for _ in range(4)
        )
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.norm_eps, build, offset=0.0) for _ in range(2)
        )
        self.v_norm = UnitNorm(self.head_dim, config.norm_eps, build)
        self.counters: torch.Tensor
        self.register_buffer("counters", part_counters(build.device), persistent=False)

    def forward(self, x: torch.Tensor, segments: VisionSegments, index: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``(N, width)`` to what is added to it.

        Args:
            index: int ``(N,)``, the row of each token in the tables of ``segments``.
        """
        q, k, v = (
            norm(project(x).unflatten(-1, (-1, self.head_dim)))
            for project, norm in (
                (self.q_proj, self.q_norm),
                (self.k_proj, self.k_norm),
                (self.v_proj, self.v_norm),
            )
        )
        # Each half of a head rotates by itself: the first by the angles of a patch's column.
        assert segments.cos is not None and segments.sin is not None
        angles, half = self.head_dim // 4, self.head_dim // 2
        for part in range(2):
            own = slice(part * angles, (part + 1) * angles)
            table = RotaryTable(segments.cos[:, own], segments.sin[:, own])
            turned = slice(part * half, (part + 1) * half)
            rotary(q[..., turned], k[..., turned], index, table)
        out = vision_attention(
            q, k, v, segments.cu_seqlens, max_len=segments.max_len, scale=1.0, counters=self.counters
        )
        return self.o_proj(out.flatten(1))


class SandwichMLP(nn.Module):
    """Computes ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.activation = config.activation
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = BoundedLinear(*sizes, build, bounded=config.bounded)
        self.up_proj = BoundedLinear(*sizes, build, bounded=config.bounded)
        self.down_proj = BoundedLinear(*sizes[::-1], build, bounded=config.bounded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
        return self.down_proj(act_mul(both, self.activation))


class SandwichBlock(nn.Module):
    """Attention and MLP, each between two norms; see :class:`engine.vision.transformer.VisionBlock`."""

    def __init__(self, config: VisionConfig, build: BuildContext) -> None:
        super().__init__()
        self.norm1, self.attention_out_norm, self.norm2, self.mlp_out_norm = (
            RMSNorm(config.hidden_size, config.norm_eps, build, offset=0.0) for _ in range(4)
        )
        self.attn = SandwichAttention(config, build)
        self.mlp = SandwichMLP(config, build)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        segments: VisionSegments,
        index: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert index is not None
        normed, residual = self.norm1.add(x, residual)
        attended = self.attention_out_norm(self.attn(normed, segments, index))
        normed, residual = self.norm2.add(attended, residual)
        return self.mlp_out_norm(self.mlp(normed)), residual
