"""SigLIP towers inside of families: their configuration. Their weights have the names of CLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.decoder import integer, vision_activation
from engine.vision.transformer_config import VisionConfig

_DEFAULTS: dict[str, Any] = {
    # What Transformers' SiglipVisionConfig assumes.
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def parse_siglip(
    raw: Mapping[str, Any], *, feature_layer: int | None = None, defaults: Mapping[str, Any] | None = None
) -> tuple[VisionConfig, dict[str, Any]]:
    """The tower, and its JSON filled up with defaults.

    Args:
        feature_layer: index into the tower's hidden states, 0 being the embeddings and negative from the end;
            what comes after that layer is left out. None takes the tower's normalised last output.
        defaults: what the family assumes otherwise than SigLIP does.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    stated = {key: value for key, value in raw.items() if value is not None}
    filled = {**_DEFAULTS, **(defaults or {}), **stated}
    layers = integer(filled, "num_hidden_layers")
    used = layers if feature_layer is None else feature_layer
    if used < 0:
        used += layers + 1
    if not 0 < used <= layers:
        raise CheckpointError(
            f"config.json: vision_feature_layer {feature_layer} is not in a tower of {layers} layers",
            param="vision_feature_layer",
        )
    if integer(filled, "num_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    image, patch = integer(filled, "image_size"), integer(filled, "patch_size")
    tower = VisionConfig(
        hidden_size=integer(filled, "hidden_size"),
        intermediate_size=integer(filled, "intermediate_size"),
        num_layers=used,
        num_heads=integer(filled, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        patch_bias=True,
        activation=vision_activation(filled["hidden_act"]),
        norm_eps=float(filled["layer_norm_eps"]),
        num_positions=(image // patch) ** 2,
        post_norm=feature_layer is None,
    )
    return tower, filled
