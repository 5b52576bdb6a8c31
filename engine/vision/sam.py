"""The tower of Segment Anything: windows, positions relative to a query, and convolutions behind the blocks.

Its images are squares of few sizes, so a flat batch of patches is as many grids of ``side`` by ``side``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.fp8 import RoundedRows
from engine.kernels.grid_attention import grid_attention
from engine.layers.build import BuildContext, WeightSlot, plain_slot
from engine.layers.linear import Linear, qkv_linear
from engine.layers.matrix_formats import Formats
from engine.layers.mlp import MLP
from engine.layers.norm import LayerNorm
from engine.vision.sam_config import SamConfig
from engine.vision.view_graphs import Stage

#: Of the norms behind the blocks, whatever the configuration states.
_NECK_NORM_EPS = 1e-6
#: Blocks of a stage.
_BLOCKS = 4

#: The hidden states ``(N, hidden_size)`` and the residual between two blocks.
_State = tuple[torch.Tensor, torch.Tensor | None]


class SamAttention(nn.Module):
    """Attention within each image, or within windows of it.

    Args:
        window: side of a window in patches; None attends over whole images.
    """

    def __init__(self, config: SamConfig, window: int | None, build: BuildContext) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window = config.num_heads, config.head_dim, window
        self.qkv = qkv_linear(
            config.hidden_size,
            config.num_heads,
            config.num_heads,
            config.head_dim,
            replace(build, formats=Formats(every=build.tower)),
            bias=config.qkv_bias,
            fused_name="qkv",
        )
        self.proj = Linear(config.hidden_size, config.hidden_size, build, stored=build.tower)
        length = 2 * (window or config.grid_side) - 1
        self.rel_pos_h, self.rel_pos_w = (
            build.parameter(length, config.head_dim) if config.relative_positions else None for _ in range(2)
        )
        # Made after loading, by the side of what they are for.
        self._tables: dict[int, torch.Tensor] = {}

    def forward(self, x: torch.Tensor | RoundedRows, side: int) -> torch.Tensor:
        """Map the patches ``(N, hidden_size)`` of images of ``side`` by ``side`` to as many outputs."""
        q, k, v = self.qkv(x).unflatten(-1, (3 * self.heads, self.head_dim)).split(self.heads, dim=1)
        # Places of a window without a patch count as patches of zeros, whose keys and values are the biases.
        empty = None
        if self.qkv.bias is not None:
            _, keys, values = self.qkv.bias.view(3, self.heads, self.head_dim)
            empty = keys, values
        window = self.window or side
        out = grid_attention(
            q, k, v, self._table(window), empty, side=side, window=window, scale=self.head_dim**-0.5
        )
        return self.proj(out.flatten(1))

    def _table(self, window: int) -> torch.Tensor | None:
        """The table of :func:`~engine.kernels.grid_attention.grid_attention`, stretched where it was made for
        larger images."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return None
        if window not in self._tables:
            halves: list[torch.Tensor] = [self.rel_pos_h, self.rel_pos_w]
            length = 2 * window - 1
            if len(halves[0]) != length:
                halves = [F.interpolate(half.T[None], size=length, mode="linear")[0].T for half in halves]
            table = torch.cat(halves)
            self._tables[window] = F.pad(table, (0, 0, 0, -len(table) % 8))
        return self._tables[window]

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        tables = {"rel_pos_h": self.rel_pos_h, "rel_pos_w": self.rel_pos_w}
        return [plain_slot(prefix + name, table) for name, table in tables.items() if table is not None]


class SamBlock(nn.Module):
    """Pre-norm attention and MLP. The residual is passed beside the hidden states, as in the decoder."""

    def __init__(self, config: SamConfig, window: int | None, build: BuildContext) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.attn = SamAttention(config, window, build)
        self.norm2 = LayerNorm(config.hidden_size, config.norm_eps, build)
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, config.activation, build, stored=build.tower
        )

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, side: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = self.attn.qkv.takes_rounded(x)
        normed, residual = (self.norm1.add_rounded if rounded else self.norm1.add)(x, residual)
        attended = self.attn(normed, side)
        rounded = self.mlp.takes_rounded(attended)
        normed, residual = (self.norm2.add_rounded if rounded else self.norm2.add)(attended, residual)
        return self.mlp(normed), residual


class Convolution(nn.Module):
    """A convolution of 3 by 3 without bias, over images ``(views, channels, height, width)``."""

    def __init__(self, channels: int, out: int, build: BuildContext, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight = build.parameter(out, channels, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, stride=self.stride, padding=1)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [plain_slot(prefix + "weight", self.weight)]


class SamTower(nn.Module):
    """Computes features ``(views, rows, out_features)`` from flat patches ``(views * side², 3 * patch²)``.

    Attributes:
        pause: called between stages, each of which keeps the device busy for some time.
    """

    def __init__(self, config: SamConfig, build: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.pause: Callable[[], None] = lambda: None
        width, side = config.hidden_size, config.grid_side
        self.patch_embed = Linear(3 * config.patch_size**2, width, build)
        self.position_embedding = build.parameter(1, side, side, width) if config.learned_positions else None
        self.blocks = nn.ModuleList(
            SamBlock(config, None if layer in config.full_layers else config.window, build)
            for layer in range(config.num_layers)
        )
        self.neck_in = Linear(width, config.neck, build, bias=False)
        self.neck_norm1 = LayerNorm(config.neck, _NECK_NORM_EPS, build)
        self.neck_conv = Convolution(config.neck, config.neck, build)
        self.neck_norm2 = LayerNorm(config.neck, _NECK_NORM_EPS, build)
        first, second = config.reduced
        self.reduce1 = Convolution(config.neck, first, build, stride=2)
        self.reduce2 = Convolution(first, second, build, stride=2)
        self._positions: dict[int, torch.Tensor] = {}

    def stages(self, side: int) -> list[Stage]:
        """The parts of a pass over images of ``side`` by ``side`` patches: the first takes patches, the last
        returns features."""
        count = len(self.blocks)
        ends = [*range(_BLOCKS, count, _BLOCKS), count]
        return [partial(self._part, first, end, side) for first, end in pairwise([0, *ends])]

    def _part(self, first: int, end: int, side: int, given: Any) -> Any:
        """Run the blocks from ``first`` to before ``end``, and what comes before the first and behind the
        last of all."""
        state: _State = given if first else (self._embed(given, side), None)
        for block in self.blocks[first:end]:
            state = block(*state, side)
        if end < len(self.blocks):
            return state
        x, residual = state
        return self._reduce((x if residual is None else x + residual).view(-1, side, side, x.shape[-1]))

    def _embed(self, patches: torch.Tensor, side: int) -> torch.Tensor:
        x = self.patch_embed(patches)
        if self.position_embedding is None:
            return x
        return (x.view(-1, side, side, x.shape[-1]) + self._positions_of(side)).flatten(0, 2)

    def _positions_of(self, side: int) -> torch.Tensor:
        """The positions ``(1, side, side, hidden_size)``, stretched in float32 where ``side`` isn't that of
        the table."""
        table = self.position_embedding
        assert table is not None
        if side == table.shape[1]:
            return table
        if side not in self._positions:
            stretched = F.interpolate(
                table.permute(0, 3, 1, 2).float(), size=(side, side), mode="bicubic", antialias=True
            )
            self._positions[side] = stretched.to(table.dtype).permute(0, 2, 3, 1).contiguous()
        return self._positions[side]

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Neck and convolutions: from ``(views, side, side, hidden_size)`` to features."""
        x = self.neck_norm1(self.neck_in(x)).permute(0, 3, 1, 2)
        x = self.neck_norm2(self.neck_conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.reduce2(self.reduce1(x)).flatten(2).transpose(1, 2).contiguous()

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        table = self.position_embedding
        return [] if table is None else [plain_slot(prefix + "position_embedding", table)]
