"""InternVL 3 and 3.5, and Qianfan-OCR: tiles and a thumbnail, InternViT, and Qwen2, Qwen3 or Llama."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.checkpoint.rules import DECODER_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.internvl.processor import InternVLProcessor
from engine.families.internvl.tower import (
    parse_tower,
    published_rules,
    tower_rules,
    unused_published,
    unused_tensors,
)
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, vision_activation
from engine.families.parsing.model import (
    ConfigReader,
    nested_text,
    remember_tokens,
    tied_unless_stated,
    token_field,
)
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import SquareTower, require_squares
from engine.families.tiles import part_runs
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.crops_config import CropVisionConfig
from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import CLIP_NORMALISATION, Normalisation

#: The tokenizer's fields of the tokens of images and videos, and the public models' values.
TOKENS = {
    "start_image_token": "<img>",
    "context_image_token": "<IMG_CONTEXT>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
_INTERNVL, _QIANFAN = (f"{name}ForConditionalGeneration" for name in ("InternVL", "QianfanOCR"))
#: Transformers 5 saves the decoder's layers by such names; the public files have no ``encoder`` there.
_SAVED_LAYERS = r"language_model\.model\.encoder\.(layers\..*)", r"\1"
_CONNECTOR = r"(?:model\.)?multi_modal_projector\."


def _is_qianfan(raw: Json) -> bool:
    return _QIANFAN in (raw.get("architectures") or [])


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    if _is_qianfan(raw):
        return nested_text("qwen3", "qwen2", "llama", "qwen3_moe")(raw)
    return tied_unless_stated(nested_text("qwen2", "qwen3", "llama", "qwen3_moe"))(raw)


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy {strategy!r} is not supported; default is",
            param="vision_feature_select_strategy",
        )
    stated = {"attention_bias": _is_qianfan(raw), **(raw.get("vision_config") or {})}
    tower = parse_tower(stated, raw.get("vision_feature_layer", -1))
    activation = vision_activation(raw.get("projector_hidden_act", "gelu"), "projector_hidden_act")
    normalisation = parse_normalisation(processor, CLIP_NORMALISATION)
    return shuffled_crops(raw, tower, hidden, normalisation, activation)


def shuffled_crops(
    raw: Json, tower: SquareTower, hidden: int, normalisation: Normalisation, activation: str
) -> CropVisionConfig:
    """A tower with the connector whose squares ``downsample_ratio`` of config.json (``raw``) states.

    Raises:
        CheckpointError: the squares don't divide a crop.
    """
    factor = _shuffle(raw.get("downsample_ratio", 0.5))
    require_squares(tower.grid_side, factor, "downsample_ratio", f"1/{factor}")
    return tower.crops(
        drop_first=True,
        out_features=hidden,
        normalisation=normalisation,
        mlp=MLPConfig(activation),
        pixel_shuffle=factor,
        shuffled_mlp=True,
    )


def _shuffle(ratio: Any) -> int:
    """Side of the squares of patches that become rows, for ``downsample_ratio``."""
    factor = round(1 / ratio) if isinstance(ratio, int | float) and 0 < ratio <= 1 else 0
    if not factor or 1 / factor != ratio:
        raise CheckpointError(
            f"config.json: downsample_ratio should be 1 divided by a whole number, not {ratio!r}",
            param="downsample_ratio",
        )
    return factor


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    if config.architecture == _QIANFAN:
        return PromptFormat(image="<image>")
    return PromptFormat(
        image=config.extra["context_image_token"],
        video=config.extra["video_token"],
        video_prefix="Frame1: ",
    )


def crop_placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """An image's crops between two tokens; a video's frames likewise, each but the first after its number."""
    assert config.extra is not None
    start, row, end = (config.extra[name] for name in tuple(TOKENS)[:3])
    frame = f"{start}{row}{end}"
    frames = item.grid[0] if item.kind == "video" else 1
    text = frame + "".join(f"\nFrame{number}: {frame}" for number in range(2, frames + 1))
    return part_runs(config, item, frames, encode(text), row)


def _weights(config: ModelConfig) -> WeightRules:
    if config.architecture == _QIANFAN:
        return WeightRules(
            language=(_SAVED_LAYERS, *DECODER_RULES),
            vision=published_rules(),
            ignore=unused_published(config.vision.tower),
        )
    return WeightRules(
        vision=(
            (_CONNECTOR + r"layer_norm\.(.*)", r"connector.norm.\1"),
            (_CONNECTOR + r"linear_([12])\.(.*)", r"connector.mlp.fc\1.\2"),
            *tower_rules(),
        ),
        ignore=unused_tensors(config.vision.tower),
    )


FAMILY = Family(
    name="internvl",
    architectures=(_INTERNVL, _QIANFAN),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=151667),
        finish=remember_tokens(TOKENS),
    ),
    prompt_format=_prompt_format,
    placeholder=crop_placeholder,
    processor=InternVLProcessor.create,
    options=("crop_to_patches", "max_patches"),
    weights=_weights,
    build_encoder=crop_encoder,
)
