"""Positions on three axes (time, row, column) for prompts with pictures and videos."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.inputs.prompt import MediaSpan


def grid_positions(num_tokens: int, spans: Sequence[MediaSpan], merge_size: int) -> tuple[np.ndarray, int]:
    """Positions ``(3, num_tokens)`` int64 and the offset of later tokens, as Qwen2-VL defines them.

    Text counts on along all axes. An item with grid ``(t, h, w)`` in patches spreads over its own axes from
    where the text stopped, and text goes on after its longer spatial side, measured in rows of embeddings.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    index = current = 0
    for span in spans:
        text = span.offset - index
        positions[:, index : span.offset] = current + np.arange(text)
        current += text
        t, h, w = span.item.grid[0], span.item.grid[1] // merge_size, span.item.grid[2] // merge_size
        index = span.offset + span.length
        positions[:, span.offset : index] = current + np.indices((t, h, w)).reshape(3, -1)
        current += max(h, w)
    positions[:, index:] = current + np.arange(num_tokens - index)
    return positions, (int(positions.max()) + 1 - num_tokens) if num_tokens else 0
