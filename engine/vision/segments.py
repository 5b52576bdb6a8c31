"""How a flat batch of visual tokens divides into what attends to each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class VisionSegments:
    """How a flat batch of ``N`` tokens divides into segments that don't see each other.

    Attributes:
        cu_seqlens: ``(segments + 1,)`` int32, where each segment begins.
        max_len: at least the tokens of the longest segment; a host integer.
        cos, sin: ``(N, head_dim / 2)`` float32 rotary tables, one row per token; None without rotary.
        positions: rows of the learned position table, int64, for all ``N`` tokens or for those of one image
            where all are alike; None takes the whole table in order for each image.
    """

    cu_seqlens: torch.Tensor
    max_len: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
