"""CLIP towers inside of families: their configuration, and the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.decoder import integer, vision_activation
from engine.vision.transformer_config import VisionConfig

_DEFAULTS: dict[str, Any] = {
    # CLIP ViT-L/14-336, which LLaVA's files describe in part and Phi-3.5-vision's not at all.
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def parse_clip(raw: Mapping[str, Any], feature_layer: int) -> tuple[VisionConfig, dict[str, Any]]:
    """The tower down to the layer whose output is taken, and its JSON filled up with defaults.

    Args:
        feature_layer: index into the tower's hidden states, 0 being the embeddings; negative from the end.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    filled = {**_DEFAULTS, **{key: value for key, value in raw.items() if value is not None}}
    layers = integer(filled, "num_hidden_layers")
    used = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 < used <= layers:
        raise CheckpointError(
            f"config.json: vision_feature_layer {feature_layer} is not in a tower of {layers} layers",
            param="vision_feature_layer",
        )
    image, patch = integer(filled, "image_size"), integer(filled, "patch_size")
    tower = VisionConfig(
        hidden_size=integer(filled, "hidden_size"),
        intermediate_size=integer(filled, "intermediate_size"),
        num_layers=used,
        num_heads=integer(filled, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        activation=vision_activation(filled["hidden_act"]),
        norm_eps=float(filled["layer_norm_eps"]),
        class_token=True,
        num_positions=(image // patch) ** 2 + 1,
        pre_norm=True,
    )
    return tower, filled


def clip_rules(prefix: str, module: str = "tower.") -> tuple[tuple[str, str], ...]:
    """Rename rules of a CLIP or SigLIP tower.

    Args:
        prefix: regular expression for what comes before the tower's own names, without groups.
        module: where the tower is in the encoder.
    """
    layer = prefix + r"encoder\.layers\.(\d+)\."
    block = module + r"blocks.\1."
    return (
        (prefix + r"embeddings\.class_embedding", module + "class_embedding"),
        (prefix + r"embeddings\.patch_embedding\.(.*)", module + r"patch_embed.\1"),
        (prefix + r"embeddings\.position_embedding\.weight", module + "position_embedding"),
        (prefix + r"pre_layrnorm\.(.*)", module + r"pre_norm.\1"),
        (prefix + r"post_layernorm\.(.*)", module + r"post_norm.\1"),
        (layer + r"layer_norm([12])\.(.*)", block + r"norm\2.\3"),
        (layer + r"self_attn\.out_proj\.(.*)", block + r"attn.proj.\2"),
        (layer + r"self_attn\.([qkv]_proj\..*)", block + r"attn.\2"),
        (layer + r"mlp\.(.*)", block + r"mlp.\2"),
    )


def unused_clip_tensors(prefix: str, tower: VisionConfig, num_layers: int) -> tuple[str, ...]:
    """What to ignore of a tower with ``num_layers`` layers of which only the first are run."""
    beyond = "|".join(str(index) for index in range(tower.num_layers, num_layers))
    layers = (prefix + rf"encoder\.layers\.(?:{beyond})\..*",) if beyond else ()
    return (*layers, prefix + r"post_layernorm\..*", prefix + r"embeddings\.position_ids")
