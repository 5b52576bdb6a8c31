"""The parts of the Qwen-VL families' configurations that Qwen2-VL, Qwen2.5-VL and Qwen3-VL share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import TextFields, tied_text
from engine.families.parsing.processor import parse_normalisation
from engine.vision.native_config import NativeVisionConfig
from engine.vision.normalisation import CLIP_NORMALISATION
from engine.vision.transformer_config import VisionConfig

VISUAL = r"(?:model\.)?visual\."
"""Prefix of the tower's tensors in public checkpoints."""


def qwen_text(kind: DecoderKind, *, text_may_tie: bool = True) -> TextFields:
    """The decoder's fields are in ``text_config``, or in config.json itself as in public checkpoints.

    Args:
        text_may_tie: see :func:`engine.families.parsing.model.tied_text`.
    """
    return lambda raw: (tied_text(raw, raw.get("text_config") or raw, text_may_tie), kind)


def native_vision(
    filled: Json,
    processor: Json,
    hidden: int,
    *,
    width_field: str,
    out_field: str,
    tower: Callable[[int, int], VisionConfig],
    **more: Any,
) -> NativeVisionConfig:
    """The vision part of ``filled``, a vision_config with its defaults.

    Args:
        filled: see above.
        processor: the image processor's JSON.
        hidden: the decoder's hidden size.
        width_field, out_field: the names of the fields for the widths of the tower and of embedding rows.
        tower: makes the tower's configuration from its width and the count of numbers in a patch.
        more: further fields of :class:`NativeVisionConfig`.
    """
    if filled[out_field] != hidden:
        raise CheckpointError(
            f"config.json: vision_config.{out_field} {filled[out_field]} differs from the language "
            f"model's {hidden}",
            param="vision_config",
        )
    if filled.get("in_channels", filled.get("in_chans", 3)) != 3:
        raise CheckpointError("config.json: only towers of 3 channels are supported", param="vision_config")
    patch, temporal = integer(filled, "patch_size"), integer(filled, "temporal_patch_size")
    return NativeVisionConfig(
        tower=tower(integer(filled, width_field), 3 * temporal * patch * patch),
        patch_size=patch,
        merge_size=integer(filled, "spatial_merge_size"),
        temporal_patch_size=temporal,
        out_features=hidden,
        normalisation=parse_normalisation(processor, CLIP_NORMALISATION),
        **more,
    )


def qwen_vl_rules(*vision: tuple[str, str], prefix: str = VISUAL) -> WeightRules:
    """Rename rules: ``vision``, the family's own, then those that all Qwen-VL towers share.

    Args:
        prefix: an expression for the beginning of the names of a tower's tensors.
    """
    return WeightRules(
        vision=(
            *vision,
            (prefix + r"patch_embed\.proj\.(.*)", r"tower.patch_embed.\1"),
            (prefix + r"(blocks\..*)", r"tower.\1"),
        ),
        ignore=(r".*" + prefix + r"rotary_pos_emb\.inv_freq",),
    )


def qwen2_vl_rules(*vision: tuple[str, str], prefix: str = VISUAL) -> WeightRules:
    """:func:`qwen_vl_rules` of the towers of Qwen2-VL and Qwen2.5-VL with their mergers."""
    return qwen_vl_rules(
        *vision,
        (prefix + r"merger\.ln_q\.(.*)", r"merger.norm.\1"),
        (prefix + r"merger\.mlp\.0\.(.*)", r"merger.mlp.fc1.\1"),
        (prefix + r"merger\.mlp\.2\.(.*)", r"merger.mlp.fc2.\1"),
        prefix=prefix,
    )
