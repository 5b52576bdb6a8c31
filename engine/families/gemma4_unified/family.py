"""Gemma 4 unified (12B): images and videos are prepared as for Gemma 4, and enter the decoder as they are."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from engine.checkpoint.rules import GEMMA4_RULES, WeightRules, unused_keys
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig
from engine.families.gemma4.family import FAMILY as GEMMA4
from engine.families.gemma4.family import stated_vision, with_media_tokens
from engine.families.gemma4.processor import stated_normalisation
from engine.families.gemma4_unified.config import ProjectedVisionConfig
from engine.families.parsing.fields import Json, integer, number
from engine.families.parsing.model import nested_text, tied_unless_stated

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_VISION: dict[str, Any] = {
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "rms_norm_eps": 1e-6,
    "output_proj_dims": 3840,
}
#: By the names of public files, and as Transformers calls them.
_EMBEDDER = r"(?:model\.)?(?:vision_embedder|embed_vision)\."


def _vision(raw: Json, processor: Json, hidden: int) -> ProjectedVisionConfig:
    config = {**_VISION, **stated_vision(raw)}
    patch, side = integer(config, "patch_size"), integer(config, "pooling_kernel_size")
    width = integer(config, "mm_embed_dim")
    for field, value in (("model_patch_size", patch * side), ("output_proj_dims", width)):
        if config.get(field, value) != value:
            raise CheckpointError(
                f"config.json: {field} should be {value}, not {config[field]!r}", param="vision_config"
            )
    return ProjectedVisionConfig(
        patch_size=patch,
        side=side,
        out_features=hidden,
        normalisation=stated_normalisation(processor, normalises=False),
        width=width,
        num_positions=integer(config, "mm_posemb_size"),
        norm_eps=number(config, "rms_norm_eps"),
    )


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (_EMBEDDER + r"patch_ln1\.(.*)", r"patch_norm.\1"),
            (_EMBEDDER + r"patch_dense\.(.*)", r"dense.\1"),
            (_EMBEDDER + r"patch_ln2\.(.*)", r"dense_norm.\1"),
            (_EMBEDDER + r"pos_embedding", "position_embedding"),
            (_EMBEDDER + r"pos_norm\.(.*)", r"position_norm.\1"),
            (_EMBEDDER + r"(?:multimodal_embedder\.)?embedding_projection\.(.*)", r"projection.\1"),
        ),
        language=GEMMA4_RULES,
        ignore=(r"(?:model\.)?embed_audio\..*", *unused_keys(config.decoder.borrowing_layers)),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.gemma4_unified.encoder import ProjectedVisionEncoder

    return ProjectedVisionEncoder(config.vision, build)


FAMILY = replace(
    GEMMA4,
    name="gemma4_unified",
    architectures=("Gemma4UnifiedForConditionalGeneration",),
    reader=replace(
        GEMMA4.reader,
        text=tied_unless_stated(nested_text("gemma4_unified_text")),
        vision=_vision,
        finish=partial(with_media_tokens, both_ways="vision"),
    ),
    weights=_weights,
    build_encoder=_encoder,
)
