"""LLaVA-1.5: one CLIP crop per picture, an MLP connector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from engine.checkpoint.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.clip import clip_rules, parse_clip, unused_clip_tensors
from engine.families.parsing.decoder import (
    DecoderKind,
    checkpoint_dtype,
    eos_ids,
    parse_decoder,
    refuse_quantised,
    vision_activation,
)
from engine.media.image_ops import CLIP_MEAN, CLIP_STD, check_aspect_ratio, content_hash, resize
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.vision.crops_config import CropVisionConfig

if TYPE_CHECKING:
    from PIL import Image

    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_CONNECTOR = r"(?:model\.)?multi_modal_projector\."


class LlavaFamily:
    """LLaVA-1.5, 7B and 13B."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        text = {**(raw.get("text_config") or {})}
        kind = text.get("model_type", "llama")
        if kind not in ("llama", "mistral", "qwen2"):
            raise CheckpointError(f"config.json: text model {kind!r} is not supported", param="text_config")
        text["tie_word_embeddings"] = bool(
            raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
        )
        decoder = parse_decoder(text, cast(DecoderKind, kind))
        vision, layers = _vision(raw, checkpoint.preprocessor_config, decoder.hidden_size)
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=vision,
            eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size, defaults=(2,)),
            dtype=checkpoint_dtype(raw, text),
            bos_token_id=text.get("bos_token_id", 1),
            image_token_id=raw.get("image_token_index", raw.get("image_token_id", 32000)),
            extra={"tower_layers": layers},
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="<image>")

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
        return LlavaProcessor.create(checkpoint.preprocessor_config, config)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        assert config.extra is not None
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(
            vision=(
                (_CONNECTOR + r"linear_([12])\.(.*)", r"connector.fc\1.\2"),
                *clip_rules(_TOWER),
            ),
            language=DECODER_RULES,
            ignore=(
                ROTARY_BUFFERS,
                *unused_clip_tensors(_TOWER, config.vision.tower, config.extra["tower_layers"]),
                *tied,
            ),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.vision.crops import CropVisionEncoder

        return CropVisionEncoder(config.vision, build)


def _vision(
    raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int
) -> tuple[CropVisionConfig, int]:
    vision = raw.get("vision_config") or {}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(
            f"config.json: vision tower {vision['model_type']!r} is not supported", param="vision_config"
        )
    layer = raw.get("vision_feature_layer", -2)
    strategy = raw.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int) or strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json: vision_feature_layer {layer!r} with strategy {strategy!r} is not supported",
            param="vision_feature_layer",
        )
    tower, filled = parse_clip(vision, layer)
    config = CropVisionConfig(
        tower=tower,
        image_size=filled["image_size"],
        patch_size=filled["patch_size"],
        keep_class_token=strategy == "full",
        out_features=hidden,
        connector_activation=vision_activation(
            raw.get("projector_hidden_act", "gelu"), "projector_hidden_act"
        ),
        connector_bias=raw.get("multimodal_projector_bias", True),
        mean=tuple(processor.get("image_mean") or CLIP_MEAN),
        std=tuple(processor.get("image_std") or CLIP_STD),
        scale=processor.get("rescale_factor", 1 / 255),
    )
    return config, filled["num_hidden_layers"]


@dataclass(frozen=True, slots=True)
class LlavaProcessor:
    """The shorter side to ``side`` pixels, then the centre square; see
    :class:`engine.families.base.MediaProcessor`."""

    side: int
    rows: int
    image_token_id: int
    resample: int = 3

    @classmethod
    def create(cls, raw: Mapping[str, Any], config: ModelConfig) -> LlavaProcessor:
        vision: CropVisionConfig = config.vision
        side = vision.image_size
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if not raw.get(step, True):
                raise CheckpointError(f"preprocessor_config.json: {step} false is not supported", param=step)
        size, crop = raw.get("size", side), raw.get("crop_size", side)
        if isinstance(size, Mapping):
            size = size.get("shortest_edge")
        if isinstance(crop, Mapping):
            crop = crop.get("height") if crop.get("height") == crop.get("width") else None
        if size != side or crop != side:
            raise CheckpointError(
                f"preprocessor_config.json: size and crop_size should both be the tower's {side} pixels",
                param="size",
            )
        assert config.image_token_id is not None
        return cls(side, vision.rows_per_crop, config.image_token_id, raw.get("resample", 3))

    def check(self, size: tuple[int, int]) -> int:
        check_aspect_ratio(size)
        return self.rows

    def prepare(self, image: Image.Image) -> PreparedMedia:
        self.check(image.size)
        short, long = min(image.size), max(image.size)
        longer = int(self.side * long / short)
        wide = image.width > image.height
        target = (longer, self.side) if wide else (self.side, longer)
        resized = resize(image, target, self.resample)
        offset = (longer - self.side) // 2
        centre = slice(offset, offset + self.side)
        pixels = np.ascontiguousarray(resized[:, centre] if wide else resized[centre])[None]
        options = {"side": self.side, "rows": self.rows}
        key = content_hash(pixels, family="llava", options=options, kind="image", size=image.size)
        return PreparedMedia(self._item(key, image.size), pixels)

    def _item(self, key: str, size: tuple[int, int]) -> MediaItem:
        return MediaItem(
            kind="image",
            hash=key,
            num_tokens=self.rows,
            grid=(1,),
            size=size,
            placeholder=(PlaceholderRun(self.image_token_id, self.rows, True),),
        )

    @property
    def embedding_field(self) -> None:
        return None

    def embedding_rows(self, description: tuple[int, ...] | None) -> int:
        return self.rows

    def describe_embedding(self, description: tuple[int, ...] | None, key: str) -> MediaItem:
        return self._item(key, (self.side, self.side))

    def prepare_video(self, frames: Sequence[Image.Image]) -> PreparedMedia:
        raise InvalidRequest("this model takes pictures, not videos", param="video")


FAMILY = LlavaFamily()
