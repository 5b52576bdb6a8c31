"""MiniCPM-V's images: sliced, resized and cut into patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ImagesOnly, ModelConfig, SizedImages
from engine.families.minicpm_v.config import SliceVisionConfig, pieces
from engine.families.parsing.processor import count_option, lowered, request_options
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.prompt import PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

_BICUBIC = 3
_MAX_SLICES = 64


def slice_grid(size: tuple[int, int], resolution: int, max_slices: int) -> tuple[int, int]:
    """Rows and columns of slices for an image of ``(width, height)`` pixels.

    The number of slices is about the image's area divided by that of a square with sides of ``resolution``
    pixels; rows and columns fit its aspect ratio. 0 and 0 if one square covers the area. Of two grids that
    fit equally well the one with fewer columns is taken, as in the published processor.
    """
    width, height = size
    wanted = min(math.ceil(width * height / resolution**2), max_slices)
    if wanted <= 1:
        return 0, 0
    grids = [
        (count // columns, columns)
        for count in (wanted - 1, wanted, wanted + 1)
        if 1 < count <= max_slices
        for columns in range(1, count + 1)
        if count % columns == 0
    ]
    ratio = math.log(width / height)
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[1] / grid[0])))


def fit(size: tuple[int, int], resolution: int, patch: int) -> tuple[int, int]:
    """Height and width in patches of an image of ``(width, height)`` pixels, resized to about the area of a
    square with sides of ``resolution`` pixels.

    The arithmetic, with the width computed from the truncated height, is the published processor's.
    """
    ratio = size[0] / size[1]
    height = int(resolution / math.sqrt(ratio))
    width = int(height * ratio)
    return max(round(height / patch), 1), max(round(width / patch), 1)


def sliced_grid(
    size: tuple[int, int], resolution: int, most: int, fitted: Callable[[tuple[int, int]], tuple[int, int]]
) -> tuple[int, ...]:
    """The grid (:func:`engine.families.minicpm_v.config.pieces`) of an image of ``(width, height)`` pixels.

    Args:
        most: most slices.
        fitted: height and width in patches of an image, or a slice, of ``(width, height)`` pixels.
    """
    rows, columns = slice_grid(size, resolution, most)
    if not rows:
        return (*fitted(size), 0, 0, 0, 0)
    # A slice's share of the image once the image's sides are multiples of the grid's, then its own size.
    share = (max(round(size[0] / columns), 1), max(round(size[1] / rows), 1))
    return (*fitted(size), rows, columns, *fitted(share))


def cut(
    image: Image.Image, piece: tuple[int, int], grid: tuple[int, int], patch: int, resample: int
) -> np.ndarray:
    """Resize an image to ``grid`` (rows and columns) of pieces (height and width in patches) and cut it into
    patches: uint8 ``(rows, columns, height, width, 3, patch, patch)``."""
    (height, width), (rows, columns) = piece, grid
    pixels = resize(image, (columns * width * patch, rows * height * patch), resample)
    return pixels.reshape(rows, height, patch, columns, width, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)


@dataclass(frozen=True, slots=True)
class MiniCPMVProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are those of
    :func:`engine.families.minicpm_v.config.pieces`.

    Attributes:
        resolution: side in pixels of a square with the area of the overview and of each slice.
        patch: side of a patch in pixels.
        rows: embedding rows for each of them.
        image_token_id: the token that rows replace.
        max_slices: most slices of an image.
    """

    resolution: int
    patch: int
    rows: int
    image_token_id: int
    max_slices: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MiniCPMVProcessor:
        """The checkpoint's processor with the option ``max_slice_nums``."""
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, SliceVisionConfig) and config.image_token_id is not None
        wanted = {
            "patch_size": vision.patch_size,
            "image_feature_size": vision.num_queries,
            "slice_mode": True,
        }
        for field, value in wanted.items():
            if raw.get(field, value) != value:
                raise CheckpointError(
                    f"preprocessor_config.json: {field} should be {value}, not {raw[field]!r}", param=field
                )
        slices = count_option(options, "max_slice_nums", raw.get("max_slice_nums", 9), _MAX_SLICES)
        resolution = raw.get("scale_resolution", 448)
        return cls(resolution, vision.patch_size, vision.num_queries, config.image_token_id, slices)

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of an image of ``(width, height)`` pixels."""
        fitted = partial(fit, resolution=self.resolution, patch=self.patch)
        return sliced_grid(size, self.resolution, self.max_slices, fitted)

    def check(self, size: tuple[int, int]) -> int:
        return len(pieces(self.grid(size))) * self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        height, width, rows, columns, slice_height, slice_width = grid
        parts = [cut(image, (height, width), (1, 1), self.patch, _BICUBIC)]
        if rows:
            parts.append(cut(image, (slice_height, slice_width), (rows, columns), self.patch, _BICUBIC))
        patches = np.concatenate([part.reshape(-1, 3, self.patch**2) for part in parts])
        options = {"rows": self.rows, "grid": list(grid)}
        key = content_hash(patches, family="minicpm_v", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), patches)

    def with_options(self, options: Mapping[str, Any]) -> MiniCPMVProcessor:
        options = request_options(options, "max_slice_nums")
        return replace(self, max_slices=lowered(options, "max_slice_nums", self.max_slices))

    def low_detail(self) -> MiniCPMVProcessor:
        return replace(self, max_slices=1)
