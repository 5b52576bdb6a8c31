"""The segments of a flat batch of visual tokens: tokens attend within their segment only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class VisionSegments:
    """Segments of a flat batch of ``N`` tokens.

    Attributes:
        cu_seqlens: ``(segments + 1,)`` int32, the first token of each segment, and ``N``.
        max_len: an upper bound of the longest segment's length, in tokens; on the host.
        cos, sin: ``(N, head_dim / 2)`` float32 rotary tables with a row per token; None without rotary
            embeddings.
        positions: int64 rows of the learned position table, for all ``N`` tokens or, if all images are alike,
            for those of one image; None takes the whole table in order for each image.
        frames: ``(rows, columns)`` in patches of each segment, for towers that convolve; else empty.
    """

    cu_seqlens: torch.Tensor
    max_len: int
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    frames: tuple[tuple[int, int], ...] = ()


def segments_of(
    lengths: Sequence[int],
    device: torch.device,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    frames: tuple[tuple[int, int], ...] = (),
) -> VisionSegments:
    """Return consecutive segments of ``lengths`` tokens on ``device``, see :class:`VisionSegments`."""
    starts = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return VisionSegments(starts.to(device, non_blocking=True), max(lengths), cos, sin, positions, frames)
