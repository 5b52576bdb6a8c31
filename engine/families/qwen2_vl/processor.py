"""Pictures and videos as the Qwen-VL families take them: in their own resolution, rounded to whole rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import ModelConfig
from engine.media.image_ops import check_aspect_ratio, content_hash, resize
from engine.prompt import MediaItem, PlaceholderRun, PreparedMedia
from engine.vision.native_config import NativeVisionConfig

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FPS = 24.0
"""What Transformers takes for frames that come without their rate."""

_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280
_MAX_FPS = 1000.0

VideoSize = Callable[[int, tuple[int, int], int, int, int, int], tuple[int, int]]
VideoTimes = Callable[[int, int, float], tuple[float, ...]]


def smart_resize(
    size: tuple[int, int],
    factor: int,
    min_pixels: int,
    max_pixels: int,
    *,
    frames: int = 1,
    temporal: int = 1,
) -> tuple[int, int]:
    """The ``(width, height)`` that a picture of ``size`` is resized to: multiples of ``factor`` with an area
    between the bounds where possible, near the picture's aspect ratio.

    The arithmetic, banker's rounding included, is that of the published Qwen2-VL processor; with ``frames``
    that of Qwen3-VL, which bounds the area of all frames together, counted in whole temporal patches.

    Raises:
        InvalidRequest: the aspect ratio is beyond 200.
    """
    check_aspect_ratio(size)
    width, height = size
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    area = round(frames / temporal) * temporal * new_width * new_height
    if area > max_pixels:
        shrink = math.sqrt((frames * height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_width, new_height


def frame_size(
    frames: int, size: tuple[int, int], temporal: int, factor: int, low: int, high: int
) -> tuple[int, int]:
    """Size of a video's frames where each is bounded as a picture is."""
    return smart_resize(size, factor, low, high)


@dataclass(frozen=True, slots=True)
class VideoRules:
    """What a family does with videos.

    Attributes:
        size: frames, ``(width, height)``, temporal patch, factor and the two bounds to a frame's new size.
        times: frames, temporal patch and frames per second to :attr:`MediaItem.times`; None if the family
            doesn't tell a video's pace.
    """

    size: VideoSize = frame_size
    times: VideoTimes | None = None


@dataclass(frozen=True, slots=True)
class QwenProcessor:
    """See :class:`engine.families.base.MediaProcessor` and :class:`engine.families.base.NamelessProcessor`.

    Attributes:
        family: the family's name.
        vision: the tower's configuration.
        image_token_id, video_token_id: what the rows overwrite.
        pixels: least and greatest area of a resized picture.
        video_pixels: the same for videos, as ``video.size`` understands it.
        resample: PIL's filter number.
        fps: rate of the frames of videos.
        names: whether items get their content hash.
    """

    family: str
    vision: NativeVisionConfig
    image_token_id: int
    video_token_id: int
    pixels: tuple[int, int]
    video_pixels: tuple[int, int]
    video: VideoRules
    resample: int = 3
    fps: float = DEFAULT_FPS
    names: bool = True

    @classmethod
    def create(
        cls, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any], video: VideoRules
    ) -> QwenProcessor:
        """From the checkpoint's processor files in any spelling, with the user's options over them.

        Options are ``min_pixels`` and ``max_pixels``, for pictures and videos, and ``fps``, the rate of a
        video's frames, where the family tells it.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        options = dict(options)
        fps = DEFAULT_FPS if video.times is None else _fps(options.pop("fps", DEFAULT_FPS))
        known = ("min_pixels", "max_pixels", *(("fps",) if video.times else ()))
        limit = config.max_position * (vision.patch_size * vision.merge_size) ** 2
        of_video = (
            checkpoint.json("video_preprocessor_config.json")
            or checkpoint.json("processor_config.json").get("video_processor")
            or raw
        )
        _check(raw, vision)
        _check(of_video, vision)
        pixels, video_pixels = (
            _pixel_bounds(options, *_stated_bounds(source), limit, known) for source in (raw, of_video)
        )
        assert config.image_token_id is not None and config.video_token_id is not None
        return cls(
            config.family,
            vision,
            config.image_token_id,
            config.video_token_id,
            pixels,
            video_pixels,
            video,
            raw.get("resample", 3),
            fps,
        )

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one row."""
        return self.vision.patch_size * self.vision.merge_size

    def check(self, size: tuple[int, int]) -> int:
        width, height = smart_resize(size, self.factor, *self.pixels)
        return width // self.factor * (height // self.factor)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        target = smart_resize(image.size, self.factor, *self.pixels)
        return self._media("image", resize(image, target, self.resample), 1, image.size)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise InvalidRequest("a video needs frames, all of the same size", param="video")
        count, size, temporal = len(frames), frames[0].size, self.vision.temporal_patch_size
        target = self.video.size(count, size, temporal, self.factor, *self.video_pixels)
        resized = [resize(frame, target, self.resample) for frame in frames]
        # The last frame stands in for those that a whole patch lacks.
        resized += [resized[-1]] * (-count % temporal)
        times = self.video.times(count, temporal, self.fps) if self.video.times else ()
        return self._media("video", np.stack(resized), len(resized) // temporal, size, times)

    def nameless(self) -> QwenProcessor:
        return replace(self, names=False)

    def named(self, media: PreparedMedia) -> PreparedMedia:
        item, vision = media.item, self.vision
        options = {
            "patch": vision.patch_size,
            "merge": vision.merge_size,
            "temporal": vision.temporal_patch_size,
            "times": item.times,
        }
        key = content_hash(media.pixels, family=self.family, options=options, kind=item.kind, size=item.size)
        return PreparedMedia(replace(item, hash=key), media.pixels)

    @property
    def embedding_field(self) -> str:
        return "image_grid_thw"

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        assert description is not None
        if len(description) != 3 or any(side % self.vision.merge_size for side in description[1:]):
            raise InvalidRequest(
                f"image_grid_thw must hold (t, h, w) with h and w multiples of {self.vision.merge_size}; "
                f"got {description}.",
                param="multi_modal_data.image",
            )
        return math.prod(description) // self.vision.merge_size**2

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        rows = self.embedding_rows(description)
        assert description is not None
        t, h, w = description
        patch = self.vision.patch_size
        return MediaItem(
            kind="image",
            hash=key,
            num_tokens=rows,
            grid=(t, h, w),
            size=(w * patch, h * patch),
            placeholder=(PlaceholderRun(self.image_token_id, rows, True),),
        )

    def _media(
        self, kind: str, pixels: np.ndarray, t: int, size: tuple[int, int], times: tuple[float, ...] = ()
    ) -> PreparedMedia:
        vision = self.vision
        h, w = (side // vision.patch_size for side in pixels.shape[-3:-1])
        rows = t * h * w // vision.merge_size**2
        token = self.image_token_id if kind == "image" else self.video_token_id
        item = MediaItem(
            kind=kind,
            hash="",
            num_tokens=rows,
            grid=(t, h, w),
            size=size,
            placeholder=(PlaceholderRun(token, rows, True),),
            times=times,
        )
        media = PreparedMedia(item, pixels)
        return self.named(media) if self.names else media


def _check(raw: Mapping[str, Any], vision: NativeVisionConfig) -> None:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not raw.get(step, True):
            raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)
    for field in ("patch_size", "merge_size", "temporal_patch_size"):
        expected = getattr(vision, field)
        if raw.get(field, expected) != expected:
            raise CheckpointError(
                f"preprocessor_config.json: {field} {raw[field]} differs from the tower's {expected}",
                param=field,
            )


def _stated_bounds(raw: Mapping[str, Any]) -> tuple[int, int]:
    size = raw.get("size") or {}
    low = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or _MIN_PIXELS
    high = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or _MAX_PIXELS
    return low, high


def _fps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FPS:
        raise ConfigError(
            f"mm_processor_kwargs: fps should be a number above 0 and up to {_MAX_FPS:g}; got {value!r}",
            param="mm_processor_kwargs.fps",
        )
    return float(value)


def _pixel_bounds(
    options: Mapping[str, Any], low: int, high: int, limit: int, known_names: Sequence[str]
) -> tuple[int, int]:
    """The checkpoint's bounds with the user's over them, each checked."""
    known = {"min_pixels": low, "max_pixels": high}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"mm_processor_kwargs: unknown option {name!r}; known are {', '.join(known_names)}",
                param=f"mm_processor_kwargs.{name}",
            )
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ConfigError(
                f"mm_processor_kwargs: {name} should be an integer from 1 to {limit}, the area that fills "
                f"the model's context; got {value!r}",
                param=f"mm_processor_kwargs.{name}",
            )
        known[name] = value
    if known["min_pixels"] > known["max_pixels"]:
        if "min_pixels" in options and "max_pixels" in options:
            raise ConfigError(
                "mm_processor_kwargs: min_pixels is greater than max_pixels",
                param="mm_processor_kwargs.min_pixels",
            )
        # One bound given: the checkpoint's other one gives way.
        bound = options.get("min_pixels", options.get("max_pixels", known["max_pixels"]))
        return bound, bound
    return known["min_pixels"], known["max_pixels"]
