"""LFM3-VL: an LFM3 with a tower whose blocks convolve over the patches of a frame, or attend among them.

Images and videos are Qwen3-VL's, with positions of text. The option ``fps`` states how many of a video's
frames make a second.
"""

from __future__ import annotations

from engine.checkpoint.rules import LFM2_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.model import ConfigReader, nested_text, tied_unless_stated, token_field
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import native_vision
from engine.families.qwen2_vl.processor import QwenProcessor
from engine.families.qwen3_vl.family import VIDEOS, remember_ends, timed_placeholder
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import GridConvConfig, VisionConfig

_TOWER = r"(?:model\.)?vision_tower\."
_PROJECTOR = r"(?:model\.)?multi_modal_projector\."
_LAYER = _TOWER + r"layers\.(\d+)\."
_BLOCK = r"tower.blocks.\1."
_PROJECTOR_NORM_EPS = 1e-6
_PROJECTOR_DEFAULTS = {
    "projector_hidden_act": "gelu",
    "projector_hidden_size": 4096,
    "projector_bias": True,
}
_VISION_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "conv_kernel_size": 3,
    "norm_eps": 1e-5,
    "layer_types": None,
    "rope_theta": 1e6,
}


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    filled = {**_VISION_DEFAULTS, **(raw.get("vision_config") or {}), "width of rows": hidden}
    projector = {**_PROJECTOR_DEFAULTS, **raw}
    heads, shared = integer(filled, "num_attention_heads"), integer(filled, "num_key_value_heads")
    if heads % shared:
        raise CheckpointError(
            f"config.json: num_key_value_heads {shared} of the vision part should divide its {heads} heads",
            param="num_key_value_heads",
        )

    def tower(width: int, patch_dim: int) -> VisionConfig:
        eps = number(filled, "norm_eps")
        return VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=integer(filled, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=shared,
            patch_dim=patch_dim,
            bias=False,
            qk_norm_eps=eps,
            qk_norm_each=True,
            activation="silu",
            gated_mlp=True,
            norm="rms",
            norm_eps=eps,
            pre_norm=True,
            rope_theta=axial_theta(filled),
            conv=_convolutions(filled),
        )

    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="width of rows",
        tower=tower,
        merger_norm="layer",
        merger_norm_eps=_PROJECTOR_NORM_EPS,
        merger_mlp=MLPConfig(
            vision_activation(projector["projector_hidden_act"], "projector_hidden_act"),
            flag(projector, "projector_bias"),
        ),
        merger_hidden=integer(projector, "projector_hidden_size"),
    )


def _convolutions(filled: Json) -> GridConvConfig | None:
    """The blocks that convolve: those of ``layer_types``, or the first two and each second one.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    layers, kinds = integer(filled, "num_hidden_layers"), filled["layer_types"]
    if kinds is None:
        kinds = ["conv" if layer < 2 or layer % 2 else "full_attention" for layer in range(layers)]
    known = {"conv", "full_attention"}
    if not isinstance(kinds, list) or len(kinds) != layers or not known.issuperset(map(str, kinds)):
        raise CheckpointError(
            f"config.json: layer_types of the vision part should name conv or full_attention for each of "
            f"{layers} layers",
            param="layer_types",
        )
    size = integer(filled, "conv_kernel_size")
    if not size % 2:
        raise CheckpointError(f"config.json: conv_kernel_size {size} should be odd", param="conv_kernel_size")
    found = tuple(layer for layer, kind in enumerate(kinds) if kind == "conv")
    return GridConvConfig(found, size, integer(filled, "spatial_merge_size")) if found else None


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            # Transformers' name of the projection, and the published one.
            (_TOWER + r"(?:patch_embed|patchifier)\.(.*)", r"tower.patch_embed.\1"),
            (_TOWER + r"embedding_norm\.(.*)", r"tower.pre_norm.\1"),
            (_LAYER + r"operator_norm\.(.*)", _BLOCK + r"norm1.\2"),
            (_LAYER + r"ffn_norm\.(.*)", _BLOCK + r"norm2.\2"),
            (_LAYER + r"conv\.spatial_conv\.(.*)", _BLOCK + r"attn.conv.\2"),
            (_LAYER + r"conv\.((?:in|out)_proj\..*)", _BLOCK + r"attn.\2"),
            (_LAYER + r"self_attn\.out_proj\.(.*)", _BLOCK + r"attn.proj.\2"),
            (_LAYER + r"self_attn\.([qk])_(?:layer)?norm\.(.*)", _BLOCK + r"attn.\2_norm.\3"),
            (_LAYER + r"self_attn\.([qkv]_proj\..*)", _BLOCK + r"attn.\2"),
            (_LAYER + r"feed_forward\.w1\.(.*)", _BLOCK + r"mlp.gate_proj.\2"),
            (_LAYER + r"feed_forward\.w2\.(.*)", _BLOCK + r"mlp.down_proj.\2"),
            (_LAYER + r"feed_forward\.w3\.(.*)", _BLOCK + r"mlp.up_proj.\2"),
            (_PROJECTOR + r"layer_norm\.(.*)", r"merger.norm.\1"),
            (_PROJECTOR + r"linear_([12])\.(.*)", r"merger.mlp.fc\1.\2"),
        ),
        language=LFM2_RULES,
    )


FAMILY = Family(
    name="lfm3_vl",
    architectures=("Lfm3VlForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("lfm3", text_may_tie=False)),
        vision=_vision,
        image_token=token_field("image_token_id", default=125030),
        video_token=token_field("video_token_id", default=125029),
        finish=remember_ends(125009, 125010),
    ),
    prompt_format=lambda config: PromptFormat(image="<|image_pad|>", video="<|video_pad|>"),
    placeholder=timed_placeholder,
    processor=QwenProcessor.with_videos(VIDEOS),
    options=("min_pixels", "max_pixels", "fps"),
    weights=_weights,
    build_encoder=native_encoder,
)
