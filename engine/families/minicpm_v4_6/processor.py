"""MiniCPM-V 4.6's images: sliced, resized to whole merged squares, and cut into patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import IMAGE_SIZES, EmbeddingField, ModelConfig, sized_item
from engine.families.minicpm_v.config import pieces
from engine.families.minicpm_v.processor import fit, slice_grid
from engine.families.minicpm_v4_6.config import MergedVisionConfig
from engine.families.minicpm_v4_6.squares import nested_order
from engine.families.parsing.processor import count_option, lowered, request_options, require_steps
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.media.video.video import Video
from engine.prompt import MediaItem, PreparedMedia

if TYPE_CHECKING:
    from PIL import Image

_MAX_SLICES = 64
_DEFAULTS: dict[str, Any] = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "downsample_mode": "16x",
    "resample": 3,
}


@dataclass(frozen=True, slots=True)
class MiniCPMV46Processor:
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are those of
    :func:`engine.families.minicpm_v.config.pieces`.

    Attributes:
        resolution: side in pixels of a square with the area of the overview and of each slice.
        patch: side of a patch in pixels.
        side: side, in patches, of the square that becomes one row.
        image_token_id: the token that rows replace.
        max_slices: most slices of an image.
        resample: PIL's filter number.
    """

    resolution: int
    patch: int
    side: int
    image_token_id: int
    max_slices: int
    resample: int

    embedding_field: ClassVar[EmbeddingField] = IMAGE_SIZES

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MiniCPMV46Processor:
        """The checkpoint's processor with the option ``max_slice_nums``, which counts where it slices at all.

        Raises:
            CheckpointError: naming the field that doesn't fit the model.
            ConfigError: the option is out of bounds.
        """
        raw, vision = {**_DEFAULTS, **checkpoint.preprocessor_config}, config.vision
        assert isinstance(vision, MergedVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize")
        mode = "4x" if vision.side == 2 else "16x"
        for field, value in (("patch_size", vision.patch_size), ("downsample_mode", mode)):
            if raw[field] != value:
                raise CheckpointError(
                    f"preprocessor_config.json: {field} should be {value}, not {raw[field]!r}", param=field
                )
        most = count_option(options, "max_slice_nums", raw["max_slice_nums"], _MAX_SLICES)
        return cls(
            resolution=raw["scale_resolution"],
            patch=vision.patch_size,
            side=vision.side,
            image_token_id=config.image_token_id,
            max_slices=most if raw["slice_mode"] else 1,
            resample=raw["resample"],
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of an image of ``(width, height)`` pixels."""
        rows, columns = slice_grid(size, self.resolution, self.max_slices)
        overview = self._fit(size)
        if not rows:
            return (*overview, 0, 0, 0, 0)
        # A slice's share of the image once the image's sides are multiples of the grid's, then its own size.
        share = (max(round(size[0] / columns), 1), max(round(size[1] / rows), 1))
        return (*overview, rows, columns, *self._fit(share))

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = fit(size, self.resolution, self.patch * self.side)
        return height * self.side, width * self.side

    def check(self, size: tuple[int, int]) -> int:
        return sum(height * width for height, width in pieces(self.grid(size))) // self.side**2

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        height, width, rows, columns, slice_height, slice_width = grid
        parts = self._cut(image, (height, width), (1, 1))
        if rows:
            parts += self._cut(image, (slice_height, slice_width), (rows, columns))
        patches = np.concatenate(parts)
        options = {"grid": list(grid)}
        key = content_hash(patches, family="minicpm_v4_6", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), patches)

    def with_options(self, options: Mapping[str, Any]) -> MiniCPMV46Processor:
        options = request_options(options, "max_slice_nums")
        return replace(self, max_slices=lowered(options, "max_slice_nums", self.max_slices))

    def low_detail(self) -> MiniCPMV46Processor:
        return replace(self, max_slices=1)

    def prepare_video(self, video: Video) -> PreparedMedia:
        raise InvalidRequest("this model takes videos as images, one for each frame", param="video")

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        return sized_item(self, description, key)

    def _cut(self, image: Image.Image, piece: tuple[int, int], grid: tuple[int, int]) -> list[np.ndarray]:
        """Resize the image to ``grid`` (rows and columns) of pieces (in patches) and cut each into patches:
        uint8 ``(N, 3, patch²)``, in the encoder's order."""
        (height, width), (rows, columns), side = piece, grid, self.patch
        pixels = resize(image, (columns * width * side, rows * height * side), self.resample)
        parts = pixels.reshape(rows, height, side, columns, width, side, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        order = nested_order(height, width, self.side)
        return [part.reshape(-1, 3, side * side)[order] for row in parts for part in row]
