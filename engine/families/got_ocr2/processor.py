"""GOT-OCR 2's images: squares of the tower's size, one or, if asked for, tiles and the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ImagesOnly, ModelConfig
from engine.families.parsing.processor import require_steps
from engine.families.tiles import TiledImages, require_side


@dataclass(frozen=True, slots=True)
class GotProcessor(TiledImages, ImagesOnly):
    """See :class:`engine.families.base.MediaProcessor`."""

    family: ClassVar[str] = "got_ocr2"

    @classmethod
    def create(cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> GotProcessor:
        """The checkpoint's processor with the options ``crop_to_patches`` and ``max_patches``.

        Raises:
            CheckpointError: naming the field that is not supported or doesn't fit the tower.
            ConfigError: naming the option that is out of bounds.
        """
        raw = checkpoint.preprocessor_config
        require_steps(raw, "do_resize")
        require_side("preprocessor_config.json", raw, config.vision.image_size)
        # Transformers' whole processor asks for one square and for these limits, whatever the image
        # processor's file states.
        return cls.of_tower(config, {}, options, tiled=False, resample=raw.get("resample", 3))
