"""How MiniCPM-V's pictures are sliced, resized and cut into patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import ModelConfig
from engine.families.described import SIZE_FIELD, described_size
from engine.families.minicpm_v.config import SliceVisionConfig, pieces
from engine.media.image_ops import check_aspect_ratio, content_hash, resize
from engine.prompt import MediaItem, PlaceholderRun, PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

_BICUBIC = 3
_MAX_SLICES = 64


def slice_grid(size: tuple[int, int], resolution: int, max_slices: int) -> tuple[int, int]:
    """Rows and columns of slices for a picture of ``(width, height)`` pixels: about as many as squares of
    ``resolution`` pixels cover its area, with its aspect ratio; 0 and 0 where one square does.

    Of two that fit equally well it is the one with fewer columns, as in the published processor.
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
    """Height and width in patches for a picture of ``(width, height)`` pixels, at about the area of a square
    of ``resolution`` pixels.

    The arithmetic, with the width taken from the truncated height, is that of the published processor.
    """
    ratio = size[0] / size[1]
    height = int(resolution / math.sqrt(ratio))
    width = int(height * ratio)
    return max(round(height / patch), 1), max(round(width / patch), 1)


@dataclass(frozen=True, slots=True)
class MiniCPMVProcessor:
    """See :class:`engine.families.base.MediaProcessor` and ``EmbeddingProcessor`` there. Pixels are patches;
    grids are those of :func:`engine.layers.slice_vision_config.pieces`.

    Attributes:
        resolution: side in pixels of a square that has the area of the overview and of each slice.
        patch: side of a patch in pixels.
        rows: embedding rows for each of them.
        max_slices: most slices of one picture.
    """

    resolution: int
    patch: int
    rows: int
    image_token_id: int
    max_slices: int

    @classmethod
    def create(
        cls, raw: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]
    ) -> MiniCPMVProcessor:
        """From preprocessor_config.json with the user's options over it."""
        vision: SliceVisionConfig = config.vision
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
        max_slices = raw.get("max_slice_nums", 9)
        for name, value in options.items():
            where = f"mm_processor_kwargs.{name}"
            if name != "max_slice_nums":
                raise ConfigError(
                    f"mm_processor_kwargs: unknown option {name!r}; known is max_slice_nums", param=where
                )
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_SLICES:
                raise ConfigError(
                    f"mm_processor_kwargs: {name} should be 1 to {_MAX_SLICES}; got {value!r}", param=where
                )
            max_slices = value
        assert config.image_token_id is not None
        resolution = raw.get("scale_resolution", 448)
        return cls(resolution, vision.patch_size, vision.num_queries, config.image_token_id, max_slices)

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of a picture of ``(width, height)`` pixels.

        Raises:
            InvalidRequest: it is too elongated.
        """
        check_aspect_ratio(size)
        rows, columns = slice_grid(size, self.resolution, self.max_slices)
        overview = fit(size, self.resolution, self.patch)
        if not rows:
            return (*overview, 0, 0, 0, 0)
        # What one slice has of the picture once its sides are multiples of the grid's, then its own size.
        share = (max(round(size[0] / columns), 1), max(round(size[1] / rows), 1))
        return (*overview, rows, columns, *fit(share, self.resolution, self.patch))

    def check(self, size: tuple[int, int]) -> int:
        return len(pieces(self.grid(size))) * self.rows

    @property
    def embedding_field(self) -> str:
        return SIZE_FIELD

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        return self.check(described_size(description))

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        size = described_size(description)
        rows = self.check(size)
        # Only what takes rows: the tokens around them need the tokenizer.
        runs = (PlaceholderRun(self.image_token_id, rows, True),)
        return MediaItem("image", key, rows, self.grid(size), size, runs)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        height, width, rows, columns, slice_height, slice_width = self.grid(image.size)
        patches = self._cut(image, (height, width), (1, 1))
        if rows:
            slices = self._cut(image, (slice_height, slice_width), (rows, columns))
            patches = np.concatenate([patches, slices])
        content = content_hash(
            patches,
            family="minicpm_v",
            options={"rows": self.rows, "grid": [height, width, rows, columns, slice_height, slice_width]},
            kind="image",
            size=image.size,
        )
        return PreparedMedia(self.describe_embedding(image.size, content), patches)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest("this model takes videos as pictures, one for each frame", param="video")

    def _cut(self, image: Image.Image, piece: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
        """The picture resized to ``grid`` (rows and columns) of pieces (in patches), cut into patches."""
        (height, width), (rows, columns), side = piece, grid, self.patch
        pixels = resize(image, (columns * width * side, rows * height * side), _BICUBIC)
        parts = pixels.reshape(rows, height, side, columns, width, side, 3)
        return parts.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, side * side)
