"""Aya Vision and Command A Vision: tiles and the whole, SigLIP, a gated connector, and Cohere 1 or 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.aya_vision.processor import AyaVisionProcessor
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family, Options
from engine.families.llava.towers import CONNECTOR, TOWER
from engine.families.parsing.fields import Json, integer, number
from engine.families.parsing.model import (
    ConfigReader,
    named_tokens,
    nested_text,
    tied_unless_stated,
    token_field,
)
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, require_squares, tower_rules, unused_tensors
from engine.families.tiles import part_runs
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.crops_config import CropVisionConfig, GatedSquares
from engine.vision.normalisation import CLIP_NORMALISATION

_AYA, _COMMAND = (f"{name}ForConditionalGeneration" for name in ("AyaVision", "Cohere2Vision"))
#: The texts of an image in Aya Vision, by the fields of processor_config.json, and the usual values.
_AYA_TEXTS = {
    "image_token": "<image>",
    "start_of_img_token": "<|START_OF_IMG|>",
    "tile_token": "TILE",
    "tile_global_token": "TILE_GLOBAL",
    "img_patch_token": "<|IMG_PATCH|>",
    "end_of_img_token": "<|END_OF_IMG|>",
}
#: Those in Command A Vision, by the tokenizer's fields.
_COMMAND_TOKENS = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
    "eoi_token": "<|END_OF_IMG|>",
}


def _is_aya(raw: Json) -> bool:
    return _AYA in (raw.get("architectures") or [])


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    stated = raw.get("vision_config") or {}
    kind = stated.get("model_type", "siglip_vision_model")
    if kind != "siglip_vision_model":
        raise CheckpointError(
            f"config.json: vision tower {kind!r} is not supported; siglip_vision_model is",
            param="vision_config",
        )
    if _is_aya(raw):
        strategy = raw.get("vision_feature_select_strategy", "full")
        if strategy != "full":
            raise CheckpointError(
                f"config.json: vision_feature_select_strategy {strategy!r} is not supported; full is",
                param="vision_feature_select_strategy",
            )
        tower = parse_siglip(stated, feature_layer=raw.get("vision_feature_layer", -1))
        if tower.config.features:
            raise CheckpointError(
                "config.json: vision_feature_layer should be one layer", param="vision_feature_layer"
            )
        inner, eps = {"alignment_intermediate_size": hidden, **raw}, {"adapter_layer_norm_eps": 1e-6, **raw}
        gated = GatedSquares(_half(inner), number(eps, "adapter_layer_norm_eps"))
    else:
        tower = parse_siglip(stated)
        gated = GatedSquares(_half({"alignment_intermediate_size": 36864, **raw}))
    factor = integer({"downsample_factor": 2, **raw}, "downsample_factor")
    require_squares(tower.grid_side, factor, "downsample_factor")
    return tower.crops(
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        pixel_shuffle=factor,
        gated=gated,
    )


def _half(raw: Json) -> int:
    """The connector's hidden width: half of what makes gates and their factors."""
    both = integer(raw, "alignment_intermediate_size", least=2)
    if both % 2:
        raise CheckpointError(
            f"config.json: alignment_intermediate_size should be even, not {both}",
            param="alignment_intermediate_size",
        )
    return both // 2


def _with_texts(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers the texts around an image's rows."""
    if config.architecture == _COMMAND:
        return replace(config, extra=named_tokens(checkpoint, _COMMAND_TOKENS))
    stated = checkpoint.json("processor_config.json")
    return replace(config, extra={name: stated.get(name, usual) for name, usual in _AYA_TEXTS.items()})


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image_token"])


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """An image's crops between two tokens: with Aya Vision each after its name, else each before a token."""
    assert config.extra is not None
    crops, texts = item.grid[0], config.extra
    if config.architecture == _COMMAND:
        row = texts["image_token"]
        text = f"{texts['boi_token']}{(row + texts['img_line_break_token']) * crops}{texts['eoi_token']}"
    else:
        row = texts["img_patch_token"]
        names = [f"{texts['tile_token']}_{number}" for number in range(1, crops)]
        within = "".join(name + row for name in [*names, texts["tile_global_token"]])
        text = texts["start_of_img_token"] + within + texts["end_of_img_token"]
    return part_runs(config, item, crops, encode(text), row)


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Options) -> AyaVisionProcessor:
    return AyaVisionProcessor.create(checkpoint, config, options, enlarging=config.architecture == _COMMAND)


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (CONNECTOR + r"layernorm\.(.*)", r"connector.norm.\1"),
            (CONNECTOR + r"linear_1\.(.*)", r"connector.up_gate_proj.\1"),
            (CONNECTOR + r"linear_2\.(.*)", r"connector.down_proj.\1"),
            *tower_rules(TOWER),
        ),
        ignore=unused_tensors(TOWER, config.vision.tower),
    )


FAMILY = Family(
    name="aya_vision",
    architectures=(_AYA, _COMMAND),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("cohere2", "cohere")),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=255036),
        finish=_with_texts,
    ),
    prompt_format=_prompt_format,
    placeholder=_placeholder,
    processor=_processor,
    options=("crop_to_patches", "max_patches"),
    weights=_weights,
    build_encoder=crop_encoder,
)
