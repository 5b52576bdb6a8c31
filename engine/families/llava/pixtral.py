"""Images for Pixtral's tower: at their own resolution, up to a longest side, in whole patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ImagesOnly, ModelConfig, SizedImages
from engine.families.parsing.processor import require_steps, stated_size
from engine.media.keys import content_hash
from engine.media.resize import resize
from engine.prompt import PreparedMedia
from engine.vision.native_config import NativeVisionConfig

if TYPE_CHECKING:
    from PIL import Image

_FILE = "preprocessor_config.json"
_DEFAULT_PATCH = 16
"""Of Transformers' PixtralImageProcessor, in pixels."""


@dataclass(frozen=True, slots=True)
class PixtralProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. Grids are ``(1, rows, columns)`` in patches.

    Attributes:
        vision: the tower.
        multiple: sides of a resized image are multiples of this many pixels.
        longest: greatest ``(width, height)`` of a resized image, in pixels.
        image_token_id: the token that rows replace.
        resample: PIL's filter number.
    """

    vision: NativeVisionConfig
    multiple: int
    longest: tuple[int, int]
    image_token_id: int
    resample: int = 3

    @classmethod
    def create(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Mapping[str, Any],
        *,
        own_patch: bool = False,
    ) -> PixtralProcessor:
        """The checkpoint's processor; it has no options.

        Args:
            own_patch: whether sides are multiples of the image processor's own ``patch_size``; else of the
                side of a row's square, which Transformers' PixtralProcessor asks for.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, NativeVisionConfig) and config.image_token_id is not None
        kind = str(raw.get("image_processor_type") or "PixtralImageProcessor")
        if not kind.startswith("Pixtral"):
            raise CheckpointError(
                f"{_FILE}: image_processor_type {kind} doesn't fit the tower; PixtralImageProcessor does",
                param="image_processor_type",
            )
        require_steps(raw, "do_resize")
        if raw.get("do_center_crop"):
            raise CheckpointError(f"{_FILE}: do_center_crop true is not supported", param="do_center_crop")
        multiple = _check_squares(checkpoint, vision)
        if own_patch:
            multiple = _own_patch(raw, vision)
        size = stated_size(raw) or {"longest_edge": 1024}
        longest = size.get("longest_edge")
        bounds = (longest, longest) if longest else (size.get("width"), size.get("height"))
        if None in bounds:
            raise CheckpointError(
                f"{_FILE}: size should be longest_edge, or height and width, in pixels; got {size}",
                param="size",
            )
        sides = cast(tuple[int, int], bounds)
        return cls(vision, multiple, sides, config.image_token_id, raw.get("resample", 3))

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
        patches = self.multiple // self.vision.patch_size
        return 1, math.ceil(height / self.multiple) * patches, math.ceil(width / self.multiple) * patches

    def check(self, size: tuple[int, int]) -> int:
        rows = self.vision.rows(self.grid(size))
        if not rows:
            raise InvalidRequest(
                f"an image of {size[0]}x{size[1]} pixels is too small: this model sees nothing of it",
                param="image",
            )
        return rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        self.check(image.size)
        patch = self.vision.patch_size
        _, rows, columns = self.grid(image.size)
        pixels = resize(image, (columns * patch, rows * patch), self.resample)
        options = {"patch": patch}
        key = content_hash(pixels, family="pixtral", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), pixels)


def _check_squares(checkpoint: Checkpoint, vision: NativeVisionConfig) -> int:
    """Pixels along the side of what becomes a row, which processor_config.json may state too.

    Raises:
        CheckpointError: it states another patch, or another square of patches, than the tower has.
    """
    stated, squares = checkpoint.json("processor_config.json"), vision.squares
    tower = vision.patch_size, 1 if squares is None else squares.side
    for field, own in zip(("patch_size", "spatial_merge_size"), tower, strict=True):
        if stated.get(field, own) != own:
            raise CheckpointError(
                f"processor_config.json: {field} {stated[field]} differs from the model's {own}", param=field
            )
    return math.prod(tower)


def _own_patch(raw: Mapping[str, Any], vision: NativeVisionConfig) -> int:
    """The image processor's ``patch_size``, a multiple of the tower's patch, in pixels."""
    sides = set(stated_size({"patch_size": _DEFAULT_PATCH, **raw}, "patch_size").values()) or {_DEFAULT_PATCH}
    side = sides.pop()
    if sides or side % vision.patch_size:
        raise CheckpointError(
            f"{_FILE}: patch_size should be a multiple of the tower's {vision.patch_size} pixels, "
            f"not {raw['patch_size']!r}",
            param="patch_size",
        )
    return side
