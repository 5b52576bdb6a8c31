"""Muse Glimmer: a tower with windows, rows of equal norms, and a gated decoder; some layers don't rotate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import SANDWICH_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import native_encoder
from engine.families.family import Family
from engine.families.muse_glimmer.processor import muse_processor
from engine.families.parsing.fields import Json, integer, number, vision_activation
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import axial_theta
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.native_config import AdapterConfig, NativeVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION
from engine.vision.transformer_config import VisionConfig

_TOWER = r"model\.vision_tower\."
_BLOCK = _TOWER + r"layers\.(\d+)\."
_EPS = 1e-5
"""Of the norms within the tower's blocks, whatever its configuration says."""
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1536,
    "num_hidden_layers": 50,
    "intermediate_size": 8960,
    "num_attention_heads": 16,
    "patch_size": 14,
    "patch_temporal": 2,
    "merge_size": 2,
    "pos_emb_height": 32,
    "pos_emb_width": 32,
    "hidden_act": "gelu",
    "layer_norm_eps": _EPS,
    "layer_types": None,
}
_USUAL_TIME = "Time: {timestamp:.1f}s"


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    filled = {**_DEFAULTS, **(raw.get("vision_config") or {})}
    layers, patch, merge = (
        integer(filled, name) for name in ("num_hidden_layers", "patch_size", "merge_size")
    )
    width, temporal, side = (
        integer(filled, name) for name in ("hidden_size", "patch_temporal", "pos_emb_height")
    )
    if side != integer(filled, "pos_emb_width") or side % merge:
        raise CheckpointError(
            f"config.json: pos_emb_height {side} should be pos_emb_width, and a multiple of "
            f"merge_size {merge}",
            param="pos_emb_height",
        )
    if number(filled, "layer_norm_eps") != _EPS:
        raise CheckpointError(
            f"config.json: layer_norm_eps {filled['layer_norm_eps']} is not supported; {_EPS} is",
            param="layer_norm_eps",
        )
    outer = {"out_hidden_size": 6144, "projector_hidden_size": 4096, "projector_hidden_act": "gelu", **raw}
    if integer(outer, "out_hidden_size") != width * merge**2:
        raise CheckpointError(
            f"config.json: out_hidden_size {outer['out_hidden_size']} should be that of {merge} x {merge} "
            f"features, {width * merge**2}",
            param="out_hidden_size",
        )
    eps = number({"rms_norm_eps": _EPS, **(raw.get("text_config") or {})}, "rms_norm_eps")
    activation = vision_activation(outer["projector_hidden_act"], "projector_hidden_act")
    return NativeVisionConfig(
        tower=VisionConfig(
            hidden_size=width,
            intermediate_size=integer(filled, "intermediate_size"),
            num_layers=layers,
            num_heads=integer(filled, "num_attention_heads"),
            patch_dim=3 * temporal * patch * patch,
            patch_frames=temporal,
            activation=vision_activation(filled["hidden_act"]),
            norm_eps=_EPS,
            pre_norm=True,
            post_norm=True,
            full_layers=_full_layers(filled["layer_types"], layers),
            rope_theta=axial_theta(filled),
            rope_columns_first=True,
        ),
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=temporal,
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
        window=side // merge,
        position_side=side,
        position_corners=False,
        position_zeros=True,
        position_swapped=True,
        adapter=AdapterConfig(integer(outer, "projector_hidden_size"), activation, eps),
    )


def _full_layers(kinds: Any, layers: int) -> tuple[int, ...]:
    """The blocks of a tower that attend over whole frames: without a statement every fourth, and the last."""
    if kinds is None:
        return tuple(layer for layer in range(layers) if not (layer + 1) % 4 or layer == layers - 1)
    known = ("full_attention", "window_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types of vision_config should name {' or '.join(known)} for each of "
            f"{layers} layers",
            param="vision_config",
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers how the time of a video's step is written, and that tokens of media without rows, which a
    model may write, have the embedding of token 0."""
    form = checkpoint.video_preprocessor_config.get("frame_timestamp_format", _USUAL_TIME)
    if not isinstance(form, str) or not re.fullmatch(r"[^{}]*\{timestamp(?::\.\d{1,2}f)?\}[^{}]*", form):
        raise CheckpointError(
            f"frame_timestamp_format should be a text with one {{timestamp:.1f}}, not {form!r}",
            param="frame_timestamp_format",
        )
    media = tuple(token for token in (config.image_token_id, config.video_token_id) if token is not None)
    return replace(config, decoder=replace(config.decoder, media_tokens=media), extra={"time": form})


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """An image's rows between two tokens; a video's steps one by one, each behind its time."""
    assert config.extra is not None
    video = item.kind == "video"
    token = config.video_token_id if video else config.image_token_id
    assert token is not None
    begin, between, end = "<|image_start|>", "", "<|image_end|>"
    times = [""]
    if video:
        begin, between, end = "<|vid_start|>", "<|vid_frame_separator|>", "<|vid_end|>"
        times = [config.extra["time"].format(timestamp=seconds) for seconds in item.times]
    runs, before = [], begin
    for time in times:
        runs += [PlaceholderRun(each, 1, False) for each in encode(before + time)]
        runs.append(PlaceholderRun(token, item.num_tokens // len(times), True))
        before = between
    return (*runs, *(PlaceholderRun(each, 1, False) for each in encode(end)))


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=SANDWICH_RULES,
        vision=(
            (_TOWER + r"patch_embedder\.patch_embedding\.(.*)", r"tower.patch_embed.\1"),
            (_TOWER + r"patch_embedder\.position_embedding_table\.weight", "position_embedding"),
            (_TOWER + r"ln_pre\.(.*)", r"tower.pre_norm.\1"),
            (_TOWER + r"ln_post\.(.*)", r"tower.post_norm.\1"),
            (_BLOCK + r"(.*)", r"tower.blocks.\1.\2"),
            (r"model\.vision_adapter\.(fc[12]\..*)", r"merger.\1"),
            (r"model\.vision_projection\.(.*)", r"merger.proj.\1"),
        ),
    )


FAMILY = Family(
    name="muse_glimmer",
    architectures=("MuseGlimmerForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("muse_glimmer_text"),
        vision=_vision,
        image_token=token_field("image_token_id", default=200092),
        video_token=token_field("video_token_id", default=200091),
        finish=_finished,
    ),
    prompt_format=lambda config: PromptFormat(image="<|patch|>", video="<|video|>"),
    placeholder=_placeholder,
    processor=muse_processor,
    options=("min_pixels", "max_pixels", "fps"),
    weights=_weights,
    build_encoder=native_encoder,
)
