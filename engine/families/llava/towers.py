"""LLaVA's towers: CLIP and SigLIP for square crops, Pixtral for images of any size."""

from __future__ import annotations

from typing import Any

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, integer, vision_activation
from engine.families.parsing.processor import parse_normalisation, parse_projector
from engine.families.parsing.tower import (
    axial_theta,
    feature_states,
    parse_clip,
    parse_siglip,
    tower_rules,
    unused_layers,
    unused_tensors,
)
from engine.vision.crops_config import CropVisionConfig
from engine.vision.mlp_config import MLPConfig
from engine.vision.native_config import NativeVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION, HALF_NORMALISATION
from engine.vision.transformer_config import VisionConfig

TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
CONNECTOR = r"(?:model\.)?multi_modal_projector\."

_PIXTRAL_DEFAULTS = {
    # Those of Transformers' PixtralVisionConfig.
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu",
}
PIXTRAL_LAYERS = r"transformer\.layers\."
_PIXTRAL_NORM_EPS = 1e-5


def parse_vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig | NativeVisionConfig:
    """The tower and the connector of config.json.

    Args:
        raw: config.json.
        processor: preprocessor_config.json.
        hidden: the decoder's hidden size.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    kind = (raw.get("vision_config") or {}).get("model_type", "clip_vision_model")
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json: vision_feature_select_strategy should be default or full, not {strategy!r}",
            param="vision_feature_select_strategy",
        )
    if kind in ("clip_vision_model", "siglip_vision_model"):
        return _square(raw, processor, hidden, strategy, clip=kind == "clip_vision_model")
    if kind == "pixtral":
        if strategy != "full":
            raise CheckpointError(
                "config.json: vision_feature_select_strategy should be full for a tower of the kind pixtral",
                param="vision_feature_select_strategy",
            )
        return parse_pixtral(
            raw, processor, hidden, layer=raw.get("vision_feature_layer", -2), mlp=parse_projector(raw)
        )
    raise CheckpointError(
        f"config.json: vision tower {kind!r} is not supported; clip_vision_model, siglip_vision_model and "
        "pixtral are",
        param="vision_config",
    )


def _square(raw: Json, processor: Json, hidden: int, strategy: str, *, clip: bool) -> CropVisionConfig:
    vision, layer = raw.get("vision_config") or {}, raw.get("vision_feature_layer", -2)
    parse = parse_clip if clip else parse_siglip
    tower = parse(vision, feature_layer=layer)
    siglip_processor = str(processor.get("image_processor_type", "")).startswith("Siglip")
    return tower.crops(
        # The first token is the class token only of CLIP; of SigLIP it is the first patch.
        drop_first=strategy == "default",
        out_features=hidden,
        normalisation=parse_normalisation(
            processor, HALF_NORMALISATION if siglip_processor else CLIP_NORMALISATION
        ),
        mlp=parse_projector(raw),
    )


def parse_pixtral(
    raw: Json, processor: Json, hidden: int, *, layer: Any, mlp: MLPConfig
) -> NativeVisionConfig:
    """A Pixtral tower, with an MLP that makes a row of each patch.

    Args:
        raw, processor, hidden: as :func:`parse_vision`.
        layer: ``vision_feature_layer``, as :func:`engine.families.parsing.tower.parse_clip` takes it.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    stated = {key: value for key, value in (raw.get("vision_config") or {}).items() if value is not None}
    filled = {**_PIXTRAL_DEFAULTS, **stated}
    if integer(filled, "num_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    layers, patch = integer(filled, "num_hidden_layers"), integer(filled, "patch_size")
    used, features = feature_states(layer, layers)
    tower = VisionConfig(
        hidden_size=integer(filled, "hidden_size"),
        intermediate_size=integer(filled, "intermediate_size"),
        num_layers=used,
        stored_layers=layers,
        num_heads=integer(filled, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        bias=False,
        activation=vision_activation(filled["hidden_act"]),
        gated_mlp=True,
        norm="rms",
        norm_eps=_PIXTRAL_NORM_EPS,
        pre_norm=True,
        rope_theta=axial_theta(filled),
        rope_alternates=True,
        features=features,
    )
    return NativeVisionConfig(
        tower=tower,
        patch_size=patch,
        merge_size=1,
        temporal_patch_size=1,
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        mlp=mlp,
    )


def tower_weights(vision: CropVisionConfig | NativeVisionConfig) -> WeightRules:
    """The names of the tower's and the connector's tensors."""
    connector = ((CONNECTOR + r"linear_([12])\.(.*)", _connector(vision) + r".fc\1.\2"),)
    if isinstance(vision, CropVisionConfig):
        return WeightRules(
            vision=(*connector, *tower_rules(TOWER)), ignore=unused_tensors(TOWER, vision.tower)
        )
    return WeightRules(
        vision=(*connector, *pixtral_rules(TOWER)), ignore=unused_layers(TOWER + PIXTRAL_LAYERS, vision.tower)
    )


def _connector(vision: CropVisionConfig | NativeVisionConfig) -> str:
    return "connector" if isinstance(vision, CropVisionConfig) else "merger"


def pixtral_rules(prefix: str) -> tuple[tuple[str, str], ...]:
    """Rename rules of a Pixtral tower; ``prefix`` as :func:`engine.families.parsing.tower.tower_rules`."""
    layer = prefix + PIXTRAL_LAYERS + r"(\d+)\."
    return (
        (prefix + r"patch_conv\.(.*)", r"tower.patch_embed.\1"),
        (prefix + r"ln_pre\.(.*)", r"tower.pre_norm.\1"),
        (layer + r"attention_norm\.(.*)", r"tower.blocks.\1.norm1.\2"),
        (layer + r"ffn_norm\.(.*)", r"tower.blocks.\1.norm2.\2"),
        (layer + r"attention\.o_proj\.(.*)", r"tower.blocks.\1.attn.proj.\2"),
        (layer + r"attention\.([qkv]_proj\..*)", r"tower.blocks.\1.attn.\2"),
        (layer + r"feed_forward\.(.*)", r"tower.blocks.\1.mlp.\2"),
    )
