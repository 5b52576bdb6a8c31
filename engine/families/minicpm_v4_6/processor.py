"""MiniCPM-V 4.6's images and videos: sliced, resized to whole merged squares, and cut into patches.

A video is shown frame by frame, each as an image is, a frame a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import ModelConfig, SizedImages
from engine.families.minicpm_v.processor import cut, fit, sliced_grid
from engine.families.minicpm_v4_6.config import MergedVisionConfig, all_pieces
from engine.families.minicpm_v4_6.squares import nested_order
from engine.families.parsing.processor import (
    bad_option,
    count_option,
    lowered,
    request_options,
    require_same_colours,
    require_steps,
)
from engine.media.keys import content_hash
from engine.media.video.sampling import DEFAULT_RULES, FrameRules, minicpm_indices
from engine.media.video.video import Video, VideoInfo, VideoOptions
from engine.prompt import MediaItem, PreparedMedia
from engine.vision.normalisation import HALF_NORMALISATION

if TYPE_CHECKING:
    from PIL import Image

_MAX_SLICES = 64
_DEFAULTS: dict[str, Any] = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "downsample_mode": "16x",
    "resample": 3,
    "max_num_frames": 128,
    "stack_frames": 1,
}


@dataclass(frozen=True, slots=True)
class MiniCPMV46Processor(SizedImages):
    """See :class:`engine.families.base.MediaProcessor`. Pixels are patches; grids are those of
    :func:`engine.families.minicpm_v4_6.config.all_pieces`.

    Attributes:
        resolution: side in pixels of a square with the area of the overview and of each slice.
        patch: side of a patch in pixels.
        side: side, in patches, of the square that becomes one row.
        image_token_id: the token that rows replace.
        max_slices: most slices of an image.
        resample: PIL's filter number.
        video: shows a frame as this one shows an image; None for a processor of frames.
        frames: the most frames of a video file.
        upsizes: images of less than the area are enlarged to it.
    """

    resolution: int
    patch: int
    side: int
    image_token_id: int
    max_slices: int
    resample: int
    video: MiniCPMV46Processor | None = None
    frames: FrameRules = DEFAULT_RULES
    upsizes: bool = True

    @classmethod
    def with_defaults(
        cls, **defaults: Any
    ) -> Callable[[Checkpoint, ModelConfig, Mapping[str, Any]], MiniCPMV46Processor]:
        """:meth:`create` for a family whose files leave out ``defaults``."""
        return lambda checkpoint, config, options: cls.create(checkpoint, config, options, defaults)

    @classmethod
    def create(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        options: Mapping[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> MiniCPMV46Processor:
        """The checkpoint's processor with the option ``max_slice_nums``, which counts where it slices at all,
        and, where ``defaults`` have it, ``small_image_upsize``.

        Args:
            defaults: what files of the family leave out, over what those of MiniCPM-V 4.6 do.

        Raises:
            CheckpointError: naming the field that doesn't fit the model.
            ConfigError: the option is out of bounds.
        """
        vision, stated = config.vision, {**defaults, **checkpoint.preprocessor_config}
        assert isinstance(vision, MergedVisionConfig)
        made = cls._of("preprocessor_config.json", stated, config, options)
        if "small_image_upsize" in defaults:
            made = replace(made, upsizes=_upsizes(stated, options))
        if config.video_token_id is None:
            return made
        of_video = {**defaults, **(checkpoint.video_preprocessor_config or stated)}
        video = cls._of("video_preprocessor_config.json", of_video, config, options)
        require_same_colours(of_video, vision.normalisation, HALF_NORMALISATION)
        stacked = of_video.get("stack_frames", 1)
        if stacked != 1:
            raise CheckpointError(
                f"video_preprocessor_config.json: stack_frames {stacked!r} is not supported; 1 is",
                param="stack_frames",
            )
        most = of_video.get("max_num_frames", _DEFAULTS["max_num_frames"])
        video = replace(video, image_token_id=config.video_token_id)
        return replace(made, video=video, frames=FrameRules(max_frames=most))

    @classmethod
    def _of(
        cls, file: str, stated: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]
    ) -> MiniCPMV46Processor:
        """The processor of images, or of frames, by what ``file`` has ``stated``."""
        raw, vision = {**_DEFAULTS, **stated}, config.vision
        assert config.image_token_id is not None
        require_steps(raw, "do_resize")
        mode = "4x" if vision.side == 2 else "16x"
        for field, value in (("patch_size", vision.patch_size), ("downsample_mode", mode)):
            if raw[field] != value:
                raise CheckpointError(f"{file}: {field} should be {value}, not {raw[field]!r}", param=field)
        most = count_option(options, "max_slice_nums", raw["max_slice_nums"], _MAX_SLICES)
        return cls(
            resolution=raw["scale_resolution"],
            patch=vision.patch_size,
            side=vision.side,
            image_token_id=config.image_token_id,
            max_slices=most if raw["slice_mode"] else 1,
            resample=raw["resample"],
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The grid of an image of ``(width, height)`` pixels."""
        width, height = size
        if not self.upsizes and width * height <= self.resolution**2:
            square = self.patch * self.side
            down, along = (max(round(length / square), 1) * self.side for length in (height, width))
            return down, along, 0, 0, 0, 0
        return sliced_grid(size, self.resolution, self.max_slices, self._fit)

    def _fit(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = fit(size, self.resolution, self.patch * self.side)
        return height * self.side, width * self.side

    def check(self, size: tuple[int, int]) -> int:
        return sum(height * width for height, width in all_pieces(self.grid(size))) // self.side**2

    def prepare(self, image: Image.Image) -> PreparedMedia:
        grid = self.grid(image.size)
        patches = np.concatenate(self._pieces(image))
        options = {"grid": list(grid)}
        key = content_hash(patches, family="minicpm_v4_6", options=options, kind="image", size=image.size)
        return PreparedMedia(self.embedding_item(image.size, key), patches)

    def with_options(self, options: Mapping[str, Any]) -> MiniCPMV46Processor:
        options = request_options(options, "max_slice_nums")
        video = None if self.video is None else self.video.with_options(options)
        return replace(self, max_slices=lowered(options, "max_slice_nums", self.max_slices), video=video)

    def low_detail(self) -> MiniCPMV46Processor:
        return replace(self, max_slices=1, video=None if self.video is None else self.video.low_detail())

    def choose_frames(self, info: VideoInfo, asked: VideoOptions) -> list[int]:
        return minicpm_indices(info, self.frames, asked)

    def check_video(self, size: tuple[int, int], count: int) -> int:
        return count * self._frame().check(size)

    def prepare_video(self, video: Video) -> PreparedMedia:
        shown = self._frame()
        patches = np.concatenate([part for frame in video.frames for part in shown._pieces(frame)])
        grid = (*shown.grid(video.size), video.count)
        options = {"grid": list(grid)}
        key = content_hash(patches, family="minicpm_v4_6", options=options, kind="video", size=video.size)
        rows = self.check_video(video.size, video.count)
        item = MediaItem.of_rows("video", key, shown.image_token_id, rows, grid=grid, size=video.size)
        return PreparedMedia(item, patches)

    def _frame(self) -> MiniCPMV46Processor:
        if self.video is None:
            raise InvalidRequest("this model takes images, not videos", param="video")
        return self.video

    def _pieces(self, image: Image.Image) -> list[np.ndarray]:
        """The patches of each piece of an image: uint8 ``(N, 3, patch²)``."""
        height, width, rows, columns, slice_height, slice_width = self.grid(image.size)
        parts = self._cut(image, (height, width), (1, 1))
        return parts + (self._cut(image, (slice_height, slice_width), (rows, columns)) if rows else [])

    def _cut(self, image: Image.Image, piece: tuple[int, int], grid: tuple[int, int]) -> list[np.ndarray]:
        """The patches of each of ``grid`` (rows and columns) of pieces (height and width in patches): uint8
        ``(N, 3, patch²)``, in the encoder's order."""
        parts, order = cut(image, piece, grid, self.patch, self.resample), nested_order(*piece, self.side)
        return [part.reshape(-1, 3, self.patch**2)[order] for row in parts for part in row]


def _upsizes(stated: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether small images are enlarged, by the option ``small_image_upsize`` or the field of that name."""
    known, field = {"always": True, "never": False}, "small_image_upsize"
    if field in options:
        if options[field] not in tuple(known):
            raise bad_option(field, options[field], "always or never")
        return known[options[field]]
    if stated[field] not in tuple(known):
        raise CheckpointError(
            f"preprocessor_config.json: {field} {stated[field]!r} is not supported; always and never are, "
            f"also as mm_processor_kwargs.{field}",
            param=field,
        )
    return known[stated[field]]
