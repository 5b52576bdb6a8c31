"""Pixtral's tower with squares of patches merged to a row, as in Mistral3 and LightOnOCR."""

from __future__ import annotations

from dataclasses import replace

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.llava.towers import PIXTRAL_LAYERS, pixtral_rules
from engine.families.parsing.fields import Json, integer, number
from engine.families.parsing.tower import unused_layers
from engine.vision.native_config import NativeVisionConfig, SquaresConfig


def with_squares(vision: NativeVisionConfig, raw: Json) -> NativeVisionConfig:
    """``vision`` with the squares that config.json (``raw``) states, 2 patches wide without a statement.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    if vision.tower.features:
        raise CheckpointError(
            "config.json: vision_feature_layer should be one layer: squares of patches are merged",
            param="vision_feature_layer",
        )
    side = integer({"spatial_merge_size": 2, **raw}, "spatial_merge_size")
    eps = number({"rms_norm_eps": 1e-6, **(raw.get("text_config") or {})}, "rms_norm_eps")
    return replace(vision, squares=SquaresConfig(side, eps))


def square_weights(vision: NativeVisionConfig, tower: str, connector: str) -> WeightRules:
    """The names of the tower's and the connector's tensors.

    Args:
        tower, connector: regular expressions, without groups, of what comes before their own names.
    """
    return WeightRules(
        vision=(
            (connector + r"norm\.(.*)", r"merger.norm.\1"),
            (connector + r"patch_merger\.merging_layer\.(.*)", r"merger.reduction.\1"),
            (connector + r"linear_([12])\.(.*)", r"merger.mlp.fc\1.\2"),
            *pixtral_rules(tower),
        ),
        ignore=unused_layers(tower + PIXTRAL_LAYERS, vision.tower),
    )
