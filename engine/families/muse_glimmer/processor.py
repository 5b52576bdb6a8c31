"""Muse Glimmer's images and videos: a grid of rows near the aspect ratio, of at most so many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.qwen2_vl.processor import ImageRules, QwenProcessor, VideoRules
from engine.media.image_ops import check_aspect_ratio
from engine.media.video.sampling import FrameRules, muse_indices
from engine.media.video.video import Pace
from engine.vision.normalisation import HALF_NORMALISATION

_IMAGE_TOKENS, _FRAME_TOKENS, _FRAMES = 4096, 144, 96
"""Of Transformers' processors, for files that state none."""
_LANCZOS = 1


def fitted(size: tuple[int, int], factor: int, low: int, high: int) -> tuple[int, int]:
    """The new ``(width, height)`` of an image of ``size``: multiples of ``factor`` with an area of at most
    ``high``, of the grids around that the one with the nearest aspect ratio.

    The arithmetic is that of Transformers' ``smart_resize`` of Muse Glimmer.

    Raises:
        InvalidRequest: the aspect ratio is beyond 200.
    """
    check_aspect_ratio(size)
    width, height = size
    most = high // factor**2
    down, across = height / factor, width / factor
    ratio = across / down
    if down * across > most:
        down = (most / ratio) ** 0.5
        across = down * ratio
    around = itertools.product([math.floor(down), math.ceil(down)], [math.floor(across), math.ceil(across)])
    # The order of a set decides between grids that are equally near.
    grids = [grid for grid in list(set(around)) if min(grid) >= 1 and math.prod(grid) <= most]
    if not grids:
        grids = [(max(1, round(down)), max(1, round(across)))]
    rows, columns = min(grids, key=lambda grid: abs(grid[0] / grid[1] - height / width))
    return columns * factor, rows * factor


def _frame_size(
    frames: int, size: tuple[int, int], temporal: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    return fitted(size, factor, low, high)


def _step_times(pace: Pace, temporal: int) -> tuple[float, ...]:
    """The second of the first frame of each temporal patch."""
    return pace.times[::temporal]


def muse_processor(checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> QwenProcessor:
    """The checkpoint's processor, with the options of :class:`QwenProcessor`.

    Raises:
        CheckpointError: naming the field that is not supported.
        ConfigError: naming the option that is out of bounds.
    """
    images, videos = checkpoint.preprocessor_config, checkpoint.video_preprocessor_config
    vision = config.vision
    row = (vision.patch_size * vision.merge_size) ** 2
    most = _count(images, "max_image_tokens", _IMAGE_TOKENS)
    most_of_frame = _count(videos, "max_video_frame_tokens", _FRAME_TOKENS)
    processor = QwenProcessor.create(
        checkpoint,
        config,
        options,
        VideoRules(
            size=_frame_size,
            times=_step_times,
            sample=muse_indices,
            bounds=(row, most_of_frame * row),
            named_bounds=False,
            normalisation=HALF_NORMALISATION,
        ),
        ImageRules(bounds=(row, most * row), named_bounds=False, size=fitted),
    )
    temporal = vision.temporal_patch_size
    frames = FrameRules(
        processor.frames.fps, max_frames=_count(videos, "num_frames", _FRAMES), temporal=temporal
    )
    filters = tuple(raw.get("resample", _LANCZOS) for raw in (images, videos))
    return replace(processor, frames=frames, resample=filters)


def _count(raw: Mapping[str, Any], field: str, default: int) -> int:
    value = raw.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{field} should be a positive integer, not {value!r}", param=field)
    return value
