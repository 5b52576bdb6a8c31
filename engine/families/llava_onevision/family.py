"""LLaVA-OneVision: a picture as a whole and in tiles, several in one crop each, videos, and Qwen2."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.checkpoint.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.described import SIZE_FIELD, described_size
from engine.families.parsing.clip import clip_rules, unused_clip_tensors
from engine.families.parsing.decoder import (
    checkpoint_dtype,
    eos_ids,
    parse_decoder,
    refuse_quantised,
    vision_activation,
)
from engine.families.parsing.siglip import parse_siglip
from engine.media.image_ops import CLIP_MEAN, CLIP_STD, content_hash, resize
from engine.media.padding import resize_in_square, resize_on_canvas
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.vision.anyres import AnyresConfig, best_pinpoint, tiled_rows
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_DEFAULT_SIDES = tuple(384 * tiles for tiles in range(1, 7))


class LlavaOnevisionFamily:
    """LLaVA-OneVision, 0.5B tied to 72B untied."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        text = {**(raw.get("text_config") or {})}
        kind = text.get("model_type", "qwen2")
        if kind != "qwen2":
            raise CheckpointError(f"config.json: text model {kind!r} is not supported", param="text_config")
        text["tie_word_embeddings"] = bool(
            raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        )
        decoder = parse_decoder(text, "qwen2")
        vision, layers = _vision(raw, checkpoint.preprocessor_config, decoder.hidden_size)
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=vision,
            eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size),
            dtype=checkpoint_dtype(raw, text),
            bos_token_id=text.get("bos_token_id"),
            image_token_id=raw.get("image_token_index", raw.get("image_token_id", 151646)),
            video_token_id=raw.get("video_token_index", raw.get("video_token_id", 151647)),
            extra={"tower_layers": layers},
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="<image>", video="<video>")

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return None

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        for name in options:
            raise ConfigError(
                f"mm_processor_kwargs: {config.architecture} has no option {name!r}",
                param=f"mm_processor_kwargs.{name}",
            )
        return LlavaOnevisionProcessor.create(checkpoint.preprocessor_config, config)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        assert config.extra is not None
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        tower, layers = config.vision.crops.tower, config.extra["tower_layers"]
        return WeightRules(
            vision=(
                (r"(?:model\.)?multi_modal_projector\.linear_([12])\.(.*)", r"crops.connector.fc\1.\2"),
                (r"(?:model\.)?image_newline", "newline"),
                *clip_rules(_TOWER, "crops.tower."),
            ),
            language=DECODER_RULES,
            ignore=(
                ROTARY_BUFFERS,
                *unused_clip_tensors(_TOWER, tower, layers),
                _TOWER + r"head\..*",
                *tied,
            ),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.families.llava_onevision.encoder import AnyresVisionEncoder

        return AnyresVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> tuple[AnyresConfig, int]:
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise CheckpointError(
            f"config.json: vision tower {vision['model_type']!r} is not supported", param="vision_config"
        )
    layer = raw.get("vision_feature_layer", -1)
    strategy = raw.get("vision_feature_select_strategy", "full")
    if not isinstance(layer, int) or strategy != "full":
        raise CheckpointError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not supported",
            param="vision_feature_layer",
        )
    aspect = raw.get("vision_aspect_ratio", "anyres_max_9")
    limit = re.fullmatch(r"anyres_max_([1-9]\d*)", str(aspect))
    if limit is None:
        raise CheckpointError(
            f"config.json: vision_aspect_ratio {aspect!r} is not supported", param="vision_aspect_ratio"
        )
    tower, filled = parse_siglip(vision, feature_layer=layer)
    crops = CropVisionConfig(
        tower=tower,
        image_size=filled["image_size"],
        patch_size=filled["patch_size"],
        keep_class_token=False,
        out_features=hidden,
        mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        std=tuple(processor.get("image_std") or CLIP_STD),
        scale=processor.get("rescale_factor", 1 / 255),
        connector_activation=vision_activation(
            raw.get("projector_hidden_act", "gelu"), "projector_hidden_act"
        ),
        connector_bias=raw.get("multimodal_projector_bias", True),
    )
    pinpoints = _pinpoints(raw.get("image_grid_pinpoints"), crops.image_size)
    return AnyresConfig(crops, pinpoints, int(limit.group(1))), filled["num_hidden_layers"]


def _pinpoints(raw: Any, side: int) -> tuple[tuple[int, int], ...]:
    pinpoints = tuple((height, width) for height, width in raw or _default_pinpoints())
    for height, width in pinpoints:
        if height <= 0 or width <= 0 or height % side or width % side:
            raise CheckpointError(
                f"config.json: image_grid_pinpoints has {height}x{width}, which is no number of crops of "
                f"{side} pixels",
                param="image_grid_pinpoints",
            )
    return pinpoints


def _default_pinpoints() -> list[tuple[int, int]]:
    return [(height, width) for height in _DEFAULT_SIDES for width in _DEFAULT_SIDES]


@dataclass(frozen=True, slots=True)
class LlavaOnevisionProcessor:
    """See :class:`engine.families.base.MediaProcessor`; grids are those of
    :class:`engine.families.llava_onevision.encoder.AnyresVisionEncoder`.

    Attributes:
        tiled: a picture is shown in tiles as well; else in one crop, padded to a square.
    """

    vision: AnyresConfig
    image_token_id: int
    video_token_id: int
    resample: int = 3
    tiled: bool = True

    @classmethod
    def create(cls, raw: Mapping[str, Any], config: ModelConfig) -> LlavaOnevisionProcessor:
        vision: AnyresConfig = config.vision
        side = vision.crops.image_size
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not raw.get(step, True):
                raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)
        size = raw.get("size") or {}
        if {size.get(name, side) for name in ("height", "width", "shortest_edge")} != {side}:
            raise CheckpointError(
                f"preprocessor_config.json: size should be the tower's {side} pixels", param="size"
            )
        pinpoints = _pinpoints(raw.get("image_grid_pinpoints"), side) if raw else vision.pinpoints
        if pinpoints != vision.pinpoints:
            raise CheckpointError(
                "preprocessor_config.json: image_grid_pinpoints differ from those of config.json",
                param="image_grid_pinpoints",
            )
        assert config.image_token_id is not None and config.video_token_id is not None
        return cls(vision, config.image_token_id, config.video_token_id, raw.get("resample", 3))

    def among(self, num_images: int) -> LlavaOnevisionProcessor:
        """Only the one picture of a prompt is shown in tiles."""
        return replace(self, tiled=num_images <= 1)

    def check(self, size: tuple[int, int]) -> int:
        crops = self.vision.crops
        if not self.tiled:
            return crops.rows_per_crop + 1
        shown = tiled_rows(size, self._tiles(size), crops.grid_side, self.vision.max_tiles)
        return crops.rows_per_crop + shown.rows * (shown.columns + 1)

    def prepare(self, image: Image.Image) -> PreparedMedia:
        side = self.vision.crops.image_size
        if not self.tiled:
            colour = tuple(int(value * 255) for value in self.vision.crops.mean)
            pixels = resize_in_square(image, side, colour, self.resample)[None]
            return self._media("image", pixels, self._grid(image.size), image.size)
        _, down, along = grid = self._grid(image.size)
        canvas = resize_on_canvas(image, (along * side, down * side), self.resample)
        tiles = canvas.reshape(down, side, along, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        pixels = np.concatenate([resize(image, (side, side), self.resample)[None], tiles])
        return self._media("image", pixels, grid, image.size)

    @property
    def embedding_field(self) -> str:
        return SIZE_FIELD

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        return self.check(described_size(description))

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        size = described_size(description)
        return self._item("image", key, self._grid(size), size)

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        if not frames or any(frame.size != frames[0].size for frame in frames):
            raise InvalidRequest("a video needs frames, all of the same size", param="video")
        side = self.vision.crops.image_size
        pixels = np.stack([resize(frame, (side, side), self.resample) for frame in frames])
        return self._media("video", pixels, (len(frames), 0, 0), frames[0].size)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Crops, and tiles in a column and in a row, of a picture."""
        if not self.tiled:
            return 1, 0, 0
        down, along = self._tiles(size)
        return 1 + down * along, down, along

    def _tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tiles in a column and in a row for a picture of ``(width, height)``."""
        height, width = best_pinpoint(size, self.vision.pinpoints)
        return height // self.vision.crops.image_size, width // self.vision.crops.image_size

    def _media(
        self, kind: str, pixels: np.ndarray, grid: tuple[int, ...], size: tuple[int, int]
    ) -> PreparedMedia:
        options = {"tiled": self.tiled}
        key = content_hash(pixels, family="llava_onevision", options=options, kind=kind, size=size)
        return PreparedMedia(self._item(kind, key, grid, size), pixels)

    def _item(self, kind: str, key: str, grid: tuple[int, ...], size: tuple[int, int]) -> MediaItem:
        if kind == "image":
            token, rows = self.image_token_id, self.check(size)
        else:
            token, rows = self.video_token_id, grid[0] * (-(-self.vision.crops.grid_side // 2)) ** 2 + 1
        return MediaItem(
            kind=kind,
            hash=key,
            num_tokens=rows,
            grid=grid,
            size=size,
            placeholder=(PlaceholderRun(token, rows, True),),
        )


FAMILY = LlavaOnevisionFamily()
