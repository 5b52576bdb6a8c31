"""InternViT: its configuration, and the names of its weights."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.tower import SquareTower, feature_states, unused_layers
from engine.vision.transformer_config import VisionConfig

#: Of Transformers' InternVLVisionConfig.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
    "num_channels": 3,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
_QK_NORM_EPS = 1e-6
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
_TOWER = r"(?:model\.)?vision_tower\."
_PUBLISHED_LAYERS = r"vision_model\.encoder\.layers\."
_PUBLISHED_LAYER = _PUBLISHED_LAYERS + r"(\d+)\."
_LAYER = _TOWER + r"encoder\.layer\.(\d+)\."
_BLOCK = r"tower.blocks.\1."


def parse_tower(stated: Json, feature_layer: Any) -> SquareTower:
    """A tower up to the last layer whose output is used.

    Args:
        stated: ``vision_config``.
        feature_layer: ``vision_feature_layer``: -1 for the tower's output, else an index into its hidden
            states.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    raw = {**_DEFAULTS, **{field: value for field, value in stated.items() if value is not None}}
    layers = integer(raw, "num_hidden_layers")
    if isinstance(feature_layer, list):
        raise CheckpointError(
            "config.json: vision_feature_layer should be one layer", param="vision_feature_layer"
        )
    used = layers if feature_layer == -1 else feature_states(feature_layer, layers)[0]
    norm = raw["norm_type"]
    if norm not in _NORMS:
        raise CheckpointError(
            f"config.json: norm_type {norm!r} is not supported; {', '.join(_NORMS)} are", param="norm_type"
        )
    if integer(raw, "num_channels") != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    post_norm = feature_layer == -1 and not flag(raw, "use_mean_pooling")
    if post_norm and norm != "layer_norm":
        raise CheckpointError(
            "config.json: use_mean_pooling false with a norm_type other than layer_norm is not supported",
            param="use_mean_pooling",
        )
    image, patch = _side(raw, "image_size"), _side(raw, "patch_size")
    tower = VisionConfig(
        hidden_size=integer(raw, "hidden_size"),
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=used,
        stored_layers=layers,
        num_heads=integer(raw, "num_attention_heads"),
        patch_dim=3 * patch * patch,
        patch_bias=True,
        qkv_bias=flag(raw, "attention_bias"),
        qk_norm_eps=_QK_NORM_EPS if flag(raw, "use_qk_norm") else None,
        layer_scale=True,
        activation=vision_activation(raw["hidden_act"]),
        norm="rms" if norm == "rms_norm" else "layer",
        norm_eps=number(raw, "layer_norm_eps"),
        class_token=True,
        num_positions=(image // patch) ** 2 + 1 if flag(raw, "use_absolute_position_embeddings") else 0,
        post_norm=post_norm,
    )
    return SquareTower(tower, image, patch)


def _side(raw: Json, field: str) -> int:
    """A length in pixels, stated as a number or as the two equal sides of a square."""
    value = raw[field]
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise CheckpointError(f"config.json: {field} should be a square, not {value!r}", param=field)
    return integer({field: sides.pop()}, field)


def tower_rules() -> tuple[tuple[str, str], ...]:
    """Rename rules of the tower's tensors."""
    return (
        (_TOWER + r"embeddings\.cls_token", "tower.class_embedding"),
        (_TOWER + r"embeddings\.position_embeddings", "tower.position_embedding"),
        (_TOWER + r"embeddings\.patch_embeddings\.projection\.(.*)", r"tower.patch_embed.\1"),
        (_TOWER + r"layernorm\.(.*)", r"tower.post_norm.\1"),
        (_LAYER + r"layernorm_before\.(.*)", _BLOCK + r"norm1.\2"),
        (_LAYER + r"layernorm_after\.(.*)", _BLOCK + r"norm2.\2"),
        (_LAYER + r"lambda_([12])", _BLOCK + r"scale\2"),
        (_LAYER + r"attention\.projection_layer\.(.*)", _BLOCK + r"attn.proj.\2"),
        (_LAYER + r"attention\.([qkv]_(?:proj|norm)\..*)", _BLOCK + r"attn.\2"),
        (_LAYER + r"mlp\.(.*)", _BLOCK + r"mlp.\2"),
    )


def published_rules() -> tuple[tuple[str, str], ...]:
    """Rename rules of the tensors of tower and connector under their publishers' own names."""
    return (
        (r"vision_model\.embeddings\.(class|position)_embedding", r"tower.\1_embedding"),
        (r"vision_model\.embeddings\.patch_embedding\.(.*)", r"tower.patch_embed.\1"),
        (r"vision_model\.layernorm\.(.*)", r"tower.post_norm.\1"),
        (_PUBLISHED_LAYER + r"ls([12])", _BLOCK + r"scale\2"),
        (_PUBLISHED_LAYER + r"((?:attn|mlp|norm1|norm2)\..*)", _BLOCK + r"\2"),
        # As Transformers saves a Qianfan-OCR.
        (_PUBLISHED_LAYER + r"attention\.([qk]_norm\..*)", _BLOCK + r"attn.\2"),
        (r"mlp1\.0\.(.*)", r"connector.norm.\1"),
        (r"mlp1\.1\.(.*)", r"connector.mlp.fc1.\1"),
        (r"mlp1\.3\.(.*)", r"connector.mlp.fc2.\1"),
    )


def unused_published(tower: VisionConfig) -> tuple[str, ...]:
    """Names to ignore among those: of layers after the last one that is run, and an unused norm."""
    norm = () if tower.post_norm else (r"vision_model\.layernorm\..*",)
    return *unused_layers(_PUBLISHED_LAYERS, tower), *norm


def unused_tensors(tower: VisionConfig) -> tuple[str, ...]:
    """Names to ignore: the token of masked training, layers after the last one that is run, unused norms."""
    return (
        _TOWER + r"embeddings\.mask_token",
        *unused_layers(_TOWER + r"encoder\.layer\.", tower),
        *(() if tower.post_norm else (_TOWER + r"layernorm\..*",)),
    )
