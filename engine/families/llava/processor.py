"""LLaVA's images for towers of one size: padded, resized and cropped to a square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SquareImages
from engine.families.parsing.processor import mean_colour, stated_size
from engine.media.centre import FILTERS, centre_of_resized, centre_square
from engine.media.image_ops import check_aspect_ratio
from engine.media.keys import content_hash
from engine.media.padding import resize_in_square
from engine.media.resize import resize
from engine.prompt import PreparedMedia
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from PIL import Image

_FILE = "preprocessor_config.json"
#: Image processors by the beginning of ``image_processor_type``, and whether they crop by default.
_CROPS = {"CLIP": True, "Llava": True, "Siglip": False}
_DEFAULT_SIZES: dict[str, dict[str, int]] = {
    "CLIP": {"shortest_edge": 224},
    "Llava": {"shortest_edge": 224},
    "Siglip": {"height": 224, "width": 224},
}


@dataclass(frozen=True, slots=True)
class LlavaProcessor(SquareImages):
    """See :class:`engine.families.base.MediaProcessor`. The steps are: pad to a square, resize, cut out the
    centre square.

    Attributes:
        side: of the result, in pixels.
        rows: embedding rows per image.
        image_token_id: the token that rows replace.
        background: colour of the padding; None if images are not padded.
        shortest: pixels of the shorter side after resizing; None if ``exact`` or nothing decides the size.
        exact: ``(width, height)`` after resizing.
        crop: whether the centre square is cut out.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    background: tuple[int, ...] | None = None
    shortest: int | None = None
    exact: tuple[int, int] | None = None
    crop: bool = True
    resample: int = 3

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> LlavaProcessor:
        """The checkpoint's processor; it has no options.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        kind, side = _kind(raw), vision.image_size
        # With the crop's size alone, the other one is the default of Transformers' classes.
        usual = _DEFAULT_SIZES[kind] if "crop_size" in raw else side
        shortest, exact = _size({"size": usual, **raw}) if raw.get("do_resize", True) else (None, None)
        padded = kind == "Llava" and raw.get("do_pad", False)
        background = mean_colour(raw, CLIP_NORMALISATION) if padded else None
        processor = cls(
            side,
            vision.rows_per_crop,
            config.image_token_id,
            background,
            shortest,
            exact,
            raw.get("do_center_crop", _CROPS[kind]),
            raw.get("resample", 3),
        )
        processor._check_result(stated_size({"crop_size": side, **raw}, "crop_size"))
        return processor

    def check(self, size: tuple[int, int]) -> int:
        if self.shortest is not None and self.background is None and self.resample not in FILTERS:
            # Such an image is resized as a whole, which may take gigabytes.
            check_aspect_ratio(size)
        return self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        self.check(image.size)
        pixels = self._square(image)[None]
        options = {"side": self.side, "rows": self.rows}
        key = content_hash(pixels, family="llava", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, image.size), pixels)

    def _square(self, image: Image.Image) -> np.ndarray:
        """uint8 ``(side, side, 3)``."""
        if self.background is not None:
            resized = self.shortest or self.side
            pixels = resize_in_square(image, resized, self.background, self.resample)
        elif self.shortest is not None:
            longer = int(self.shortest * max(image.size) / min(image.size))
            wide = image.width > image.height
            size = (longer, self.shortest) if wide else (self.shortest, longer)
            return centre_of_resized(image, size, self.side, self.resample)
        else:
            pixels = np.asarray(image) if self.exact is None else resize(image, self.exact, self.resample)
        return centre_square(pixels, self.side)

    def _check_result(self, crop_size: Mapping[str, int]) -> None:
        """Refuse steps whose result isn't a square with sides of ``side`` pixels."""
        square = (self.side, self.side)
        if self.background is not None and self.shortest is None and self.exact != square:
            raise CheckpointError(
                f"{_FILE}: do_pad needs do_resize and a size with shortest_edge", param="do_pad"
            )
        padded = self.background is not None and self.shortest == self.side
        cut = (crop_size.get("width"), crop_size.get("height"))
        if not (cut == square if self.crop else padded or self.exact == square):
            field = "crop_size" if self.crop else "size"
            raise CheckpointError(
                f"{_FILE}: {field} should give images of the tower's size, {self.side} x {self.side} pixels",
                param=field,
            )


def _kind(raw: Mapping[str, Any]) -> str:
    """The key of ``_CROPS`` for an image processor's JSON."""
    stated = raw.get("image_processor_type") or raw.get("feature_extractor_type") or "CLIPImageProcessor"
    for kind in _CROPS:
        if str(stated).startswith(kind):
            return kind
    raise CheckpointError(
        f"{_FILE}: image_processor_type {stated!r} is not supported; CLIPImageProcessor, LlavaImageProcessor "
        "and SiglipImageProcessor are",
        param="image_processor_type",
    )


def _size(raw: Mapping[str, Any]) -> tuple[int | None, tuple[int, int] | None]:
    """The field ``size``: the shorter side, or ``(width, height)``, in pixels."""
    size = stated_size(raw, square=False)
    if size.keys() == {"height", "width"}:
        return None, (size["width"], size["height"])
    if size.keys() != {"shortest_edge"}:
        raise CheckpointError(
            f"{_FILE}: size should be shortest_edge, or height and width, in pixels; got {raw['size']!r}",
            param="size",
        )
    return size["shortest_edge"], None
