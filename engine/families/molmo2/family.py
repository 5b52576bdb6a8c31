"""Molmo 2: features of two tower layers, windows of patches pooled by attention, images that see each
other, but not the text between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import MOLMO2_POST_RULES, MOLMO2_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.molmo2.config import parse_vision, with_frames
from engine.families.molmo2.processor import Molmo2Processor
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, with_aliases
from engine.families.parsing.model import ConfigReader, named_tokens, token_field
from engine.families.parsing.tower import unused_layers
from engine.prompt import MediaItem, PlaceholderRun

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_VIT = r"model\.(?:vision_backbone\.image_vit|vision_tower)\."
_BLOCKS = _VIT + r"(?:transformer\.resblocks|layers)\."
_BLOCK = _BLOCKS + r"(\d+)\."
_POOLING = r"model\.(?:vision_backbone|multi_modal_projector)\.image_pooling_2d\."
_PROJECTOR = r"model\.(?:vision_backbone|multi_modal_projector)\.image_projector\."
_FURTHER = "model.transformer.wte.new_embedding"
#: Fields of the decoder, and the names that public files have for them.
_ALIASES = {"attention_bias": "qkv_bias", "rms_norm_eps": "layer_norm_eps"}
#: Tokens of images and frames, beside the one that rows replace.
_SEEING = (
    *("<im_start>", "<im_end>", "<im_col>", "<low_res_im_start>"),
    *("<frame_start>", "<frame_end>", "<im_low>"),
)
#: Fields of processor_config.json, with their values where the file states none.
_COLUMNS = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": None,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
    "use_frame_special_tokens": True,
}


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    fields = with_aliases(raw.get("text_config") or {}, _ALIASES)
    if raw.get("tie_word_embeddings") or fields.get("tie_word_embeddings"):
        raise CheckpointError(
            "config.json: tie_word_embeddings True is not supported", param="tie_word_embeddings"
        )
    return {**fields, "tie_word_embeddings": False}, "molmo2_text"


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The rows of the embedding table that are a tensor of their own, the placeholder's embedding, which is
    added to the rows of images, and the tokens around these, all of which see each other."""
    assert config.image_token_id is not None
    added = checkpoint.added_tokens
    seeing = {config.image_token_id, *(added[token] for token in _SEEING if token in added)}
    decoder = replace(
        config.decoder,
        further_embeddings=_further(checkpoint, config.decoder.unpredicted),
        row_token=config.image_token_id,
        both_ways="tokens",
        seeing_tokens=tuple(sorted(seeing)),
    )
    stated = checkpoint.json("tokenizer_config.json")
    first = next((stated[field] for field in ("bos_token", "eos_token") if stated.get(field)), "")
    extra: dict[str, Any] = {
        "start": first["content"] if isinstance(first, dict) else first,
        **named_tokens(checkpoint, {"image_token": "<|image|>", "video_token": "<|video|>"}),
    }
    written = checkpoint.json("processor_config.json")
    extra |= {field: written.get(field, usual) for field, usual in _COLUMNS.items()}
    vision = with_frames(config.vision, checkpoint.video_preprocessor_config)
    return replace(config, decoder=decoder, vision=vision, extra=extra)


def _further(checkpoint: Checkpoint, usual: int) -> int:
    """Rows of the tensor of further embeddings: Transformers saves the table in two halves, publishers those
    of the ``usual`` number of tokens apart. That is assumed where the weights are not at hand."""
    if _FURTHER not in checkpoint.tensor_names:
        return 0
    try:
        return checkpoint.tensors[_FURTHER].shape[0]
    except CheckpointError:
        return usual


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    extra = config.extra
    return PromptFormat(image=extra["image_token"], video=extra["video_token"], start=extra["start"])


def _around(config: ModelConfig, item: MediaItem) -> tuple[str, str]:
    """The time of a video's first frame."""
    return (f"{item.times[0]:.1f} ", "") if item.kind == "video" else ("", "")


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The whole image, then its crops, or frames with their times, each between two tokens; a token may end
    each line of rows.

    Raises:
        CheckpointError: the tokenizer lacks one of the tokens.
    """
    extra = config.extra
    assert extra is not None and config.image_token_id is not None
    if item.kind == "video":
        return _frames(config, item, extra, encode)
    columns = extra["image_use_col_tokens"]
    whole_columns = extra["use_single_crop_col_tokens"]
    start = "<low_res_im_start>" if extra["use_single_crop_start_token"] else "<im_start>"
    parts = (
        (start, columns if whole_columns is None else whole_columns),
        ("<im_start>", columns),
    )
    runs = list[PlaceholderRun]()
    for (begin, ends), (lines, length) in zip(parts, config.vision.shapes(item.grid), strict=True):
        runs.append(_text_run(begin, encode))
        line_end = [_text_run("<im_col>", encode)] if ends else []
        runs += [PlaceholderRun(config.image_token_id, length, True), *line_end] * lines
        runs.append(_text_run("<im_end>", encode))
    return tuple(runs)


def _frames(
    config: ModelConfig, item: MediaItem, extra: Mapping[str, Any], encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    assert config.image_token_id is not None
    kind = "frame" if extra["use_frame_special_tokens"] else "im"
    begin, end = (_text_run(f"<{kind}_{place}>", encode) for place in ("start", "end"))
    line_end = [_text_run("<im_col>", encode)] if extra["video_use_col_tokens"] else []
    runs = list[PlaceholderRun]()
    for number, (lines, length) in enumerate(config.vision.shapes(item.grid)):
        if number:
            runs += [PlaceholderRun(token, 1, False) for token in encode(f" {item.times[number]:.1f} ")]
        runs += [begin, *[PlaceholderRun(config.image_token_id, length, True), *line_end] * lines, end]
    return tuple(runs)


def _text_run(token: str, encode: Callable[[str], list[int]]) -> PlaceholderRun:
    ids = encode(token)
    if len(ids) != 1:
        raise CheckpointError(f"the tokenizer lacks a token of images: {token}")
    return PlaceholderRun(ids[0], 1, False)


def _weights(config: ModelConfig) -> WeightRules:
    block = r"tower.blocks.\1."
    return WeightRules(
        language=MOLMO2_POST_RULES if config.decoder.post_norm else MOLMO2_RULES,
        vision=(
            (_VIT + r"patch_embedding\.(.*)", r"tower.patch_embed.\1"),
            (_VIT + r"positional_embedding", "tower.position_embedding"),
            (_BLOCK + r"(?:attention_norm|layer_norm1)\.(.*)", block + r"norm1.\2"),
            (_BLOCK + r"(?:ffn_norm|layer_norm2)\.(.*)", block + r"norm2.\2"),
            (_BLOCK + r"attention\.w([qkv])\.(.*)", block + r"attn.\2_proj.\3"),
            (_BLOCK + r"(?:attention\.wo|self_attn\.o_proj)\.(.*)", block + r"attn.proj.\2"),
            (_BLOCK + r"self_attn\.(.*)", block + r"attn.\2"),
            (_BLOCK + r"(?:feed_forward\.w1|mlp\.fc1)\.(.*)", block + r"mlp.fc1.\2"),
            (_BLOCK + r"(?:feed_forward\.w2|mlp\.fc2)\.(.*)", block + r"mlp.fc2.\2"),
            (_POOLING + r"w([qkvo])\.(.*)", r"adapter.\1_proj.\2"),
            (_POOLING + r"(.*)", r"adapter.\1"),
            (_PROJECTOR + r"w1\.(.*)", r"adapter.gate_proj.\1"),
            (_PROJECTOR + r"w2\.(.*)", r"adapter.down_proj.\1"),
            (_PROJECTOR + r"w3\.(.*)", r"adapter.up_proj.\1"),
            (_PROJECTOR + r"(.*)", r"adapter.\1"),
        ),
        ignore=unused_layers(_BLOCKS, config.vision.tower),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.molmo2.encoder import MolmoVisionEncoder

    return MolmoVisionEncoder(config.vision, build)


_PATCH = token_field("image_patch_id", "image_token_id", default=151938)
FAMILY = Family(
    name="molmo2",
    architectures=("Molmo2ForConditionalGeneration",),
    reader=ConfigReader(
        text=_text,
        vision=parse_vision,
        image_token=_PATCH,
        video_token=_PATCH,
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    placeholder=_placeholder,
    around=_around,
    processor=Molmo2Processor.create,
    options=("max_crops",),
    weights=_weights,
    build_encoder=_encoder,
)
