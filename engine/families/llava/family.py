"""LLaVA: CLIP, SigLIP or Pixtral, an MLP connector, and a decoder of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig
from engine.families.encoders import crop_encoder, native_encoder
from engine.families.family import Family
from engine.families.llava.lines import line_placeholder, line_prompt, with_tokens
from engine.families.llava.pixtral import PixtralProcessor
from engine.families.llava.processor import LlavaProcessor
from engine.families.llava.towers import parse_vision, tower_weights
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.native_config import NativeVisionConfig

if TYPE_CHECKING:
    from engine.layers.build import BuildContext


def _with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers the placeholder strings that the checkpoint's processor uses."""
    if _is_pixtral(config):
        return with_tokens(config, checkpoint)
    token = checkpoint.json("processor_config.json").get("image_token", "<image>")
    return replace(config, extra={"image": token})


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The item's own placeholder; with a Pixtral tower line by line."""
    return line_placeholder(config, item, index, encode) if _is_pixtral(config) else item.placeholder


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> MediaProcessor:
    kind = PixtralProcessor if _is_pixtral(config) else LlavaProcessor
    return kind.create(checkpoint, config, options)


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    return (native_encoder if _is_pixtral(config) else crop_encoder)(config, build)


def _is_pixtral(config: ModelConfig) -> bool:
    return isinstance(config.vision, NativeVisionConfig)


FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "granite"),
        vision=parse_vision,
        image_token=token_field("image_token_index", "image_token_id", default=32000),
        end_tokens=(2,),
        finish=_with_tokens,
    ),
    prompt_format=line_prompt,
    placeholder=_placeholder,
    processor=_processor,
    weights=lambda config: tower_weights(config.vision),
    build_encoder=_encoder,
)
