"""Ovis2: an AIMv2 tower that reads images as words of a visual vocabulary, and Qwen2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.ovis2.layout import INDICATORS, parts
from engine.families.ovis2.processor import Ovis2Processor
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import require_squares
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.crops_config import CropVisionConfig, VisualVocabulary
from engine.vision.normalisation import CLIP_NORMALISATION
from engine.vision.transformer_config import VisionConfig

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

#: Of Transformers' Ovis2VisionConfig.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "rms_norm_eps": 1e-5,
    "qkv_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "vocab_size": 16384,
    "hidden_stride": 1,
    "num_visual_indicator_tokens": 5,
    "tokenize_function": "softmax",
}
_INDICATOR_IDS = (151666, 151667, 151668, 151669, 151670)
_TOWER = r"(?:model\.)?vision_tower\."
_LAYER = _TOWER + r"transformer\.encoder\.layers\.(\d+)\."
_BLOCK = r"crops.tower.blocks.\1."


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    stated = raw.get("vision_config") or {}
    filled = {**_DEFAULTS, **{field: value for field, value in stated.items() if value is not None}}
    image, patch = integer(filled, "image_size"), integer(filled, "patch_size")
    how = filled["tokenize_function"]
    if how not in ("softmax", "st_argmax"):
        raise CheckpointError(
            f"config.json: tokenize_function {how!r} is not supported; softmax and st_argmax are",
            param="tokenize_function",
        )
    for field, wanted in (("num_channels", 3), ("num_visual_indicator_tokens", len(INDICATORS))):
        if integer(filled, field) != wanted:
            raise CheckpointError(f"config.json: {field} should be {wanted}", param=field)
    words, stride = integer(filled, "vocab_size"), integer(filled, "hidden_stride")
    require_squares(image // patch, stride, "hidden_stride")
    tower = VisionConfig(
        hidden_size=integer(filled, "hidden_size"),
        intermediate_size=integer(filled, "intermediate_size"),
        num_layers=integer(filled, "num_hidden_layers"),
        num_heads=integer(filled, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        patch_bias=True,
        # The output of attention has a bias where queries, keys and values have.
        bias=flag(filled, "qkv_bias"),
        mlp_bias=flag(filled, "mlp_bias"),
        activation=vision_activation(filled["hidden_act"]),
        gated_mlp=True,
        norm="rms",
        norm_eps=number(filled, "rms_norm_eps"),
        num_positions=(image // patch) ** 2,
        pre_norm=True,
        positions_last=True,
        post_norm=True,
    )
    return CropVisionConfig(
        tower=tower,
        image_size=image,
        patch_size=patch,
        drop_first=False,
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        mlp=None,
        pixel_shuffle=stride,
        vocabulary=VisualVocabulary(words, len(INDICATORS), hard=how == "st_argmax"),
    )


def _finish(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remember the ids of the indicators; refuse sizes beside the decoder's that differ from its own."""
    raw, decoder = checkpoint.config, config.decoder
    for field, ours in (("vocab_size", decoder.vocab_size), ("hidden_size", decoder.hidden_size)):
        if raw.get(field, ours) != ours:
            raise CheckpointError(
                f"config.json: {field} {raw[field]!r} differs from the {ours} of text_config", param=field
            )
    ids = raw.get("visual_indicator_token_ids", _INDICATOR_IDS)
    if not isinstance(ids, list | tuple) or len(ids) != len(INDICATORS):
        raise CheckpointError(
            f"config.json: visual_indicator_token_ids should be {len(INDICATORS)} ids, not {ids!r}",
            param="visual_indicator_token_ids",
        )
    return replace(config, extra={"indicators": tuple(ids)})


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """An image's parts. All are rows of the encoder, also those that mark parts."""
    assert config.extra is not None and config.image_token_id is not None
    assert isinstance(config.vision, CropVisionConfig)
    ids = list(config.extra["indicators"])
    if encode("".join(INDICATORS)) != ids:
        raise CheckpointError(
            f"config.json: visual_indicator_token_ids should be the ids of {', '.join(INDICATORS)}",
            param="visual_indicator_token_ids",
        )
    rows = config.vision.rows_per_crop
    return tuple(
        PlaceholderRun(config.image_token_id, rows, True)
        if part is None
        else PlaceholderRun(ids[part], 1, True)
        for part in parts(item.grid)
    )


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (r"(?:model\.)?visual_embeddings_table\.weight", "crops.connector.table"),
            (_TOWER + r"head_linear\.(.*)", r"crops.connector.head.\1"),
            (_TOWER + r"head_norm\.(.*)", r"crops.connector.norm.\1"),
            (_TOWER + r"transformer\.embeddings\.patch_embedding\.(.*)", r"crops.tower.patch_embed.\1"),
            (
                _TOWER + r"transformer\.embeddings\.position_embedding\.weight",
                "crops.tower.position_embedding",
            ),
            (_TOWER + r"transformer\.embeddings\.rms_norm\.(.*)", r"crops.tower.pre_norm.\1"),
            (_TOWER + r"transformer\.rms_norm\.(.*)", r"crops.tower.post_norm.\1"),
            (_LAYER + r"rms_norm([12])\.(.*)", _BLOCK + r"norm\2.\3"),
            (_LAYER + r"attention\.out_proj\.(.*)", _BLOCK + r"attn.proj.\2"),
            (_LAYER + r"attention\.([qkv]_proj\..*)", _BLOCK + r"attn.\2"),
            (_LAYER + r"ffn\.(.*)", _BLOCK + r"mlp.\2"),
        ),
        ignore=(_TOWER + r"transformer\.embeddings\.position_ids",),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.ovis2.encoder import Ovis2VisionEncoder

    return Ovis2VisionEncoder(config.vision, build)


FAMILY = Family(
    name="ovis2",
    architectures=("Ovis2ForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("qwen2", "qwen3", "llama")),
        vision=_vision,
        image_token=token_field("image_token_id", "image_token_index", default=151665),
        finish=_finish,
    ),
    prompt_format=lambda config: PromptFormat(image="<image>"),
    placeholder=_placeholder,
    processor=Ovis2Processor.create,
    options=("crop_to_patches", "max_patches"),
    weights=_weights,
    build_encoder=_encoder,
)
