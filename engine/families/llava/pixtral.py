"""Images for Pixtral's tower: at their own resolution, up to a longest side, in whole patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import IMAGE_SIZES, EmbeddingField, ModelConfig, sized_item
from engine.families.parsing.processor import require_steps
from engine.media.image_ops import resize
from engine.media.keys import content_hash
from engine.media.video.video import Video
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.native_config import NativeVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_FILE = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class PixtralProcessor:
    """See :class:`engine.families.base.MediaProcessor`. Grids are ``(1, rows, columns)`` in patches.

    Attributes:
        patch: side of a patch in pixels.
        longest: greatest ``(width, height)`` of a resized image, in pixels.
        image_token_id: the token that rows replace.
        resample: PIL's filter number.
    """

    patch: int
    longest: tuple[int, int]
    image_token_id: int
    resample: int = 3

    embedding_field: ClassVar[EmbeddingField] = IMAGE_SIZES

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> PixtralProcessor:
        """The checkpoint's processor; it has no options."""
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, NativeVisionConfig) and config.image_token_id is not None
        kind = str(raw.get("image_processor_type", "PixtralImageProcessor"))
        if not kind.startswith("Pixtral"):
            raise CheckpointError(
                f"{_FILE}: image_processor_type {kind} doesn't fit the tower; PixtralImageProcessor does",
                param="image_processor_type",
            )
        require_steps(raw, "do_resize")
        if raw.get("do_center_crop"):
            raise CheckpointError(f"{_FILE}: do_center_crop true is not supported", param="do_center_crop")
        # The whole processor's patch counts, as in Transformers; the image processor has one of its own.
        patch = checkpoint.json("processor_config.json").get("patch_size", vision.patch_size)
        if patch != vision.patch_size:
            raise CheckpointError(
                f"processor_config.json: patch_size {patch} differs from the tower's {vision.patch_size}",
                param="patch_size",
            )
        size = raw.get("size") or {"longest_edge": 1024}
        longest = size.get("longest_edge")
        bounds = (longest, longest) if longest else (size.get("width"), size.get("height"))
        if not all(isinstance(side, int) and side > 0 for side in bounds):
            raise CheckpointError(
                f"{_FILE}: size should be longest_edge, or height and width, in pixels; got {size}",
                param="size",
            )
        return cls(patch, cast(tuple[int, int], bounds), config.image_token_id, raw.get("resample", 3))

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """The grid of an image of ``(width, height)`` pixels.

        Raises:
            InvalidRequest: resized to the longest side it is less than a pixel wide or high.
        """
        width, height = size
        ratio = max(height / self.longest[1], width / self.longest[0])
        if ratio > 1:
            width, height = int(width / ratio), int(height / ratio)
        if not width or not height:
            raise InvalidRequest(
                f"an image of {size[0]}x{size[1]} pixels is too elongated: resized to at most "
                f"{self.longest[0]}x{self.longest[1]} pixels nothing is left of its shorter side",
                param="image",
            )
        return 1, math.ceil(height / self.patch), math.ceil(width / self.patch)

    def check(self, size: tuple[int, int]) -> int:
        return math.prod(self.grid(size))

    def prepare(self, image: Image.Image) -> PreparedMedia:
        _, rows, columns = self.grid(image.size)
        pixels = resize(image, (columns * self.patch, rows * self.patch), self.resample)
        options = {"patch": self.patch}
        key = content_hash(pixels, family="pixtral", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), pixels)

    def prepare_video(self, video: Video) -> PreparedMedia:
        raise InvalidRequest("this model takes images, not videos", param="video")

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        return sized_item(self, description, key)
