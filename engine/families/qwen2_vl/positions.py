"""Positions on three axes (time, row, column) for prompts with pictures and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.prompt import MediaItem, MediaSpan


def grid_positions(
    num_tokens: int, spans: Sequence[MediaSpan], merge_size: int, *, tokens_per_second: float | None = None
) -> tuple[np.ndarray, int]:
    """Positions ``(3, num_tokens)`` int64 and the offset of later tokens, as Qwen2-VL defines them.

    Text counts on along all axes. An item with grid ``(t, h, w)`` in patches spreads over its own axes from
    where the text stopped, and text goes on after its longer spatial side, measured in rows of embeddings.
    Where an item's placeholder holds text, each step in time is an item of its own.

    Args:
        tokens_per_second: positions in time that a second takes, for items that have times; None: each step
            in time takes one.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    index = current = 0
    for span, offset, (t, h, w) in _grids(spans, merge_size):
        text = offset - index
        positions[:, index:offset] = current + np.arange(text)
        current += text
        index = offset + t * h * w
        own = np.indices((t, h, w)).reshape(3, -1)
        if tokens_per_second is not None and span.item.times:
            own[0] = _paced(span.item, tokens_per_second).repeat(h * w)
        positions[:, offset:index] = current + own
        current += max(h, w)
    positions[:, index:] = current + np.arange(num_tokens - index)
    return positions, (int(positions.max()) + 1 - num_tokens) if num_tokens else 0


def _grids(
    spans: Sequence[MediaSpan], merge_size: int
) -> Iterator[tuple[MediaSpan, int, tuple[int, int, int]]]:
    """Each unbroken run of rows: its span, where it begins in the prompt, and its grid in rows."""
    for span in spans:
        t, h, w = span.item.grid[0], span.item.grid[1] // merge_size, span.item.grid[2] // merge_size
        if span.embed_index is None:
            yield span, span.offset, (t, h, w)
        else:
            for first in span.embed_index[:: h * w].tolist():
                yield span, span.offset + first, (1, h, w)


def _paced(item: MediaItem, tokens_per_second: float) -> np.ndarray:
    """Positions in time of an item's steps, in the published model's float32."""
    if len(item.times) < 2:
        return np.zeros(len(item.times), dtype=np.int64)
    interval = np.float32(tokens_per_second) * np.float32(item.times[1])
    return (np.arange(len(item.times), dtype=np.float32) * interval).astype(np.int64)
