"""Upload and normalisation of images' bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from engine.errors import InvalidRequest
from engine.layers.build import BuildContext
from engine.prompt import MediaItem, PreparedMedia
from engine.transfers import upload_shared
from engine.vision.normalisation import Normalisation


class PixelInput(nn.Module):
    """Uploads uint8 images and normalises them by a table, which gives the same numbers as the processors of
    Transformers."""

    def __init__(self, normalisation: Normalisation, build: BuildContext) -> None:
        super().__init__()
        self.dtype, self.device = build.dtype, build.device
        table = torch.from_numpy(normalisation.table()).to(build.dtype)
        self.table: torch.Tensor
        self.offset: torch.Tensor
        self.register_buffer("table", table.flatten().to(build.device), persistent=False)
        offset = torch.arange(len(table)) * table.shape[1]
        self.register_buffer("offset", offset.to(build.device), persistent=False)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """Copy uint8 ``array`` to the device; see :func:`~engine.transfers.upload_shared`."""
        return upload_shared(array, self.device)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 ``(N, channels, n)`` to ``(N, channels * n)`` in the model's dtype."""
        return self.table[patches + self.offset[:, None]].flatten(1)

    def last(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 ``(N, n, channels)`` to ``(N, n * channels)`` in the model's dtype."""
        return self.table[patches + self.offset].flatten(1)


def blank(shape: tuple[int, ...], grid: tuple[int, ...], num_tokens: int) -> PreparedMedia:
    """A black image, with which encoders compile their kernels.

    Args:
        shape: of its pixels.
        grid: see :class:`engine.prompt.MediaItem`.
        num_tokens: embedding rows of the image.
    """
    item = MediaItem.of_rows("image", "blank", 0, num_tokens, grid=grid, size=(1, 1))
    return PreparedMedia(item, np.zeros(shape, np.uint8))


def check_pieces(
    entry: PreparedMedia,
    pieces: Sequence[tuple[int, int]],
    patch_shape: tuple[int, ...],
    num_tokens: int,
    *,
    side: int = 1,
) -> None:
    """Check that an item's pixels are the uint8 patches of its ``pieces``, one piece after the other.

    Args:
        pieces: ``(height, width)`` in patches of each; none if the grid isn't one.
        patch_shape: of the pixels of a patch.
        num_tokens: embedding rows of all pieces.
        side: sides of pieces are multiples of this many patches.

    Raises:
        InvalidRequest: they are not.
    """
    patches = sum(height * width for height, width in pieces)
    fits = (
        len(pieces) > 0
        and all(length > 0 and length % side == 0 for piece in pieces for length in piece)
        and entry.pixels.shape == (patches, *patch_shape)
        and entry.pixels.dtype == np.uint8
        and entry.item.num_tokens == num_tokens
    )
    if not fits:
        raise unfit(entry)


def unfit(entry: PreparedMedia) -> InvalidRequest:
    """Return the error for an item whose pixels, rows and grid contradict each other."""
    return InvalidRequest(
        f"{entry.pixels.dtype} pixels of shape {entry.pixels.shape} and {entry.item.num_tokens} rows "
        f"do not fit grid {entry.item.grid}",
        param="image",
    )
