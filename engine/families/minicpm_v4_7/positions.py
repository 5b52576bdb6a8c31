"""Positions on three axes (time, row, column) of MiniCPM-V 4.7: an image, or a video's frame, is a canvas.

Its overview is stretched over the canvas, its slices lie side by side on it, and the tokens around them stand
at their corners and edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.prompt import MediaSpan


@dataclass(frozen=True, slots=True)
class CanvasTokens:
    """The ids of the tokens that belong to an image: those that begin and end it and its slices, and the line
    feed between rows of slices."""

    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    line_feed: int

    @property
    def all(self) -> frozenset[int]:
        return frozenset((self.image_start, self.image_end, self.slice_start, self.slice_end, self.line_feed))


@dataclass(frozen=True, slots=True)
class _Frame:
    """An image, or a video's frame, in a prompt.

    Attributes:
        crops: ranges of tokens that take rows: of the overview, then of the slices.
        end: where the tokens behind the last crop end that belong to it.
        overview, piece: rows and columns of embedding rows of the overview and of a slice.
        rows, columns: of slices.
    """

    crops: list[tuple[int, int]]
    end: int
    overview: tuple[int, int]
    piece: tuple[int, int]
    rows: int
    columns: int

    @property
    def start(self) -> int:
        """The token that begins the image."""
        return self.crops[0][0] - 1

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width."""
        if not self.rows:
            return self.overview
        return self.rows * self.piece[0], self.columns * self.piece[1]


def canvas_positions(
    ids: Sequence[int], spans: Sequence[MediaSpan], side: int, tokens: CanvasTokens
) -> tuple[np.ndarray, int]:
    """Rotary positions of a prompt, as MiniCPM-V 4.7 defines them.

    Text advances all axes together. An image begins where text has arrived, and text goes on one behind the
    longer side of its canvas. Line feeds behind an image belong to it. Images with nothing else between them
    follow each other without text.

    Args:
        side: patches along the side of an embedding row.

    Returns:
        Positions ``(3, len(ids))`` int64, and the offset: the later token ``i`` has the position
        ``i + offset`` on all axes.
    """
    positions = np.empty((3, len(ids)), dtype=np.int64)
    index = current = 0
    for frame in _frames(ids, spans, side, tokens.all):
        if frame.start > index:
            text = frame.start - index
            positions[:, index : frame.start] = current + np.arange(text)
            current += text
        _place(positions, frame, current)
        current += max(frame.canvas) + 1
        index = frame.end
    positions[:, index:] = current + np.arange(len(ids) - index)
    return positions, int(positions.max()) + 1 - len(ids)


def _frames(ids: Sequence[int], spans: Sequence[MediaSpan], side: int, marks: frozenset[int]) -> list[_Frame]:
    frames = []
    for span in spans:
        crops = span.runs()
        height, width, rows, columns, piece_height, piece_width = (
            value // side if axis not in (2, 3) else value for axis, value in enumerate(span.item.grid[:6])
        )
        for first in range(0, len(crops), 1 + rows * columns):
            own = crops[first : first + 1 + rows * columns]
            end = own[-1][1]
            while end < len(ids) and ids[end] in marks:
                end += 1
            frames.append(_Frame(own, end, (height, width), (piece_height, piece_width), rows, columns))
    return frames


def _place(positions: np.ndarray, frame: _Frame, origin: int) -> None:
    """Write the positions of an image's tokens, relative to the canvas at ``origin``."""
    (first, *slices), (height, width) = frame.crops, frame.canvas
    positions[:, frame.start : frame.end] = origin
    # The token before an image stands outside the canvas.
    positions[1:, frame.start] = max(origin - 1, 0)
    if first[1] < frame.end:
        positions[1:, first[1]] = origin + height, origin + width
    down, along = (_stretched(*sizes) for sizes in zip(frame.canvas, frame.overview, strict=True))
    _fill(positions, first, origin, down, along)
    high, wide = frame.piece
    for number, (start, end) in enumerate(slices):
        row, column = divmod(number, frame.columns)
        top, left = row * high, column * wide
        positions[1:, start - 1] = origin + top, origin + left
        if end < frame.end:
            positions[1:, end] = origin + top + high - 1, origin + left + wide - 1
        _fill(positions, (start, end), origin, top + np.arange(high), left + np.arange(wide))
        if column == frame.columns - 1 and number + 1 < len(slices):
            # The line feed stands behind the right edge.
            lines = slice(end + 1, slices[number + 1][0] - 1)
            positions[1, lines], positions[2, lines] = origin + top + high - 1, origin + width


def _fill(
    positions: np.ndarray, crop: tuple[int, int], origin: int, down: np.ndarray, along: np.ndarray
) -> None:
    """Write a grid's positions row by row."""
    own = slice(*crop)
    positions[0, own] = origin
    positions[1, own] = origin + down.repeat(len(along))
    positions[2, own] = origin + np.tile(along, len(down))


def _stretched(length: int, count: int) -> np.ndarray:
    """``count`` places from the first to the last of ``length``, rounded to the nearest; halves to even.

    The arithmetic in float32, from both ends, is that of ``torch.linspace``.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    index, last = np.arange(count, dtype=np.float32), np.float32(length - 1)
    step = last / np.float32(count - 1)
    places = np.where(index < count // 2, index * step, last - step * (count - 1 - index))
    return np.rint(places).astype(np.int64)
