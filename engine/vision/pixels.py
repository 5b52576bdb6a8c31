"""Bytes of pictures on their way to a tower: to the device, and normalised there."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from engine.layers.build import BuildContext
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.normalisation import Normalisation


class Pixels(nn.Module):
    """Uploads and normalises uint8 pictures by table, which gives the very numbers of the CPU processors."""

    def __init__(self, normalisation: Normalisation, build: BuildContext) -> None:
        super().__init__()
        self.dtype, self.device = build.dtype, build.device
        table = torch.from_numpy(normalisation.table()).to(build.dtype)
        self.table: torch.Tensor
        self.offset: torch.Tensor
        self.register_buffer("table", table.flatten().to(build.device), persistent=False)
        offset = torch.arange(len(table)) * table.shape[1]
        self.register_buffer("offset", offset.to(build.device), persistent=False)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        """``array`` on the device; it may be read-only and shared, and is copied before this returns."""
        # Pinned memory lets the copy to a GPU run beside its work.
        staged = torch.empty(array.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        staged.numpy()[...] = array
        return staged.to(self.device, non_blocking=True)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """uint8 ``(N, channels, n)`` to normalised ``(N, channels * n)`` in the model's dtype."""
        return self.table[patches + self.offset[:, None]].flatten(1)


def blank(shape: tuple[int, ...], grid: tuple[int, ...], num_tokens: int) -> PreparedMedia:
    """A black picture of so many rows, for which an encoder needs the same kernels as for any other.

    Args:
        shape: of its pixels.
        grid: see :class:`engine.prompt.MediaItem`.
    """
    item = MediaItem.of_rows("image", "blank", 0, num_tokens, grid=grid, size=(1, 1))
    return PreparedMedia(item, np.zeros(shape, np.uint8))
