"""Phi-3.5-vision's images: a canvas of whole crops, white above and below."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ImagesOnly, ModelConfig, SizedImages
from engine.families.parsing.processor import count_option, lowered, request_options
from engine.families.phi3_v.config import HDVisionConfig
from engine.media.image_ops import check_aspect_ratio
from engine.media.keys import content_hash
from engine.media.resize import resized
from engine.prompt import PreparedMedia

_MAX_CROPS = 64


@dataclass(frozen=True, slots=True)
class Phi3VProcessor(SizedImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`. The encoder cuts the crops out of the canvas.

    Attributes:
        vision: the tower's configuration.
        image_token_id: the token that rows replace.
        num_crops: most crops of an image; the overview doesn't count.
    """

    vision: HDVisionConfig
    image_token_id: int
    num_crops: int

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> Phi3VProcessor:
        """The checkpoint's processor with the option ``num_crops``."""
        crops = checkpoint.preprocessor_config.get("num_crops", 4)
        crops = count_option(options, "num_crops", crops, _MAX_CROPS)
        assert config.image_token_id is not None
        return cls(config.vision, config.image_token_id, crops)

    def canvas(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """``(width, height)`` of the scaled image and of its canvas, for an image of ``size`` that is at
        least as wide as high.

        Raises:
            InvalidRequest: it is too elongated.
        """
        width, height = size
        unit, ratio = self.vision.image_size, width / height
        # A row of all crops must still be a pixel high.
        check_aspect_ratio(size, self.num_crops * unit)
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.num_crops:
            columns += 1
        scaled = columns * unit, int(columns * unit / ratio)
        return scaled, (scaled[0], math.ceil(scaled[1] / unit) * unit)

    def check(self, size: tuple[int, int]) -> int:
        return self.vision.num_rows(self.grid(size))

    def prepare(self, image: Image.Image) -> PreparedMedia:
        # Images higher than wide are transposed, prepared, and transposed back.
        tall = image.width < image.height
        wide = image.transpose(Image.Transpose.TRANSPOSE) if tall else image
        scaled, full = self.canvas(wide.size)
        canvas = Image.new("RGB", full, (255, 255, 255))
        canvas.paste(resized(wide, scaled, Image.Resampling.BILINEAR), (0, (full[1] - scaled[1]) // 2))
        if tall:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        pixels = np.asarray(canvas)
        options = {"unit": self.vision.image_size}
        key = content_hash(pixels, family="phi3_v", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), pixels)

    def with_options(self, options: Mapping[str, Any]) -> Phi3VProcessor:
        options = request_options(options, "num_crops")
        return replace(self, num_crops=lowered(options, "num_crops", self.num_crops))

    def low_detail(self) -> Phi3VProcessor:
        return replace(self, num_crops=1)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crops down and across, of an image of ``(width, height)`` pixels."""
        _, (long, short) = self.canvas((max(size), min(size)))
        down, across = short // self.vision.image_size, long // self.vision.image_size
        return (across, down) if size[0] < size[1] else (down, across)
