"""DeepSeek-VL's images: resized to the tower's longer side and centred on a square of the mean colour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, SquareImages
from engine.families.parsing.processor import mean_colour, require_steps, stated_size
from engine.media.image_ops import rgb_array
from engine.media.keys import content_hash
from engine.media.padding import centred
from engine.media.resize import resized
from engine.prompt import PreparedMedia
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION

if TYPE_CHECKING:
    from PIL import Image

_FILE = "preprocessor_config.json"
_DEFAULT_SIDE, _DEFAULT_LEAST = 384, 14
"""Of Transformers' image processor, for files that state none."""


@dataclass(frozen=True, slots=True)
class DeepseekVLProcessor(SquareImages):
    """See :class:`engine.families.base.MediaProcessor`.

    Attributes:
        side: of the square, in pixels.
        rows: embedding rows per image.
        image_token_id: the token that rows replace.
        least: pixels of the shorter side of a resized image, at least.
        background: colour around it.
        resample: PIL's filter number.
    """

    side: int
    rows: int
    image_token_id: int
    least: int
    background: tuple[int, ...]
    resample: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> DeepseekVLProcessor:
        """The checkpoint's processor; it has no options.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, CropVisionConfig) and config.image_token_id is not None
        require_steps(raw, "do_resize", "do_pad")
        side, least = vision.image_size, raw.get("min_size", _DEFAULT_LEAST)
        usual = {"height": _DEFAULT_SIDE, "width": _DEFAULT_SIDE}
        if stated_size({"size": usual, **raw}) != {"height": side, "width": side}:
            raise CheckpointError(
                f"{_FILE}: size should be the tower's, {side} x {side} pixels", param="size"
            )
        if not isinstance(least, int) or not 1 <= least <= side:
            raise CheckpointError(f"{_FILE}: min_size should be pixels within {side}", param="min_size")
        rows = checkpoint.json("processor_config.json").get("num_image_tokens", vision.rows_per_crop)
        if rows != vision.rows_per_crop:
            raise CheckpointError(
                f"processor_config.json: num_image_tokens {rows} differs from the model's "
                f"{vision.rows_per_crop} rows per image",
                param="num_image_tokens",
            )
        background, resample = mean_colour(raw, CLIP_NORMALISATION), raw.get("resample", 3)
        return cls(side, rows, config.image_token_id, least, background, resample)

    def check(self, size: tuple[int, int]) -> int:
        return self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        scale = self.side / max(image.size)
        width, height = (max(round(length * scale), self.least) for length in image.size)
        square = centred(
            resized(image, (width, height), self.resample), (self.side, self.side), self.background
        )
        pixels = rgb_array(square)[None]
        options = {"side": self.side, "rows": self.rows}
        key = content_hash(pixels, family="deepseek_vl", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, image.size), pixels)
