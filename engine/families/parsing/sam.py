"""Towers of Segment Anything: their configurations, and the names of their weights."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, flag, integer, layer_list, number, vision_activation
from engine.vision.sam_config import SamConfig

#: Of Transformers' GotOcr2VisionConfig and DeepseekOcr2SamVisionConfig, which are SAM's ViT-B.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 1024,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_abs_pos": True,
    "use_rel_pos": True,
    "window_size": 14,
    "global_attn_indexes": (2, 5, 8, 11),
}


def parse_sam(stated: Json, reduced: tuple[int, int] | None = None, *, out: int = 0) -> SamConfig:
    """A tower, with the convolutions behind it.

    Args:
        stated: its fields in config.json.
        reduced: features behind each of these convolutions; None for twice the neck's, and ``out``.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    raw = {**_DEFAULTS, **{field: value for field, value in stated.items() if value is not None}}
    hidden, neck = integer(raw, "hidden_size"), integer(raw, "output_channels")
    for field, served in (
        ("num_channels", integer(raw, "num_channels") == 3),
        ("num_attention_heads", hidden % integer(raw, "num_attention_heads") == 0),
        ("patch_size", integer(raw, "patch_size") <= integer(raw, "image_size")),
    ):
        if not served:
            raise CheckpointError(f"config.json: {field} {raw[field]!r} is not supported", param=field)
    return SamConfig(
        hidden_size=hidden,
        intermediate_size=integer({"mlp_dim": int(hidden * raw.get("mlp_ratio", 4.0)), **raw}, "mlp_dim"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=integer(raw, "num_attention_heads"),
        image_size=integer(raw, "image_size"),
        patch_size=integer(raw, "patch_size"),
        neck=neck,
        reduced=reduced or (2 * neck, out),
        window=integer(raw, "window_size"),
        full_layers=layer_list(raw, "global_attn_indexes"),
        qkv_bias=flag(raw, "qkv_bias"),
        activation=vision_activation(raw["hidden_act"]),
        norm_eps=number(raw, "layer_norm_eps"),
        learned_positions=flag(raw, "use_abs_pos"),
        relative_positions=flag(raw, "use_rel_pos"),
    )


def sam_rules(prefix: str) -> tuple[tuple[str, str], ...]:
    """Rename rules of a tower by Transformers' names to the encoder's ``tower``, without the convolutions
    behind the neck.

    Args:
        prefix: regular expression, without groups, of the part of a name before the tower's own names.
    """
    layer, block = prefix + r"layers\.(\d+)\.", r"tower.blocks.\1."
    return (
        (prefix + r"pos_embed", "tower.position_embedding"),
        (prefix + r"patch_embed\.projection\.(.*)", r"tower.patch_embed.\1"),
        (layer + r"layer_norm([12])\.(.*)", block + r"norm\2.\3"),
        (layer + r"attn\.(.*)", block + r"attn.\2"),
        (layer + r"mlp\.lin([12])\.(.*)", block + r"mlp.fc\2.\3"),
        (prefix + r"neck\.conv1\.(.*)", r"tower.neck_in.\1"),
        (prefix + r"neck\.layer_norm([12])\.(.*)", r"tower.neck_norm\1.\2"),
        (prefix + r"neck\.conv2\.(.*)", r"tower.neck_conv.\1"),
    )
