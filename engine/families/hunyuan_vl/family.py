"""HunyuanOCR: a ViT with positions stretched over an image, learned rows around it and behind its lines, and
M-RoPE of four axes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.checkpoint.rules import HUNYUAN_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.hunyuan_vl.processor import HunyuanProcessor
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer, number, vision_activation, with_aliases
from engine.families.parsing.model import ConfigReader, remember_tokens, token_field
from engine.families.qwen2_vl.config import native_vision
from engine.families.qwen2_vl.processor import ImageRules, VideoRules
from engine.prompt import MediaSpan
from engine.vision.native_config import FramedMergerConfig, NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

_TOWER = r"(?:model\.vision_tower|(?:model\.)?vit)\."
_LAYER = _TOWER + r"layers\.(\d+)\."
_MERGER = _TOWER + r"(?:patch_merger|perceive)\."
#: The tokenizer's field of the token whose places rows take, and the public model's value.
_TOKENS = {"image_token": "<｜hy_place▁holder▁no▁102｜>"}
#: Fields of the decoder, and the names that public files have for them.
_ALIASES = {"head_dim": "attention_head_dim", "vocab_size": "org_vocab_size"}
_INTERPOLATIONS = ("bilinear", "bicubic")


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    """The decoder's fields, in ``text_config`` or, as in public checkpoints, in config.json itself.

    Embeddings are tied unless config.json and its ``text_config`` both deny it, as in Transformers.
    """
    nested = raw.get("text_config")
    fields = with_aliases(nested or raw, _ALIASES)
    denied = [part.get("tie_word_embeddings", True) for part in (raw, nested or {})]
    return {**fields, "tie_word_embeddings": any(denied)}, "hunyuan_vl_text"


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    filled = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "max_image_size": 2048,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "interpolate_mode": "bilinear",
        **(raw.get("vision_config") or {}),
        "out": hidden,
    }
    if filled["interpolate_mode"] not in _INTERPOLATIONS:
        raise CheckpointError(
            f"config.json: vision_config.interpolate_mode {filled['interpolate_mode']!r} is not supported; "
            f"{' and '.join(_INTERPOLATIONS)} are",
            param="vision_config",
        )
    if integer(filled, "temporal_patch_size") != 1:
        raise CheckpointError(
            "config.json: vision_config.temporal_patch_size should be 1", param="vision_config"
        )
    activation, eps = vision_activation(filled["hidden_act"]), number(filled, "rms_norm_eps")

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=integer(filled, "num_hidden_layers"),
            num_heads=integer(filled, "num_attention_heads"),
            patch_dim=patch_dim,
            patch_bias=True,
            activation=activation,
            norm_eps=eps,
        )

    return native_vision(
        {**filled, "in_channels": filled["num_channels"]},
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out",
        tower=tower,
        position_side=integer(filled, "max_image_size") // integer(filled, "patch_size"),
        position_corners=False,
        position_class=True,
        position_cubic=filled["interpolate_mode"] == "bicubic",
        framed=FramedMergerConfig(activation, eps),
    )


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image_token"], adds_special=False)


def _positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> tuple[np.ndarray, int]:
    """Positions on the axes index, column, line, and number of the image; files of three axes lack the first.

    They are a token's index, but for the rows of an image between its first and its last one: these have
    places of their own on the last three.
    """
    axes, merge = config.decoder.rope.num_axes, config.vision.merge_size
    positions = np.tile(np.arange(len(ids), dtype=np.int64), (axes, 1))
    for image, span in enumerate(spans):
        _, height, width = span.item.grid
        lines, columns = height // merge, width // merge + 1
        first = span.offset + 1
        own = positions[axes - 3 :, first : first + lines * columns]
        own[1], own[0] = np.divmod(np.arange(lines * columns), columns)
        own[2] = image
    return positions, 0


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=HUNYUAN_RULES,
        vision=(
            (_TOWER + r"embeddings\.patch_embedding\.(.*)", r"tower.patch_embed.\1"),
            (_TOWER + r"embeddings\.position_embedding\.weight", "position_embedding"),
            (_LAYER + r"(?:layer_norm1|input_layernorm)\.(.*)", r"tower.blocks.\1.norm1.\2"),
            (_LAYER + r"(?:layer_norm2|post_attention_layernorm)\.(.*)", r"tower.blocks.\1.norm2.\2"),
            (_LAYER + r"self_attn\.o_proj\.(.*)", r"tower.blocks.\1.attn.proj.\2"),
            (_LAYER + r"self_attn\.(.*)", r"tower.blocks.\1.attn.\2"),
            (_LAYER + r"mlp\.(?:fc1|dense_h_to_4h)\.(.*)", r"tower.blocks.\1.mlp.fc1.\2"),
            (_LAYER + r"mlp\.(?:fc2|dense_4h_to_h)\.(.*)", r"tower.blocks.\1.mlp.fc2.\2"),
            (_MERGER + r"before_rms\.(.*)", r"merger.norm.\1"),
            (_MERGER + r"(?:proj_conv|proj\.0)\.(.*)", r"merger.squares.fc1.\1"),
            (_MERGER + r"(?:proj_out|proj\.2)\.(.*)", r"merger.squares.fc2.\1"),
            (_MERGER + r"mlp\.(.*)", r"merger.proj.\1"),
            (_MERGER + r"image_(newline|begin|end)", r"merger.\1"),
            (_MERGER + r"after_rms\.(.*)", r"merger.out_norm.\1"),
        ),
        ignore=(_MERGER + "image_sep",),
    )


FAMILY = Family(
    name="hunyuan_vl",
    architectures=("HunYuanVLForConditionalGeneration",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=120120),
        finish=remember_tokens(_TOKENS),
    ),
    prompt_format=_prompt_format,
    positions=_positions,
    processor=HunyuanProcessor.with_videos(VideoRules(), ImageRules(bounds=(512 * 512, 2048 * 2048))),
    options=("min_pixels", "max_pixels"),
    weights=_weights,
    build_encoder=native_encoder,
)
