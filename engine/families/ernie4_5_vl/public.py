"""The publisher's config.json of ERNIE 4.5 VL, which is flat, in the form that Transformers has."""

from __future__ import annotations

from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, integer

#: The tokenizer's texts in place of images and videos, which are no tokens. Both have the same rows' token.
PLACEHOLDERS = {"image_token": "<|image@placeholder|>", "video_token": "<|video@placeholder|>"}
_DEFAULTS = {
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "hidden_size": 2560,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "freq_allocation": 20,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "im_patch_id": 100295,
    "moe_num_experts": 64,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "tie_word_embeddings": True,
}


def is_public(raw: Json) -> bool:
    """Return whether ``raw`` is a config.json as the publisher writes it."""
    return "text_config" not in raw and "im_patch_id" in raw


def nested(raw: Json) -> Json:
    """``raw`` in the form that Transformers has: its own, or made as Transformers' conversion does.

    Raises:
        CheckpointError: naming the field that can't be used.
    """
    if not is_public(raw):
        return raw
    filled = {**_DEFAULTS, **raw}
    scaling = raw.get("rope_scaling") or {"type": "default"}
    if not isinstance(scaling, dict) or "default" not in (scaling.get("rope_type"), scaling.get("type")):
        raise CheckpointError(f"config.json: rope_scaling {scaling} is not supported", param="rope_scaling")
    angles = integer(filled, "hidden_size") // integer(filled, "num_attention_heads") // 2
    time = integer(filled, "freq_allocation")
    text: dict[str, Any] = {
        **{name: value for name, value in filled.items() if name != "rope_scaling"},
        "moe_num_experts": _equal(filled, "moe_num_experts"),
        "moe_num_shared_experts": filled.get("moe_num_shared_experts") or 0,
        "mlp_layer_types": _layer_types(filled),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": filled["rope_theta"],
            "mrope_section": [(angles - time) // 2, (angles - time) // 2, time],
        },
        "model_type": "ernie4_5_vl_moe_text",
    }
    tower = dict(raw.get("vision_config") or {})
    width = integer({"hidden_size": 1280, **tower}, "hidden_size")
    tower["intermediate_size"] = int(width * tower.get("mlp_ratio", 4))
    tower["spatial_merge_size"] = filled["spatial_conv_size"]
    tower["temporal_merge_size"] = filled["temporal_conv_size"]
    return {
        **raw,
        "tie_word_embeddings": filled["tie_word_embeddings"],
        "text_config": text,
        "vision_config": tower,
        "image_token_id": filled["im_patch_id"],
        "video_token_id": filled["im_patch_id"],
    }


def _listed(filled: Json, field: str) -> list[int]:
    """The whole numbers of ``field``, for text and for media, or one for both."""
    stated = filled[field]
    values = stated if isinstance(stated, list) and stated else [stated]
    return [integer({field: value}, field, least=-1) for value in values]


def _equal(filled: Json, field: str) -> int:
    first, *others = _listed(filled, field)
    if any(other != first for other in others):
        raise CheckpointError(
            f"config.json: {field} should be the same for text and for media, not {filled[field]}",
            param=field,
        )
    return first


def _layer_types(filled: Json) -> list[str]:
    layers, step = integer(filled, "num_hidden_layers"), integer(filled, "moe_layer_interval")
    first = min(_listed(filled, "moe_layer_start_index"))
    # -1 is the last layer.
    last = max(layers - 1 if end == -1 else end for end in _listed(filled, "moe_layer_end_index"))
    return [
        "sparse" if first <= layer <= last and (layer + 1) % step == 0 else "dense" for layer in range(layers)
    ]
