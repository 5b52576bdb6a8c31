"""Tilings and weights of families that show an image as a whole and in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.parsing.fields import Json
from engine.families.parsing.tower import tower_rules, unused_tensors
from engine.vision.anyres import AnyresConfig, Pinpoints

_TOWER = r"(?:model\.)?vision_tower\.(?:vision_model\.)?"
_CONNECTOR = r"(?:model\.)?multi_modal_projector\."
_FIELD = "image_grid_pinpoints"


def parse_pinpoints(raw: Any, side: int, default: Sequence[tuple[int, int]]) -> Pinpoints:
    """The ``image_grid_pinpoints`` of a JSON file: ``(height, width)`` of each tiling, in pixels.

    Args:
        raw: the field's value; None or empty takes ``default``.
        side: of a tile, in pixels.

    Raises:
        CheckpointError: a side is no multiple of a tile's.
    """
    pinpoints = tuple((height, width) for height, width in raw or default)
    for height, width in pinpoints:
        if height <= 0 or width <= 0 or height % side or width % side:
            raise CheckpointError(
                f"config.json: {_FIELD} has {height}x{width}, but its sides should be multiples "
                f"of the tower's {side} pixels",
                param=_FIELD,
            )
    return pinpoints


def require_pinpoints(processor: Json, vision: AnyresConfig, default: Sequence[tuple[int, int]]) -> None:
    """Refuse a preprocessor_config.json whose tilings are not those of config.json.

    Raises:
        CheckpointError: see above.
    """
    stated = parse_pinpoints(processor.get(_FIELD), vision.crops.image_size, default)
    if processor and stated != vision.pinpoints:
        raise CheckpointError(
            f"preprocessor_config.json: {_FIELD} differ from those of config.json", param=_FIELD
        )


def anyres_weights(config: ModelConfig) -> WeightRules:
    """The names of the tensors of :class:`engine.vision.anyres_encoder.AnyresVisionEncoder`."""
    return WeightRules(
        vision=(
            (_CONNECTOR + r"linear_([12])\.(.*)", r"crops.connector.fc\1.\2"),
            (r"(?:model\.)?image_newline", "newline"),
            *tower_rules(_TOWER, "crops.tower."),
        ),
        ignore=unused_tensors(_TOWER, config.vision.crops.tower),
    )
