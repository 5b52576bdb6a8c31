"""The configuration of DeepSeek-OCR 2's vision part. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.errors import CheckpointError
from engine.families.parsing.fields import Json, integer, number, vision_activation, with_aliases
from engine.families.parsing.processor import parse_normalisation, stated_size
from engine.families.parsing.sam import parse_sam
from engine.vision.normalisation import HALF_NORMALISATION, Normalisation
from engine.vision.sam_config import SamConfig
from engine.vision.transformer_config import VisionConfig

#: Learned queries of a tile and of a whole image: as many as there are features of each.
TILE_QUERIES, WHOLE_QUERIES = 144, 256
#: Of Transformers' DeepseekOcr2VisionEncoderConfig.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
_DOWNSAMPLES = (512, 896)
#: The second encoder of the publisher's files, of which they state the width alone.
_PUBLISHED_ENCODER: dict[str, Any] = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
}
#: Fields of Transformers' files, and the publisher's names of them.
_TOWER_ALIASES = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}


@dataclass(frozen=True, slots=True)
class DeepseekVisionConfig:
    """A SAM tower, and behind it an encoder with learned queries, whose outputs become rows.

    Attributes:
        encoder: the blocks of the second encoder.
        tile_side, whole_side: of a tile and of a whole image, in pixels.
        out_features: width of a row.
        normalisation: of the pixels' bytes.
    """

    tower: SamConfig
    encoder: VisionConfig
    tile_side: int
    whole_side: int
    out_features: int
    normalisation: Normalisation

    def patches(self, side: int) -> int:
        """Patches of a square of ``side`` pixels."""
        return (side // self.tower.patch_size) ** 2

    def rows(self, tiles: int, *, small: bool = False) -> int:
        """Rows of an image with so many tiles, the separator behind it included.

        Args:
            small: the whole image has the size of a tile.
        """
        return (tiles + small) * TILE_QUERIES + (not small) * WHOLE_QUERIES + 1


def parse_vision(raw: Json, processor: Json, hidden: int) -> DeepseekVisionConfig:
    """Read config.json (``raw``) and the image processor's JSON.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    vision = _as_in_transformers(raw.get("vision_config") or {})
    stated = vision.get("sam_config") or {}
    reduced = stated.get("downsample_channels") or _DOWNSAMPLES
    encoder = _encoder(vision.get("encoder_config") or {})
    if not isinstance(reduced, list | tuple) or len(reduced) != 2 or reduced[1] != encoder.hidden_size:
        raise CheckpointError(
            f"config.json: downsample_channels should be two widths, of which the second is the encoder's "
            f"{encoder.hidden_size}, not {reduced!r}",
            param="downsample_channels",
        )
    tower = parse_sam(stated, (reduced[0], reduced[1]))
    whole = (stated_size(processor) or {"height": 1024}).get("height", 0)
    tile = integer({"tile_size": 768, **processor}, "tile_size")
    for field, side, queries in (("size", whole, WHOLE_QUERIES), ("tile_size", tile, TILE_QUERIES)):
        if side % tower.patch_size or tower.rows(side // tower.patch_size) != queries:
            raise CheckpointError(
                f"preprocessor_config.json: {field} should make {queries} rows with patches of "
                f"{tower.patch_size} pixels, not {side}",
                param=field,
            )
    return DeepseekVisionConfig(
        tower=tower,
        encoder=encoder,
        tile_side=tile,
        whole_side=whole,
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
    )


def published_text(raw: Json) -> Json:
    """The decoder's fields in the publisher's config.json, as in Transformers' ``text_config``."""
    text = raw.get("language_config")
    if not isinstance(text, dict) or text.get("use_mla", True):
        raise CheckpointError(
            "config.json: language_config with use_mla false is missing", param="language_config"
        )
    layers = integer(text, "num_hidden_layers")
    dense = integer({"first_k_dense_replace": 0, **text}, "first_k_dense_replace", least=0)
    kinds = ["dense" if layer < dense else "sparse" for layer in range(layers)]
    return {**text, "model_type": "deepseek_ocr2_text", "mlp_layer_types": kinds}


def _as_in_transformers(vision: Json) -> Json:
    """``vision_config`` with the fields of Transformers, if it has the publisher's."""
    width = vision.get("width")
    if not isinstance(width, dict):
        return vision
    encoder = with_aliases(width.get("qwen2-0-5b") or {}, {"hidden_size": "dim"})
    encoder = {**_PUBLISHED_ENCODER, **encoder}
    tower = with_aliases(width.get("sam_vit_b") or {}, _TOWER_ALIASES)
    # The second convolution makes as many features as the encoder takes, whatever the file states.
    first, *_ = tower.get("downsample_channels") or _DOWNSAMPLES
    tower["downsample_channels"] = [first, encoder["hidden_size"]]
    return {"sam_config": tower, "encoder_config": encoder}


def _encoder(stated: Json) -> VisionConfig:
    """The second encoder, a Qwen2 without embeddings."""
    raw = {**_DEFAULTS, **{field: value for field, value in stated.items() if value is not None}}
    if raw.get("use_sliding_window"):
        raise CheckpointError(
            "config.json: use_sliding_window is not supported in encoder_config", param="use_sliding_window"
        )
    heads = integer(raw, "num_attention_heads")
    raw["num_key_value_heads"] = raw["num_key_value_heads"] or heads
    config = VisionConfig(
        hidden_size=integer(raw, "hidden_size"),
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=integer(raw, "num_hidden_layers"),
        num_heads=heads,
        patch_dim=0,
        num_kv_heads=integer(raw, "num_key_value_heads"),
        bias=False,
        qkv_bias=True,
        activation=vision_activation(raw["hidden_act"]),
        gated_mlp=True,
        norm="rms",
        norm_eps=number(raw, "rms_norm_eps"),
    )
    if config.hidden_size % heads or config.head_dim % 2 or heads % integer(raw, "num_key_value_heads"):
        raise CheckpointError(
            f"config.json: {heads} heads don't suit a hidden_size of {config.hidden_size}",
            param="num_attention_heads",
        )
    rope = {"rope_type": "default", **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"config.json: rope_type {rope['rope_type']!r} is not supported in encoder_config",
            param="rope_parameters",
        )
    theta = {"rope_theta": 1e4, **raw, **rope}
    return replace(config, rope_theta=number(theta, "rope_theta"))
