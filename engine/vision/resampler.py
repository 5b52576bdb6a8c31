"""The resampler: learned queries attend over any number of features and give a fixed number of rows."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm

_NORM_EPS = 1e-6


class CrossAttention(nn.Module):
    """Attention of the same queries over several groups of keys.

    The weights have the names and shapes of those of torch's ``nn.MultiheadAttention``.
    """

    def __init__(self, width: int, num_heads: int, build: BuildContext) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = build.parameter(3 * width, width)
        self.in_proj_bias = build.parameter(3 * width)
        self.out_proj = Linear(width, width, build)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Attend with queries ``(Q, width)`` over keys and values ``(N, width)``: ``(groups, Q, width)``.

        Args:
            lengths: number of consecutive keys in each group; their sum is ``N``.
        """
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
            for x, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        keys, values = k.split(list(lengths), dim=1), v.split(list(lengths), dim=1)
        out = q.new_empty(len(lengths), *query.shape)
        # Groups of equal length are one batch, without padding or mask. An image has at most two lengths.
        for length in dict.fromkeys(lengths):
            members = [group for group, other in enumerate(lengths) if other == length]
            attended = F.scaled_dot_product_attention(
                q.expand(len(members), -1, -1, -1),
                torch.stack([keys[group] for group in members]),
                torch.stack([values[group] for group in members]),
            )
            out[members] = attended.transpose(1, 2).flatten(2)
        return self.out_proj(out)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [
            plain_slot(prefix + "in_proj_weight", self.in_proj_weight),
            plain_slot(prefix + "in_proj_bias", self.in_proj_bias),
        ]


class Resampler(nn.Module):
    """MiniCPM-V's connector: every piece of ``height * width`` features becomes ``num_queries`` rows.

    Keys, but not values, carry the sines and cosines of a feature's column and row.

    Args:
        in_features: width of the tower's features.
        out_features: width of the rows, a multiple of 4 and of ``num_heads``.
    """

    def __init__(
        self, num_queries: int, in_features: int, out_features: int, num_heads: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.query = build.parameter(num_queries, out_features)
        self.kv_proj = (
            Linear(in_features, out_features, build, bias=False) if in_features != out_features else None
        )
        self.attn = CrossAttention(out_features, num_heads, build)
        self.ln_q, self.ln_kv, self.ln_post = (LayerNorm(out_features, _NORM_EPS, build) for _ in range(3))
        self.proj = build.parameter(out_features, out_features)
        self._axis = lru_cache(maxsize=128)(
            lambda length: sine_positions(length, out_features // 2).to(build.device, build.dtype)
        )

    def forward(self, features: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows ``(pieces, num_queries, out_features)`` from features ``(N, in_features)``.

        Args:
            features: those of each piece row by row, piece after piece.
            sizes: height and width of each piece in patches.
        """
        x = self.ln_kv(features if self.kv_proj is None else self.kv_proj(features))
        positions = {size: self._positions(*size) for size in dict.fromkeys(sizes)}
        keys = x + torch.cat([positions[size] for size in sizes])
        rows = self.attn(self.ln_q(self.query), keys, x, [height * width for height, width in sizes])
        return self.ln_post(rows) @ self.proj

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Positions ``(height * width, out_features)``: the column's half, then the row's."""
        columns = self._axis(width).expand(height, -1, -1)
        rows = self._axis(height)[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=2).flatten(0, 1)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "query", self.query), plain_slot(prefix + "proj", self.proj)]


def sine_positions(length: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sinusoidal embeddings of the positions 0 to ``length - 1``: ``(length, width)``, computed in ``dtype``.

    With ``p`` the position, the first half is ``sin(p / 10000 ** (2i / width))``, the second the cosines.
    """
    exponents = torch.arange(width // 2, dtype=dtype) / (width / 2)
    angles = torch.arange(length, dtype=dtype)[:, None] * (1.0 / 10000**exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
