"""HunyuanOCR's images: as Qwen2-VL's, always resized with the same filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import InvalidRequest
from engine.families.base import ImagesOnly, ModelConfig
from engine.families.qwen2_vl.processor import ImageRules, QwenProcessor, VideoRules
from engine.prompt import MediaItem

_BICUBIC = 3


class HunyuanProcessor(ImagesOnly, QwenProcessor):
    """See :class:`engine.families.qwen2_vl.processor.QwenProcessor`."""

    __slots__ = ()

    @classmethod
    def create(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Mapping[str, Any],
        video: VideoRules,
        images: ImageRules = ImageRules(),
    ) -> QwenProcessor:
        """The checkpoint's processor, which resizes bicubically whatever ``resample`` its file states."""
        made = super().create(checkpoint, config, options, video, images)
        return replace(made, resample=(_BICUBIC, _BICUBIC))

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        if description[0] != 1:
            raise InvalidRequest(
                f"image_grid_thw must hold (1, h, w) for this model; got {description}.",
                param="multi_modal_data.image",
            )
        return super().embedding_item(description, key)
