"""The geometry of one frame of patches: in which order they go, where they are, what they attend within."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.vision.native_config import NativeVisionConfig
from engine.vision.segments import VisionSegments


@dataclass(frozen=True, slots=True)
class FramePlan:
    """What a frame of ``h * w`` patches needs besides its pixels. Tensors on the tower's device.

    Attributes:
        cos, sin: ``(h * w, head_dim / 2)`` float32, angles of the row, then of the column.
        order: ``(h * w / merge²,)`` int64, the merged squares window by window; None where there are no
            windows.
        inverse: back to reading order.
        windows: patches in each window.
        alone: what the tower attends within where this frame is the whole batch: segments, and windows or
            None. The same objects every time.
        taps: ``(h * w, 4)`` int64, rows of the position table that a patch lies between; None without table.
        weights: ``(h * w, 4)`` float32, their shares.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    windows: tuple[int, ...]
    alone: tuple[VisionSegments, VisionSegments | None]
    taps: torch.Tensor | None
    weights: torch.Tensor | None


def plan_frame(config: NativeVisionConfig, h: int, w: int, device: torch.device) -> FramePlan:
    """The plan of a frame of ``h`` rows of ``w`` patches, both multiples of the merged square's side."""
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
    angles = _angles(config, rows, columns)
    taps, weights = None, None
    if config.position_side is not None:
        taps, weights = _taps(config.position_side, (rows, h), (columns, w))
        taps, weights = taps.to(device), weights.to(device)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    alone = segments_of([h * w], cos, sin), segments_of(windows, cos, sin) if windows else None
    return FramePlan(cos, sin, order, inverse, windows, alone, taps, weights)


def segments_of(lengths: Sequence[int], cos: torch.Tensor, sin: torch.Tensor) -> VisionSegments:
    """Consecutive segments of ``lengths`` patches, with the rotary tables of all."""
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    return VisionSegments(cu_seqlens.to(cos.device, non_blocking=True), max(lengths), cos, sin)


def _windows(height: int, width: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of a ``height * width`` grid window by window, each in reading order, and each window's cells.

    Windows at the right and lower edges hold what is left.
    """
    across = -(-width // side)
    rows, columns = np.divmod(np.arange(height * width), width)
    window = rows // side * across + columns // side
    return np.argsort(window, kind="stable"), np.bincount(window)


def _angles(config: NativeVisionConfig, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    theta, half = config.tower.rope_theta, config.tower.head_dim // 2
    assert theta is not None
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    return torch.cat([axis.float()[:, None] * frequencies for axis in (rows, columns)], dim=1)


def _taps(side: int, *axes: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear interpolation of a ``side * side`` table with its corners on the frame's corners."""
    (row_taps, row_shares), (column_taps, column_shares) = (_axis_taps(side, *axis) for axis in axes)
    taps = row_taps[:, :, None] * side + column_taps[:, None]
    return taps.flatten(1), (row_shares[:, :, None] * column_shares[:, None]).flatten(1)


def _axis_taps(side: int, index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    place = index.float() * (side - 1) / max(size - 1, 1)
    low = place.floor()
    share = place - low
    # The last place has nothing beyond it, and needs nothing.
    taps = torch.stack([low.long(), (low.long() + 1).clamp(max=side - 1)], dim=1)
    return taps, torch.stack([1 - share, share], dim=1)
