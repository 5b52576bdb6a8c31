"""Tables of rotary embeddings, and the layer that applies them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from engine.kernels.kv_write import rotary_kv_write
from engine.layers.build import BuildContext
from engine.layers.decoder_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, *, length: int) -> torch.Tensor:
    """Angles per position, ``(rotary_dim / 2,)`` float32.

    ``default`` is ``theta^(-2i/d)``. ``llama3`` divides long wavelengths by ``factor`` and blends in between.
    ``longrope`` divides by ``long_factor`` if positions may reach ``length > original_max_position``, else by
    ``short_factor``: one choice for the life of the model, since keys rotated both ways can't share a cache.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    powers = rope.theta**exponents
    if rope.type == "longrope":
        assert rope.original_max_position is not None
        chosen = rope.long_factor if length > rope.original_max_position else rope.short_factor
        return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * powers)
    frequencies = 1.0 / powers
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    assert rope.original_max_position is not None
    old = rope.original_max_position
    wavelengths = 2 * math.pi / frequencies
    scaled = frequencies / rope.factor
    smooth = (old / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled + smooth * frequencies
    long, short = wavelengths > old / rope.low_freq_factor, wavelengths < old / rope.high_freq_factor
    return torch.where(long, scaled, torch.where(short, frequencies, blended))


def attention_factor(rope: RopeConfig, max_position: int) -> float:
    """What multiplies cos and sin: longrope's ``sqrt(1 + ln(s) / ln(original))`` with ``s`` the ratio of the
    model's longest context to the original, in short contexts as well; 1 elsewhere."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.type != "longrope":
        return 1.0
    assert rope.original_max_position is not None
    scale = max_position / rope.original_max_position
    return math.sqrt(1 + math.log(scale) / math.log(rope.original_max_position)) if scale > 1 else 1.0


class Rotary(nn.Module):
    """Rotates queries and keys by their positions, and puts keys and values into the cache.

    Holds float32 tables ``cos`` and ``sin`` of shape ``(length, rotary_dim / 2)``.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_position: int, length: int, build: BuildContext
    ) -> None:
        super().__init__()
        self.section = rope.mrope_section
        self.interleaved = rope.mrope_interleaved
        frequencies = inverse_frequencies(rope, rope.rotary_dim or head_dim, length=length)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        factor = attention_factor(rope, max_position)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", (angles.cos() * factor).to(build.device), persistent=False)
        self.register_buffer("sin", (angles.sin() * factor).to(build.device), persistent=False)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        slot_mapping: torch.Tensor,
    ) -> None:
        """``q (T, heads, head_dim)`` is rotated in place; ``k`` and ``v`` likewise go to their slots of
        ``cache``, ``k`` rotated and not to be used any more. Positions ``(T,)`` or ``(3, T)`` int64."""
        rotary_kv_write(
            q,
            k,
            v,
            positions,
            self.cos,
            self.sin,
            *cache,
            slot_mapping,
            **self.axes(positions),
        )

    def axes(self, positions: torch.Tensor) -> dict[str, Any]:
        """What kernels must know of the axes of ``positions``, ``(T,)`` or ``(3, T)``."""
        section = self.section if positions.dim() == 2 else None
        return {"mrope_section": section, "mrope_interleaved": self.interleaved}
