"""The geometry of a frame of patches: their order, positions and segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.vision.native_config import NativeVisionConfig
from engine.vision.segments import VisionSegments, segments_of


@dataclass(frozen=True, slots=True)
class FramePlan:
    """The tower's inputs for a frame of ``h * w`` patches besides its pixels. Tensors on the tower's device.

    Attributes:
        patches: their number, ``h * w``.
        size: ``(h, w)``.
        angles: cosines and sines ``(h * w, head_dim / 2)`` float32 of the angles of a patch's row, then of
            its column, or the reverse; None if the tower rotates nothing.
        order: ``(h * w / merge²,)`` int64, the merged squares window by window; None if there are no windows.
        inverse: the permutation back to reading order.
        windows: patches in each window.
        alone: segments, and windows or None, of a batch that is this frame alone. The same objects every
            time, so that captured graphs needn't copy them again.
        taps: ``(h * w, 4 or 16)`` int64, rows of the position table to interpolate between; None without a
            table.
        weights: ``(h * w, 4 or 16)`` float32, their weights.
    """

    patches: int
    size: tuple[int, int]
    angles: tuple[torch.Tensor, torch.Tensor] | None
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    windows: tuple[int, ...]
    alone: tuple[VisionSegments, VisionSegments | None]
    taps: torch.Tensor | None
    weights: torch.Tensor | None


def plan_frame(config: NativeVisionConfig, h: int, w: int, device: torch.device) -> FramePlan:
    """The plan of a frame of ``h`` rows of ``w`` patches, both multiples of ``merge_size``."""
    merge = config.merge_size
    grid = np.arange(h * w).reshape(h // merge, merge, w // merge, merge)
    squares = grid.swapaxes(1, 2).reshape(-1, merge**2)
    order, inverse = None, None
    windows: tuple[int, ...] = ()
    if config.window is not None:
        cells, sizes = _windows(h // merge, w // merge, config.window)
        squares = squares[cells]
        order = torch.from_numpy(cells).to(device)
        inverse = torch.from_numpy(np.argsort(cells)).to(device)
        windows = tuple(int(size) * merge**2 for size in sizes)
    patches = torch.from_numpy(squares.reshape(-1))
    rows, columns = patches // w, patches % w
    taps, weights = None, None
    if config.position_side is not None:
        placed = (rows, h), (columns, w)
        if config.position_swapped:
            placed = (patches // h, w), (patches % h, h)
        taps, weights = _taps(config, *placed)
        taps, weights = taps.to(device), weights.to(device)
    angles, cos, sin = None, None, None
    if config.tower.rope_theta is not None:
        turns = _angles(config, rows, columns)
        angles = cos, sin = turns.cos().to(device), turns.sin().to(device)
    whole = segments_of([h * w], device, cos=cos, sin=sin, frames=((h, w),))
    alone = whole, segments_of(windows, device, cos=cos, sin=sin) if windows else None
    return FramePlan(h * w, (h, w), angles, order, inverse, windows, alone, taps, weights)


def _windows(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of a ``height * width`` grid, window by window and in reading order in each, and the number of
    cells of each window. Windows at the right and lower edges may be smaller.
    """
    across = -(-width // side)
    rows, columns = np.divmod(np.arange(height * width), width)
    window = rows // side * across + columns // side
    return np.argsort(window, kind="stable"), np.bincount(window)


def _angles(config: NativeVisionConfig, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Angles ``(N, head_dim / 2)`` float32: those of a patch's row and of its column, or the reverse."""
    theta, dim = config.tower.rope_theta, config.tower.head_dim
    assert theta is not None
    even = axis_frequencies(theta, dim, rows.device)
    odd = 1.0 / theta ** (torch.arange(2, dim, 4, dtype=torch.float32) / dim)
    of_columns = odd if config.tower.rope_alternates else even
    angles = [rows.float()[:, None] * even, columns.float()[:, None] * of_columns]
    return torch.cat(angles[::-1] if config.tower.rope_columns_first else angles, dim=1)


def axis_frequencies(theta: float, head_dim: int, device: torch.device) -> torch.Tensor:
    """The angles by which one step along an axis rotates its half of a head, float32 ``(head_dim / 4,)``: the
    even frequencies of a one-dimensional embedding of base ``theta``."""
    half = head_dim // 2
    return 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)


def _taps(config: NativeVisionConfig, *axes: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Taps and weights for the interpolation of the table of positions."""
    side = config.position_side
    assert side is not None
    if config.position_cubic:
        found = [_cubic_taps(side, (index.float() + 0.5) * side / size - 0.5) for index, size in axes]
    else:
        places = (_from_corners if config.position_corners else _from_edges)(side, axes)
        if not (config.position_zeros or config.position_corners):
            places = [place.clamp(0, side - 1) for place in places]
        found = [_axis_taps(side, place) for place in places]
    (row_taps, row_shares), (column_taps, column_shares) = found
    taps = row_taps[:, :, None] * side + column_taps[:, None]
    return taps.flatten(1), (row_shares[:, :, None] * column_shares[:, None]).flatten(1)


def _from_corners(side: int, axes: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """Places in the table: the first and the last patch lie on its first and last entry."""
    return [index.float() * (side - 1) / max(size - 1, 1) for index, size in axes]


def _from_edges(side: int, axes: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
    """Places in the table: patches and entries are intervals of one line, compared by their middles."""
    return [(index.float() + 0.5) * side / size - 0.5 for index, size in axes]


def _axis_taps(side: int, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    low = place.floor()
    share = place - low
    taps = torch.stack([low.long(), low.long() + 1], dim=1)
    # What lies outside counts nothing. The last position's own upper neighbour has a weight of 0 anyway.
    inside = (taps >= 0) & (taps < side)
    return taps.clamp(0, side - 1), torch.stack([1 - share, share], dim=1) * inside


def _cubic_taps(side: int, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Four taps by cubic convolution (Keys, 1981, with a = -0.75); those outside are the table's border."""
    low = place.floor()
    share, a = place - low, -0.75
    taps = torch.stack([(low.long() + step).clamp(0, side - 1) for step in (-1, 0, 1, 2)], dim=1)

    def near(x: torch.Tensor) -> torch.Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: torch.Tensor) -> torch.Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return taps, torch.stack([far(share + 1), near(share), near(1 - share), far(2 - share)], dim=1)
