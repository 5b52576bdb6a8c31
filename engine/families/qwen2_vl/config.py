"""What the Qwen-VL families' configurations have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.parsing.decoder import (
    DecoderKind,
    checkpoint_dtype,
    eos_ids,
    integer,
    parse_decoder,
    refuse_quantised,
)
from engine.media.image_ops import CLIP_MEAN, CLIP_STD
from engine.vision.native_config import NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

Json = Mapping[str, Any]
VISUAL = r"(?:model\.)?visual\."
"""Prefix of the tower's tensors in public checkpoints, of Qwen3-VL and before."""

IMAGE_MARK, VIDEO_MARK = "<|image_pad|>", "<|video_pad|>"


def parse_qwen_vl(
    checkpoint: Checkpoint,
    *,
    family: str,
    architecture: str,
    kind: DecoderKind,
    vision: Callable[[Json, Json, int], NativeVisionConfig],
    text_defaults: Json | None = None,
) -> ModelConfig:
    """The configuration from a config.json that is flat (the public one) or has a text_config.

    Args:
        vision: of ``vision_config``, the processor's JSON, and the decoder's hidden size.

    Raises:
        CheckpointError: naming the field that is missing or not supported.
    """
    refuse_quantised(checkpoint)
    raw = checkpoint.config
    text = {**(text_defaults or {}), **(raw.get("text_config") or raw)}
    text["tie_word_embeddings"] = bool(
        raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    )
    decoder = parse_decoder(text, kind)
    if decoder.rope.mrope_section is None:
        raise CheckpointError("config.json: mrope_section is missing", param="rope_scaling")
    return ModelConfig(
        architecture=architecture,
        family=family,
        decoder=decoder,
        vision=vision(raw.get("vision_config") or {}, checkpoint.preprocessor_config, decoder.hidden_size),
        eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size),
        dtype=checkpoint_dtype(raw, text),
        bos_token_id=text.get("bos_token_id"),
        image_token_id=raw.get("image_token_id", 151655),
        video_token_id=raw.get("video_token_id", 151656),
    )


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
        width_field, out_field: what the widths of the tower and of its rows are called.
        tower: of the tower's width and the numbers in a patch.
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
    fields: dict[str, Any] = {
        "mean": tuple(processor.get("image_mean") or CLIP_MEAN),
        "std": tuple(processor.get("image_std") or CLIP_STD),
        "scale": processor.get("rescale_factor", 1 / 255),
        **more,
    }
    return NativeVisionConfig(
        tower=tower(integer(filled, width_field), 3 * temporal * patch * patch),
        patch_size=patch,
        merge_size=integer(filled, "spatial_merge_size"),
        temporal_patch_size=temporal,
        out_features=hidden,
        **fields,
    )


def qwen_vl_rules(config: ModelConfig, *vision: tuple[str, str]) -> WeightRules:
    """Rename rules: the family's own for its merger and position table, then those that all towers share."""
    tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
    return WeightRules(
        vision=(
            *vision,
            (VISUAL + r"patch_embed\.proj\.(.*)", r"tower.patch_embed.\1"),
            (VISUAL + r"(blocks\..*)", r"tower.\1"),
        ),
        language=DECODER_RULES,
        ignore=(ROTARY_BUFFERS, r".*visual\.rotary_pos_emb\.inv_freq", *tied),
    )


SEQUENTIAL_MERGER = (
    (VISUAL + r"merger\.ln_q\.(.*)", r"merger.norm.\1"),
    (VISUAL + r"merger\.mlp\.0\.(.*)", r"merger.mlp.fc1.\1"),
    (VISUAL + r"merger\.mlp\.2\.(.*)", r"merger.mlp.fc2.\1"),
)
"""The merger's names in Qwen2-VL and Qwen2.5-VL."""
