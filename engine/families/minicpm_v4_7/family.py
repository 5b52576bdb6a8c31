"""MiniCPM-V 4.7: as MiniCPM-V 4.6, but an image's tokens have positions on a canvas, and videos no number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.families.base import ModelConfig
from engine.families.minicpm_v4_6.family import FAMILY as MINICPM_V4_6
from engine.families.minicpm_v4_7.positions import CanvasTokens, canvas_positions
from engine.families.parsing.fields import integer
from engine.prompt import MediaSpan


def _with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the ids of the tokens around images and slices."""
    config = MINICPM_V4_6.reader.finish(config, checkpoint)
    assert config.extra is not None
    fields = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
    tokens = CanvasTokens(*(integer(checkpoint.config, field, least=0) for field in fields))
    numbered = {**config.extra["numbered"], "video": False}
    return replace(config, extra={**config.extra, "canvas": tokens, "numbered": numbered})


def _positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> tuple[np.ndarray, int]:
    assert config.extra is not None
    return canvas_positions(ids, spans, config.vision.side, config.extra["canvas"])


FAMILY = replace(
    MINICPM_V4_6,
    name="minicpm_v4_7",
    architectures=("MiniCPMV4_7ForConditionalGeneration",),
    reader=replace(MINICPM_V4_6.reader, finish=_with_tokens),
    positions=_positions,
)
