"""LLaVA: CLIP, SigLIP or Pixtral, an MLP connector, and a decoder of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.llava.pixtral import PixtralProcessor
from engine.families.llava.processor import LlavaProcessor
from engine.families.llava.towers import parse_vision, tower_weights
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.native_config import NativeVisionConfig

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

#: Placeholder strings with a Pixtral tower: of a patch, and of the ends of a line and of the image.
_PIXTRAL_TOKENS = {"image": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}


def _with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers the placeholder strings that the checkpoint's processor uses."""
    tokens = _PIXTRAL_TOKENS if _is_pixtral(config) else {"image": "<image>"}
    stated = checkpoint.json("processor_config.json")
    fields = {"image": "image_token", "break": "image_break_token", "end": "image_end_token"}
    return replace(config, extra={name: stated.get(fields[name], text) for name, text in tokens.items()})


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image"])


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The item's own placeholder; with a Pixtral tower line by line, each ended by a token."""
    if not _is_pixtral(config):
        return item.placeholder
    assert config.extra is not None and config.image_token_id is not None
    ends = [encode(config.extra[name]) for name in ("break", "end")]
    if any(len(ids) != 1 for ids in ends):
        raise CheckpointError(
            "the tokenizer lacks the tokens that end lines of patches: "
            f"{config.extra['break']} and {config.extra['end']}"
        )
    (line_end,), (image_end,) = ends
    _, rows, columns = item.grid
    line = PlaceholderRun(config.image_token_id, columns, True)
    lines = [line, PlaceholderRun(line_end, 1, False)] * rows
    return (*lines[:-1], PlaceholderRun(image_end, 1, False))


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]) -> MediaProcessor:
    kind = PixtralProcessor if _is_pixtral(config) else LlavaProcessor
    return kind.create(checkpoint, config, options)


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.vision.crops import CropVisionEncoder
    from engine.vision.native import NativeVisionEncoder

    if isinstance(config.vision, NativeVisionConfig):
        return NativeVisionEncoder(config.vision, build)
    return CropVisionEncoder(config.vision, build)


def _is_pixtral(config: ModelConfig) -> bool:
    return isinstance(config.vision, NativeVisionConfig)


FAMILY = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("llama", "mistral", "qwen2", "qwen3", "phi3"),
        vision=parse_vision,
        image_token=token_field("image_token_index", "image_token_id", default=32000),
        end_tokens=(2,),
        finish=_with_tokens,
    ),
    prompt_format=_prompt_format,
    placeholder=_placeholder,
    processor=_processor,
    weights=lambda config: tower_weights(config.vision),
    build_encoder=_encoder,
)
