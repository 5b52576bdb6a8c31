"""Granite 4 Vision: LLaVA-NeXT's images, whose features go by learned queries into layers of a Granite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import anyres_encoder
from engine.families.family import Family
from engine.families.llava_next.family import parse_anyres
from engine.families.llava_next.processor import LlavaNextProcessor
from engine.families.parsing.anyres import anyres_weights
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer, number, vision_activation
from engine.families.parsing.model import ConfigReader, named_tokens, nested_text, token_field
from engine.vision.anyres import AnyresConfig
from engine.vision.crops_config import QueryWindows

_TEXT = "granite4_vision_text"
#: Layers of the decoder that the corners of squares go to.
_SPATIAL = (12, 15, 18, 21)
#: Numbers of a head of the projectors, whatever their configuration says.
_HEAD_DIM = 64
_QFORMER: dict[str, Any] = {
    "num_hidden_layers": 1,
    "intermediate_size": 3072,
    "cross_attention_frequency": 1,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
_PROJECTOR = r"(?:model\.)?(layerwise|spatial)_projectors\.(\d+)\."
#: Of an attention, and its parts' names in the encoder.
_PARTS = {
    r"attention\.query": "q_proj",
    r"attention\.key": "k_proj",
    r"attention\.value": "v_proj",
    r"output\.dense": "o_proj",
    r"output\.LayerNorm": "norm",
}
_BLOCK = _PROJECTOR + r"qformer\.encoder\.layer\.(\d+)\."


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    stated = raw.get("text_config") or {}
    if stated.get("model_type", _TEXT) == _TEXT:
        stated = {**stated, "model_type": "granite"}
    return nested_text("granite")({**raw, "text_config": stated})


def _vision(raw: Json, processor: Json, hidden: int) -> AnyresConfig:
    read, targets = _targets(raw)
    whole = {**raw, "vision_feature_layer": list(read)}
    parsed = parse_anyres(whole, processor, hidden * len(targets))
    crops, qformer = parsed.crops, {**_QFORMER, **(raw.get("qformer_config") or {})}
    width, side = crops.tower.hidden_size, _window(raw, crops.grid_side)
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"config.json: the tower's hidden_size {width} should be a multiple of {_HEAD_DIM}",
            param="vision_config",
        )
    if integer(qformer, "cross_attention_frequency") != 1:
        raise CheckpointError(
            "config.json: cross_attention_frequency should be 1", param="cross_attention_frequency"
        )
    windows = QueryWindows(
        layers=tuple(range(len(read) - 1)),
        spatial=len(read) - 1,
        order=tuple(sorted(range(len(targets)), key=lambda number: targets[number])),
        side=side,
        width=width,
        num_heads=width // _HEAD_DIM,
        num_blocks=integer(qformer, "num_hidden_layers"),
        intermediate_size=integer(qformer, "intermediate_size"),
        activation=vision_activation(qformer["hidden_act"]),
        norm_eps=number(qformer, "layer_norm_eps"),
    )
    return replace(parsed, crops=replace(crops, mlp=None, windows=windows))


def _targets(raw: Json) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tower's layers that are read, the last one for corners, and the decoder's layer that each
    projector's results are added before.

    Raises:
        CheckpointError: naming the field that is not supported.
    """
    pairs: Any = raw.get("deepstack_layer_map")
    spatial: Any = raw.get("spatial_target_layers")
    corners: Any = list(_SPATIAL) if spatial is None else spatial
    try:
        read = *(int(layer) for layer, _ in pairs), int(raw.get("spatial_vision_layer", -1))
        targets = *(int(layer) for _, layer in pairs), *(int(layer) for layer in corners)
    except (TypeError, ValueError):
        raise CheckpointError(
            "config.json: deepstack_layer_map should be pairs of layers, and spatial_target_layers layers",
            param="deepstack_layer_map",
        ) from None
    if len(corners) != 4 or min(targets) != 0 or len(set(targets)) < len(targets):
        raise CheckpointError(
            f"config.json: deepstack_layer_map {pairs} and the four spatial_target_layers {corners} should "
            "name different layers of the decoder, the first one among them",
            param="deepstack_layer_map",
        )
    return read, targets


def _window(raw: Json, side: int) -> int:
    """Queries along a window's side, of a crop with ``side`` features along its own."""
    rate: Any = raw.get("downsample_rate")
    parts = rate.split("/") if isinstance(rate, str) else []
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise CheckpointError(
            f"config.json: downsample_rate {rate!r} should be a fraction as 4/8", param="downsample_rate"
        )
    queries, features = map(int, parts)
    if not queries or features != 2 * queries or side % features:
        raise CheckpointError(
            f"config.json: downsample_rate {rate!r} should be a half, of windows that fill {side} patches",
            param="downsample_rate",
        )
    return queries


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Set where the decoder takes a row's parts: the first in place of the embedding, without its factor."""
    _, *further = sorted(_targets(checkpoint.config)[1])
    if further[-1] >= config.decoder.num_layers:
        raise CheckpointError(
            f"config.json: layer {further[-1]} is behind the last of the decoder", param="deepstack_layer_map"
        )
    decoder = replace(
        config.decoder, multiplies_rows=False, deepstack_layers=tuple(layer - 1 for layer in further)
    )
    return replace(config, decoder=decoder, extra=named_tokens(checkpoint, {"image_token": "<image>"}))


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image_token"])


def _weights(config: ModelConfig) -> WeightRules:
    rules = anyres_weights(config)
    own = r"crops.connector.\1.\2."
    block = own + r"blocks.\3."
    projectors = (
        *(
            (_BLOCK + rf"{theirs}\.{part}\.(.*)", block + rf"{ours}.{name}.\4")
            for theirs, ours in (("attention", "attn"), ("crossattention", "cross"))
            for part, name in _PARTS.items()
        ),
        (_BLOCK + r"intermediate_query\.dense\.(.*)", block + r"fc1.\4"),
        (_BLOCK + r"output_query\.dense\.(.*)", block + r"fc2.\4"),
        (_BLOCK + r"output_query\.LayerNorm\.(.*)", block + r"norm.\4"),
        (_PROJECTOR + r"qformer\.layernorm\.(.*)", own + r"query_norm.\3"),
        (_PROJECTOR + r"image_positions", own + "positions"),
        (_PROJECTOR + r"out_linear\.(.*)", own + r"out.\3"),
        (_PROJECTOR + r"(norm\..*|query)", own + r"\3"),
    )
    return replace(rules, vision=(*projectors, *rules.vision))


FAMILY = Family(
    name="granite4_vision",
    architectures=("Granite4VisionForConditionalGeneration",),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=32000),
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    processor=LlavaNextProcessor.create,
    weights=_weights,
    build_encoder=anyres_encoder,
)
