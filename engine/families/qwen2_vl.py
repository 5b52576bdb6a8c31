"""Qwen2-VL: pictures and videos in their own resolution, rows merged two by two, M-RoPE."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.decoder_json import (
    checkpoint_dtype,
    eos_ids,
    integer,
    parse_decoder,
    refuse_quantised,
    vision_activation,
)
from engine.families.mrope import grid_positions
from engine.inputs.image_ops import CLIP_MEAN, CLIP_STD, content_hash, resize
from engine.inputs.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.layers.native_vision_config import NativeVisionConfig
from engine.layers.vision_config import VisionConfig
from engine.weights.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules

if TYPE_CHECKING:
    from PIL import Image

    from engine.layers.build import BuildContext
    from engine.weights.checkpoint import Checkpoint

_MAX_ASPECT_RATIO = 200
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280


class Qwen2VLFamily:
    """Qwen2-VL, 2B tied to 72B untied."""

    name = "qwen2_vl"
    architectures = ("Qwen2VLForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        text = {**(raw.get("text_config") or raw)}
        text["tie_word_embeddings"] = bool(
            raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        )
        decoder = parse_decoder(text, "qwen2_vl")
        if decoder.rope.mrope_section is None:
            raise CheckpointError("config.json: mrope_section is missing", param="rope_scaling")
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=_vision(
                raw.get("vision_config") or {}, checkpoint.preprocessor_config, decoder.hidden_size
            ),
            eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size),
            dtype=checkpoint_dtype(raw, text),
            bos_token_id=text.get("bos_token_id"),
            image_token_id=raw.get("image_token_id", 151655),
            video_token_id=raw.get("video_token_id", 151656),
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="<|image_pad|>", video="<|video_pad|>")

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return grid_positions(num_tokens, spans, config.vision.merge_size)

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        return Qwen2VLProcessor.create(checkpoint.preprocessor_config, config, options)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        tower, visual = r"tower.", r"(?:model\.)?visual\."
        return WeightRules(
            vision=(
                (visual + r"patch_embed\.proj\.(.*)", tower + r"patch_embed.\1"),
                (visual + r"merger\.ln_q\.(.*)", r"merger.norm.\1"),
                (visual + r"merger\.mlp\.0\.(.*)", r"merger.mlp.fc1.\1"),
                (visual + r"merger\.mlp\.2\.(.*)", r"merger.mlp.fc2.\1"),
                (visual + r"(blocks\..*)", tower + r"\1"),
            ),
            language=DECODER_RULES,
            ignore=(ROTARY_BUFFERS, r".*visual\.rotary_pos_emb\.inv_freq", *tied),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.layers.native_vision import NativeVisionEncoder

        return NativeVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> NativeVisionConfig:
    # The public files state little more than hidden_size, which is the width of the rows, not of the tower.
    filled = {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": raw.get("in_chans", 3),
        "hidden_act": "quick_gelu",
        "hidden_size": hidden,
        **raw,
    }
    width, patch = integer(filled, "embed_dim"), integer(filled, "patch_size")
    temporal, merge = integer(filled, "temporal_patch_size"), integer(filled, "spatial_merge_size")
    if filled["hidden_size"] != hidden:
        raise CheckpointError(
            f"config.json: vision_config.hidden_size {filled['hidden_size']} differs from the language "
            f"model's {hidden}",
            param="vision_config",
        )
    if integer(filled, "in_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    tower = VisionConfig(
        hidden_size=width,
        intermediate_size=int(width * filled["mlp_ratio"]),
        num_layers=integer(filled, "depth"),
        num_heads=integer(filled, "num_heads"),
        patch_dim=3 * temporal * patch * patch,
        activation=vision_activation(filled["hidden_act"]),
        rope_theta=10000.0,
    )
    return NativeVisionConfig(
        tower=tower,
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=temporal,
        out_features=hidden,
        mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        std=tuple(processor.get("image_std") or CLIP_STD),
        scale=processor.get("rescale_factor", 1 / 255),
    )


def smart_resize(size: tuple[int, int], factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The ``(width, height)`` that a picture of ``size`` is resized to: multiples of ``factor`` with an area
    between the bounds where possible, near the picture's aspect ratio.

    The arithmetic, banker's rounding included, is that of the published Qwen2-VL processor.

    Raises:
        InvalidRequest: the aspect ratio is beyond 200.
    """
    width, height = size
    if max(size) > _MAX_ASPECT_RATIO * min(size):
        raise InvalidRequest(
            f"a picture of {width}x{height} pixels is too elongated: the longer side may be at most "
            f"{_MAX_ASPECT_RATIO} times the shorter",
            param="image",
        )
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_width, new_height


@dataclass(frozen=True, slots=True)
class Qwen2VLProcessor:
    """See :class:`engine.families.base.MediaProcessor`.

    Attributes:
        factor: side in pixels of the square that becomes one row.
        min_pixels, max_pixels: bounds of a resized picture's area; of each frame in a video.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_token_id: int
    video_token_id: int
    min_pixels: int
    max_pixels: int
    resample: int = 3

    @classmethod
    def create(
        cls, raw: Mapping[str, Any], config: ModelConfig, options: Mapping[str, Any]
    ) -> Qwen2VLProcessor:
        """From preprocessor_config.json in either spelling, with the user's options over it."""
        vision: NativeVisionConfig = config.vision
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not raw.get(step, True):
                raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)
        for field, expected in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            if raw.get(field, expected) != expected:
                raise CheckpointError(
                    f"preprocessor_config.json: {field} {raw[field]} differs from the tower's {expected}",
                    param=field,
                )
        size = raw.get("size") or {}
        low = raw.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels") or _MIN_PIXELS
        high = raw.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels") or _MAX_PIXELS
        limit = config.max_position * (vision.patch_size * vision.merge_size) ** 2
        low, high = _pixel_bounds(options, low, high, limit)
        assert config.image_token_id is not None and config.video_token_id is not None
        return cls(
            vision.patch_size,
            vision.merge_size,
            vision.temporal_patch_size,
            config.image_token_id,
            config.video_token_id,
            low,
            high,
            raw.get("resample", 3),
        )

    @property
    def factor(self) -> int:
        return self.patch_size * self.merge_size

    def check(self, size: tuple[int, int]) -> int:
        width, height = smart_resize(size, self.factor, self.min_pixels, self.max_pixels)
        return width // self.factor * (height // self.factor)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        target = smart_resize(image.size, self.factor, self.min_pixels, self.max_pixels)
        return self._media("image", resize(image, target, self.resample), 1, image.size)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise InvalidRequest("a video needs frames, all of the same size", param="video")
        target = smart_resize(frames[0].size, self.factor, self.min_pixels, self.max_pixels)
        resized = [resize(frame, target, self.resample) for frame in frames]
        # The last frame stands in for those that a whole patch lacks.
        resized += [resized[-1]] * (-len(resized) % self.temporal_patch_size)
        pixels = np.stack(resized)
        return self._media("video", pixels, len(resized) // self.temporal_patch_size, frames[0].size)

    def _media(self, kind: str, pixels: np.ndarray, t: int, size: tuple[int, int]) -> PreparedMedia:
        h, w = (side // self.patch_size for side in pixels.shape[-3:-1])
        rows = t * h * w // self.merge_size**2
        token = self.image_token_id if kind == "image" else self.video_token_id
        options = {"patch": self.patch_size, "merge": self.merge_size, "temporal": self.temporal_patch_size}
        item = MediaItem(
            kind=kind,
            hash=content_hash(pixels, family="qwen2_vl", options=options, kind=kind, size=size),
            num_tokens=rows,
            grid=(t, h, w),
            size=size,
            placeholder=(PlaceholderRun(token, rows, True),),
        )
        return PreparedMedia(item, pixels)


def _pixel_bounds(options: Mapping[str, Any], low: int, high: int, limit: int) -> tuple[int, int]:
    """The checkpoint's bounds with the user's over them, each checked."""
    known = {"min_pixels": low, "max_pixels": high}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"mm_processor_kwargs: unknown option {name!r}; known are {', '.join(known)}",
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


FAMILY = Qwen2VLFamily()
