"""Tables of rotary embeddings."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from engine.kernels.rotary import RotaryTable
from engine.layers.build import BuildContext
from engine.layers.decoder_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, *, length: int | torch.Tensor) -> torch.Tensor:
    """Angles per position of a sequence of ``length`` tokens, ``(ceil(rotary_dim / 2),)`` float32.

    ``default`` is ``theta^(-2i/d)``, which ``linear`` divides by ``factor``. ``llama3`` divides long
    wavelengths by it, ``yarn`` those with few rotations over the original context, and both blend in between.
    ``dynamic`` raises ``theta`` for a ``length`` beyond the original context. ``longrope`` divides by
    ``long_factor`` if ``length`` is beyond it, else by ``short_factor``. ``proportional`` divides by
    ``factor`` and has 0 behind its first ``turning`` angles.

    Args:
        length: with ``dynamic`` also int64 ``(N, 1)``, for a row of frequencies per length.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    if rope.type == "dynamic":
        lengths = torch.as_tensor(length)
        return 1.0 / _dynamic_theta(rope, rotary_dim, lengths) ** exponents.to(lengths.device)
    powers = rope.theta**exponents
    if rope.type == "longrope":
        chosen = rope.long_factor if rope.variant(int(length)) else rope.short_factor
        return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * powers)
    if rope.type == "yarn":
        return _yarn(powers, rope, rotary_dim)
    frequencies = 1.0 / powers
    if rope.type in ("linear", "proportional"):
        frequencies = frequencies / rope.factor
    if rope.type == "proportional":
        frequencies[rope.turning :] = 0
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _dynamic_theta(rope: RopeConfig, rotary_dim: int, length: torch.Tensor) -> torch.Tensor:
    """NTK-aware scaling: float32, of the shape of ``length``."""
    original = rope.original_max_position
    assert original is not None
    ratio = rope.factor * length / original - (rope.factor - 1)
    # Exactly 1 for short sequences, whatever the rounding.
    ratio = torch.where(length > original, ratio, 1.0)
    return rope.theta * ratio ** (rotary_dim / (rotary_dim - 2))


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    assert rope.original_max_position is not None
    old = rope.original_max_position
    wavelengths = 2 * math.pi / frequencies
    scaled = frequencies / rope.factor
    smooth = (old / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled + smooth * frequencies
    long, short = wavelengths > old / rope.low_freq_factor, wavelengths < old / rope.high_freq_factor
    return torch.where(long, scaled, torch.where(short, frequencies, blended))


def _yarn(powers: torch.Tensor, rope: RopeConfig, rotary_dim: int) -> torch.Tensor:
    """YaRN (https://arxiv.org/abs/2309.00071, section 3.2).

    Angles with more than ``beta_fast`` rotations over the original context keep their frequency; those with
    less than ``beta_slow`` are divided by ``factor``.
    """
    original = rope.original_max_position
    assert original is not None

    def angle_with(rotations: float) -> float:
        wavelength = original / (rotations * 2 * math.pi)
        return rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = angle_with(rope.beta_fast), angle_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # Equal bounds make a step between two angles.
    span = high - low or 0.001
    scaled = ((torch.arange(len(powers), dtype=torch.float32) - low) / span).clamp(0, 1)
    return scaled / (rope.factor * powers) + (1 - scaled) / powers


class Rotary(nn.Module):
    """Rotary position embedding: rotates queries and keys by their positions.

    Holds float32 tables of cosines and sines, ``(rows, angles)``. Kernels look up a token's row; they call it
    its position. Row ``p`` belongs to position ``p`` of a short sequence, of any sequence if frequencies
    don't depend on its length. The others have rows of their own: see :meth:`offset` and
    :meth:`write_prompt_rows`.

    Attributes:
        table: the tables, as kernels take them.
        query_scale: ``(rows, 1, 1)``, factor of the queries of each row, in the model's dtype; None if there
            is none. See :attr:`~engine.layers.decoder_config.RopeConfig.query_growth`.
        first_prompt_row: the first of the rows that :meth:`reserve_prompt_rows` adds.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, length: int, build: BuildContext) -> None:
        super().__init__()
        self.rope = rope
        self._dim = rope.rotary_dim or head_dim
        self._long = self.first_prompt_row = 0
        angles = self._angles(torch.arange(length), 1)
        if rope.type == "longrope" and rope.variant(length):
            self._long = int(rope.original_max_position or 0)
            angles = torch.cat([angles[: self._long], self._angles(torch.arange(length), length)])
        elif rope.type == "dynamic":
            # A generated token's own position makes its sequence as long as it was then.
            positions = torch.arange(length)
            angles = self._angles(positions, positions[:, None] + rope.first_position + 1)
        cos, sin = (x * rope.attention_factor for x in (angles.cos(), angles.sin()))
        self.table = RotaryTable(
            cos.to(build.device),
            sin.to(build.device),
            rope.mrope_section,
            rope.mrope_interleaved,
            rope.adjacent,
        )
        row = self.table.cos[:1]
        self._still = torch.ones_like(row), torch.zeros_like(row)
        self.query_scale = None
        if rope.query_growth is not None:
            growth, step = rope.query_growth
            steps = torch.floor(torch.arange(length) / step)
            scale = 1 + growth * torch.log(1 + steps)
            self.query_scale = scale.to(build.device, build.dtype)[:, None, None]

    @property
    def still(self) -> RotaryTable:
        """Tables of angles of 0, with as many rows as ``table``, for positions along one axis."""
        cos, sin = (row.expand(len(self.table.cos), -1) for row in self._still)
        return RotaryTable(cos, sin, adjacent=self.rope.adjacent)

    def _angles(self, positions: torch.Tensor, length: int | torch.Tensor) -> torch.Tensor:
        # Frequencies that change within a sequence show where its positions begin.
        counted = positions + self.rope.first_position
        return counted[:, None].float() * inverse_frequencies(self.rope, self._dim, length=length)

    def offset(self, variant: int) -> int:
        """The row of position 0 for sequences of a :meth:`~RopeConfig.variant`; others follow in order.

        With ``dynamic`` this holds for generated tokens only.
        """
        return self._long if variant and self.rope.type == "longrope" else 0

    def reserve_prompt_rows(self, count: int) -> None:
        """Make room for ``count`` prompt tokens whose frequencies depend on their prompt's length (dynamic).

        Called before a captured graph refers to the tables; does nothing if there is room already.
        """
        if self.rope.type != "dynamic" or self.first_prompt_row:
            return
        cos, sin = self.table.cos, self.table.sin
        self.first_prompt_row = len(cos)
        room = cos.new_zeros((count, cos.shape[1]))
        self.table = replace(self.table, cos=torch.cat([cos, room]), sin=torch.cat([sin, room]))

    def write_prompt_rows(self, rows: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor) -> None:
        """Fill reserved ``rows (N,)`` for tokens at ``positions (N,)`` of prompts of ``lengths (N,)``.

        All int64.
        """
        angles = self._angles(positions, lengths[:, None])
        self.table.cos[rows] = angles.cos() * self.rope.attention_factor
        self.table.sin[rows] = angles.sin() * self.rope.attention_factor
