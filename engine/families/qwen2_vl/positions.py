"""Positions on three axes (time, row, column) for prompts with images and videos."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.prompt import MediaItem, MediaSpan


def grid_positions(
    num_tokens: int,
    spans: Sequence[MediaSpan],
    merge_size: int,
    *,
    tokens_per_second: float | None = None,
    frames_per_step: int = 1,
) -> tuple[np.ndarray, int]:
    """Rotary positions of a prompt, as Qwen2-VL defines them.

    Text advances all axes together. An item with the grid ``(t, h, w)`` in patches spreads over its own axes
    from the position that text has reached, and text continues after the longer of its sides ``h`` and ``w``,
    counted in merged squares, however many steps in time it has. If an item's placeholder holds text, each
    of its steps in time is an item of its own.

    Args:
        merge_size: side of a merged square in patches.
        tokens_per_second: positions per second of an item that has times; None: one position per step.
        frames_per_step: steps of a grid that rows are made of together; an image has one that stands for all.

    Returns:
        Positions ``(3, num_tokens)`` int64, and the offset: the later token ``i`` has the position
        ``i + offset`` on all axes. It is the position of text at this place, so an answer keeps its positions
        when it becomes part of the next prompt. A long video's last step may have a greater one.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    index = current = 0
    for span, offset, (t, h, w) in _grids(spans, merge_size, frames_per_step):
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
    return positions, current - index


def _grids(
    spans: Sequence[MediaSpan], merge_size: int, frames_per_step: int
) -> Iterator[tuple[MediaSpan, int, tuple[int, int, int]]]:
    """Each unbroken run of rows: its span, its first index in the prompt, and its grid in merged squares."""
    for span in spans:
        frames, h, w = span.item.grid
        t, h, w = -(-frames // frames_per_step), h // merge_size, w // merge_size
        if span.embed_index is None:
            yield span, span.offset, (t, h, w)
        else:
            for first in span.embed_index[:: h * w].tolist():
                yield span, span.offset + first, (1, h, w)


def _paced(item: MediaItem, tokens_per_second: float) -> np.ndarray:
    """Positions in time of an item's steps, computed in float32 as in the published model."""
    if len(item.times) < 2:
        return np.zeros(len(item.times), dtype=np.int64)
    interval = np.float32(tokens_per_second) * np.float32(item.times[1])
    return (np.arange(len(item.times), dtype=np.float32) * interval).astype(np.int64)
