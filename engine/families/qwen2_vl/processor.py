"""Images and videos of the Qwen-VL families: at their own resolution, rounded to whole merged squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import EmbeddingField, ModelConfig
from engine.families.parsing.processor import (
    bad_option,
    lowered,
    request_options,
    require_same_colours,
    require_steps,
)
from engine.media.image_ops import check_aspect_ratio, rgb_array
from engine.media.keys import content_hash
from engine.media.resize import resize, resized
from engine.media.shared_pixels import packed_pixels, shared_pixels
from engine.media.video.sampling import DEFAULT_RULES, FrameRules, Sampler, qwen2_indices
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.native_config import NativeVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION, Normalisation

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_FPS = 24.0
"""Frames per second that Transformers assumes for frames without a rate."""

USUAL_FPS = 2.0
"""Frames per second of video files where the checkpoint states none. Transformers shows every frame then; the
models' authors show two a second."""

LOW_DETAIL_PIXELS = 512 * 512
"""Largest area of an image with ``detail: low``: that of OpenAI's own models."""

_MAX_FPS = 1000.0

VideoSize = Callable[[int, tuple[int, int], int, int, int, int], tuple[int, int]]
VideoTimes = Callable[[Pace, int], tuple[float, ...]]
VideoCap = Callable[[int, int, tuple[int, int], int, int], int]


class Stamp(Protocol):
    """Draws the time of a frame onto it."""

    def check(self, size: tuple[int, int]) -> None:
        """Refuse frames of ``(width, height)`` pixels that nothing can be drawn onto.

        Raises:
            InvalidRequest: naming the reason.
        """

    def __call__(self, frame: Image.Image, seconds: float) -> Image.Image: ...


def smart_resize(
    size: tuple[int, int],
    factor: int,
    min_pixels: int,
    max_pixels: int,
    *,
    frames: int = 1,
    temporal: int = 1,
) -> tuple[int, int]:
    """The new ``(width, height)`` of an image of ``size``: multiples of ``factor`` near its aspect ratio and
    an area between the bounds if possible.

    The arithmetic, banker's rounding included, is the published Qwen2-VL processor's. With ``frames`` it is
    Qwen3-VL's, which bounds the area of all frames together, counted in whole temporal patches.

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
    """Size of a resized video's frames, each bounded as an image is."""
    return smart_resize(size, factor, low, high)


def share_of_budget(frames: int, row: int, bounds: tuple[int, int], tokens: int, temporal: int) -> int:
    """Greatest area of a frame such that all frames together stay within 90 % of ``tokens``."""
    low, high = bounds
    return max(min(high, int(tokens * row * 0.9) * temporal // frames), int(low * 1.05))


def own_size(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """The ``(width, height)`` of an image, unchanged."""
    return size


def enlarged(size: tuple[int, int], factor: int) -> tuple[int, int]:
    """The ``(width, height)`` of an image whose sides are at least ``factor``: of equal proportions."""
    width, height = size
    if min(size) >= factor:
        return size
    scale = max(factor / height, factor / width)
    return int(width * scale), int(height * scale)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """The family's treatment of images.

    Attributes:
        before: makes of an image's ``(width, height)`` and the factor the size that :func:`smart_resize`
            starts from.
        bounds: the two areas of resized images where the files state none.
        fill_patch: an image counts as the equal frames of a temporal patch in its area.
        named_bounds: ``min_pixels`` and ``max_pixels`` in a file count for more than its ``size``; else they
            are not read.
        size: makes of an image's size, the factor and the two areas its new size; None for
            :func:`smart_resize`.
    """

    before: Callable[[tuple[int, int], int], tuple[int, int]] = own_size
    bounds: tuple[int, int] = (56 * 56, 28 * 28 * 1280)
    fill_patch: bool = False
    named_bounds: bool = True
    size: Callable[[tuple[int, int], int, int, int], tuple[int, int]] | None = None


@dataclass(frozen=True, slots=True)
class VideoRules:
    """The family's treatment of videos.

    Attributes:
        size: the new size of a video's frames, from their number, ``(width, height)``, the temporal patch,
            the factor and the two bounds.
        times: :attr:`MediaItem.times` from the frames' pace and the temporal patch; None if the model isn't
            told it.
        sample: chooses the frames of a file.
        cap: the greater bound where the files state ``cap_pixels_per_frame``, from the number of frames, the
            area of one row in pixels, the two bounds, ``max_video_tokens`` and the temporal patch.
        max_video_tokens: the argument of ``cap`` where the files state none.
        bounds: the two bounds where the files state none.
        named_bounds: as of :class:`ImageRules`.
        normalisation: the same of the pixels.
        frames: the least and the most frames of a file whose number follows from a rate, where the checkpoint
            states none.
        stamp: draws their times onto frames before they are resized; None if they are shown as they are.
    """

    size: VideoSize = frame_size
    times: VideoTimes | None = None
    sample: Sampler = qwen2_indices
    cap: VideoCap = share_of_budget
    max_video_tokens: int = 128_000
    bounds: tuple[int, int] = (128 * 28 * 28, 768 * 28 * 28)
    named_bounds: bool = True
    normalisation: Normalisation = CLIP_NORMALISATION
    frames: tuple[int, int] = (4, 768)
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class QwenProcessor:
    """See :class:`engine.families.base.MediaProcessor` and :class:`engine.families.base.NamelessProcessor`.

    Attributes:
        family: the family's name.
        vision: the tower's configuration.
        image_token_id, video_token_id: the tokens that rows replace; None for videos if the family has none.
        pixels: least and greatest area of a resized image.
        video_pixels: the same for videos, as ``video.size`` interprets it.
        video: the family's treatment of videos.
        resample: PIL's filter numbers for images and for videos.
        fps: frames per second of videos that are given as frames without times.
        frames: the number of frames of a video file.
        max_video_tokens: see :attr:`VideoRules.cap`; None where the files don't ask for it.
        names: whether items get their content hash.
        images: the family's treatment of images.
    """

    family: str
    vision: NativeVisionConfig
    image_token_id: int
    video_token_id: int | None
    pixels: tuple[int, int]
    video_pixels: tuple[int, int]
    video: VideoRules
    resample: tuple[int, int] = (3, 3)
    fps: float = DEFAULT_FPS
    frames: FrameRules = DEFAULT_RULES
    max_video_tokens: int | None = None
    names: bool = True
    images: ImageRules = ImageRules()

    @classmethod
    def with_videos(
        cls, video: VideoRules, images: ImageRules = ImageRules()
    ) -> Callable[[Checkpoint, ModelConfig, Mapping[str, Any]], QwenProcessor]:
        """:meth:`create` for a family with its treatment of videos and of images."""
        return lambda checkpoint, config, options: cls.create(checkpoint, config, options, video, images)

    @classmethod
    def create(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Mapping[str, Any],
        video: VideoRules,
        images: ImageRules = ImageRules(),
    ) -> QwenProcessor:
        """Read the checkpoint's processor files in any spelling; the user's options override them.

        Options are ``min_pixels`` and ``max_pixels``, for images and videos, and ``fps``, the frames of a
        video that the model is shown per second.
        """
        raw, vision = checkpoint.preprocessor_config, config.vision
        assert isinstance(vision, NativeVisionConfig)
        assert config.image_token_id is not None
        limit = config.max_position * (vision.patch_size * vision.merge_size) ** 2
        of_video = {} if config.video_token_id is None else checkpoint.video_preprocessor_config
        _check(raw, vision, vision.temporal_patch_size)
        _check(of_video, vision, vision.temporal_patch_size, vision.frames_per_row)
        if config.video_token_id is not None:
            require_same_colours(of_video, vision.normalisation, video.normalisation)
        capped = bool(of_video.get("cap_pixels_per_frame"))
        return cls(
            config.family,
            vision,
            config.image_token_id,
            config.video_token_id,
            _pixel_bounds(options, *_stated_bounds(raw, images), limit),
            _pixel_bounds(options, *_stated_bounds(of_video, video), limit),
            video,
            (raw.get("resample", 3), of_video.get("resample", 3)),
            _fps(options.get("fps", DEFAULT_FPS)),
            _frame_rules(of_video, options, video, vision.frames_per_row),
            (of_video.get("max_video_tokens") or video.max_video_tokens) if capped else None,
            images=images,
        )

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one row."""
        return self.vision.patch_size * self.vision.merge_size

    def check(self, size: tuple[int, int]) -> int:
        width, height = self._image_size(size)
        return self._rows(1, height, width)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        shown = resized(image, self._image_size(image.size), self.resample[0])
        # Those without a name are encoded at once.
        pixels = rgb_array(shown) if self.names else shared_pixels(shown)
        return self._media("image", pixels, 1, image.size)

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return self.video.sample(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        width, height = self._frame_size(size, count)
        return self._rows(self._steps(count), height, width)

    def prepare_video(self, video: Video) -> PreparedMedia:
        temporal, target = self.vision.temporal_patch_size, self._frame_size(video.size, video.count)
        pace, frames = video.pace or Pace.of_rate(video.count, self.fps), video.frames
        if self.video.stamp is not None:
            frames = map(self.video.stamp, frames, pace.times)
        resized = [resize(frame, target, self.resample[1]) for frame in frames]
        # The last frame fills up the last rows.
        resized += [resized[-1]] * (self._steps(len(resized)) * temporal - len(resized))
        times = self.video.times(pace, temporal) if self.video.times else ()
        return self._media("video", np.stack(resized), self._steps(len(resized)), video.size, times)

    def with_options(self, options: Mapping[str, Any]) -> QwenProcessor:
        options = request_options(options, "min_pixels", "max_pixels")

        most = max(self.pixels[1], self.video_pixels[1])
        for name in options:
            lowered(options, name, most)
        if options.get("min_pixels", 1) > options.get("max_pixels", most):
            raise InvalidRequest(
                "mm_processor_kwargs.min_pixels is greater than max_pixels.",
                param="mm_processor_kwargs.min_pixels",
            )
        of_video = _lowered_bounds(self.video_pixels, options)
        return replace(self, pixels=_lowered_bounds(self.pixels, options), video_pixels=of_video)

    def low_detail(self) -> QwenProcessor:
        most = LOW_DETAIL_PIXELS * self._frames_of_image
        return self.with_options({"max_pixels": min(most, self.pixels[1])})

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
        pixels = packed_pixels(media.pixels)
        key = content_hash(pixels, family=self.family, options=options, kind=item.kind, size=item.size)
        return PreparedMedia(replace(item, hash=key), media.pixels)

    @property
    def embedding_field(self) -> EmbeddingField:
        return EmbeddingField("image_grid_thw", ("t", "h", "w"))

    def embedding_item(self, description: tuple[int, ...], key: str) -> MediaItem:
        """The item of an image with the grid ``(t, h, w)`` in patches."""
        t, h, w = description
        patch, merge = self.vision.patch_size, self.vision.merge_size
        if h % merge or w % merge:
            raise InvalidRequest(
                f"image_grid_thw must hold (t, h, w) with h and w multiples of {merge}; got {description}.",
                param="multi_modal_data.image",
            )
        rows, size = self.vision.rows((t, h, w)), (w * patch, h * patch)
        return MediaItem.of_rows("image", key, self.image_token_id, rows, grid=(t, h, w), size=size)

    def _steps(self, count: int) -> int:
        """Temporal patches of ``count`` frames, which fill whole rows."""
        frames = self.vision.frames_per_row
        return -(-count // frames) * frames // self.vision.temporal_patch_size

    def _rows(self, t: int, height: int, width: int) -> int:
        """Embedding rows of ``t`` steps in time of frames with these sides in pixels."""
        patch = self.vision.patch_size
        return self.vision.rows((t, height // patch, width // patch))

    @property
    def _frames_of_image(self) -> int:
        """Frames that an image counts for in its area."""
        return self.vision.temporal_patch_size if self.images.fill_patch else 1

    def _image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.images.size is not None:
            return self.images.size(size, self.factor, *self.pixels)
        frames = self._frames_of_image
        before = self.images.before(size, self.factor)
        return smart_resize(before, self.factor, *self.pixels, frames=frames, temporal=frames)

    def _frame_size(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        temporal, (low, high) = self.vision.temporal_patch_size, self.video_pixels
        if self.video.stamp is not None:
            self.video.stamp.check(size)
        if self.max_video_tokens is not None:
            high = self.video.cap(count, self.factor**2, (low, high), self.max_video_tokens, temporal)
        return self.video.size(count, size, temporal, self.factor, low, high)

    def _media(
        self, kind: str, pixels: np.ndarray, t: int, size: tuple[int, int], times: tuple[float, ...] = ()
    ) -> PreparedMedia:
        vision = self.vision
        h, w = (side // vision.patch_size for side in pixels.shape[-3:-1])
        rows = vision.rows((t, h, w))
        token = self.image_token_id if kind == "image" else self.video_token_id
        assert token is not None, "a family without a token for videos takes none"
        item = MediaItem.of_rows(kind, "", token, rows, grid=(t, h, w), size=size, times=times)
        media = PreparedMedia(item, pixels)
        return self.named(media) if self.names else media


def _check(raw: Mapping[str, Any], vision: NativeVisionConfig, *temporal: int) -> None:
    """Require the sides of the tower, and one of the numbers of frames ``temporal``."""
    require_steps(raw, "do_resize")
    sides = {"patch_size": (vision.patch_size,), "merge_size": (vision.merge_size,)}
    for field, expected in {**sides, "temporal_patch_size": temporal}.items():
        if raw.get(field, expected[0]) not in expected:
            raise CheckpointError(
                f"preprocessor_config.json: {field} {raw[field]} differs from the tower's {expected[-1]}",
                param=field,
            )


def _stated_bounds(raw: Mapping[str, Any], rules: ImageRules | VideoRules) -> tuple[int, int]:
    size = raw.get("size") or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(
            f"preprocessor_config.json: size should be an object, not {size!r}", param="size"
        )
    named = raw if rules.named_bounds else {}
    low = named.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or rules.bounds[0]
    high = named.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or rules.bounds[1]
    for field, value in (("min_pixels", low), ("max_pixels", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(
                f"preprocessor_config.json: {field}, or size that states it, should be a positive number, "
                f"not {value!r}",
                param=field,
            )
    return low, high


def _fps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_FPS:
        raise bad_option("fps", value, f"a number above 0 and up to {_MAX_FPS:g}")
    return float(value)


def _lowered_bounds(configured: tuple[int, int], options: Mapping[str, Any]) -> tuple[int, int]:
    """The configured bounds with a request's over them, of which none raises the upper one."""
    high = min(options.get("max_pixels", configured[1]), configured[1])
    return min(options.get("min_pixels", configured[0]), high), high


def _frame_rules(
    of_video: Mapping[str, Any], options: Mapping[str, Any], video: VideoRules, temporal: int
) -> FrameRules:
    fps = options.get("fps") or of_video.get("fps") or USUAL_FPS
    return FrameRules(
        _fps(fps),
        min_frames=of_video.get("min_frames") or video.frames[0],
        max_frames=of_video.get("max_frames") or video.frames[1],
        temporal=temporal,
    )


def _pixel_bounds(options: Mapping[str, Any], low: int, high: int, limit: int) -> tuple[int, int]:
    """The checkpoint's bounds with the user's over them, each at most ``limit``."""
    bounds = {"min_pixels": low, "max_pixels": high}
    given = {name: options[name] for name in bounds if name in options}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            wanted = f"an integer from 1 to {limit}, the area that fills the model's context"
            raise bad_option(name, value, wanted)
    bounds |= given
    # Bounds of the checkpoint are taken as they are: an image is first held against the greatest area.
    if given and bounds["min_pixels"] > bounds["max_pixels"]:
        if len(given) == 2:
            raise ConfigError(
                "mm_processor_kwargs: min_pixels is greater than max_pixels",
                param="mm_processor_kwargs.min_pixels",
            )
        # With one bound given, the checkpoint's other bound becomes equal to it.
        (bound,) = given.values()
        return bound, bound
    return bounds["min_pixels"], bounds["max_pixels"]
