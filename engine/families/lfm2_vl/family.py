"""LFM2-VL: SigLIP2 for images of any size, large ones in tiles and as a whole, before an LFM2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING

from engine.checkpoint.rules import LFM2_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.lfm2_vl.config import TileVisionConfig, pieces
from engine.families.lfm2_vl.processor import Lfm2VlProcessor
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, flag, integer, vision_activation
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.mlp_config import MLPConfig
from engine.vision.normalisation import HALF_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."
_IMAGE = "<image>"
_DEFAULTS = {
    "downsample_factor": 2,
    "projector_hidden_act": "gelu",
    "projector_hidden_size": 2560,
    "projector_bias": True,
    "projector_use_layernorm": True,
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    """The decoder's fields. Whether embeddings are tied is stated beside them, under one of two names."""
    tied = raw.get("tie_embedding", raw.get("tie_word_embeddings", True))
    stated = {key: value for key, value in (raw.get("text_config") or {}).items() if key != "tie_embedding"}
    fields = nested_text("lfm2", text_may_tie=False)
    return fields({**raw, "tie_word_embeddings": tied, "text_config": stated})


def _vision(raw: Json, processor: Json, hidden: int) -> TileVisionConfig:
    filled, stated = {**_DEFAULTS, **raw}, raw.get("vision_config") or {}
    positions = integer({"num_patches": 256, **stated}, "num_patches")
    side = isqrt(positions)
    if side * side != positions:
        raise CheckpointError(
            f"config.json: num_patches {positions} of the vision part should be a square number",
            param="num_patches",
        )
    patch = integer({"patch_size": 16, **stated}, "patch_size")
    tower = parse_siglip({**stated, "image_size": side * patch})
    return TileVisionConfig(
        tower=replace(tower.config, num_positions=0),
        patch_size=patch,
        position_side=side,
        merge_size=integer(filled, "downsample_factor"),
        norm=flag(filled, "projector_use_layernorm"),
        hidden_size=integer(filled, "projector_hidden_size"),
        mlp=MLPConfig(
            vision_activation(filled["projector_hidden_act"], "projector_hidden_act"),
            flag(filled, "projector_bias"),
        ),
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
    )


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The tiles row by row, each after the token of its row and column, then the whole image."""
    rows, columns, *_ = item.grid
    names = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(rows) for column in range(columns)]
    sizes = pieces(item.grid)
    names += ["<|img_thumbnail|>" if rows else ""] * (len(sizes) - len(names))
    text = "".join(name + _IMAGE for name in names)
    text = f"<|image_start|>{text}<|image_end|>"
    counts = iter(height * width // config.vision.merge_size**2 for height, width in sizes)
    return runs_with_rows(encode(text), config.image_token_id, counts)


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (_TOWER + r"embeddings\.position_embedding\.weight", "position_embedding"),
            *tower_rules(_TOWER),
            (_PROJECTOR + r"layer_norm\.(.*)", r"norm.\1"),
            (_PROJECTOR + r"linear_([12])\.(.*)", r"projector.fc\1.\2"),
        ),
        language=LFM2_RULES,
        ignore=unused_tensors(_TOWER, config.vision.tower),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.lfm2_vl.encoder import TileVisionEncoder

    return TileVisionEncoder(config.vision, build)


FAMILY = Family(
    name="lfm2_vl",
    architectures=("Lfm2VlForConditionalGeneration",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=396),
    ),
    prompt_format=lambda config: PromptFormat(image=_IMAGE, adds_special=False),
    placeholder=_placeholder,
    processor=Lfm2VlProcessor.create,
    options=("do_image_splitting", "max_image_tokens"),
    weights=_weights,
    build_encoder=_encoder,
)
