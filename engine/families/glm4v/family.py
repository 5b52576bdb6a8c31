"""GLM-4.1V-Thinking, GLM-4.5V, GLM-4.6V and GLM-OCR: images and videos at their own resolution, M-RoPE over
pairs of neighbours or halves of heads, and a time behind each step of a video.

Files of GLM-4.6V name the architectures of GLM-4.1V and GLM-4.5V. Which frames of a video they are shown, and
how times are written, follows from the classes of processors that they name beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import GLM_RULES, WeightRules, further_layers
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.model import ConfigReader, TokenId, nested_text, token_field
from engine.families.parsing.tower import axial_theta
from engine.families.qwen2_vl.config import VISUAL, native_vision
from engine.families.qwen2_vl.family import FAMILY as QWEN2_VL
from engine.families.qwen2_vl.processor import ImageRules, QwenProcessor, VideoRules, enlarged
from engine.families.qwen3_vl.family import video_size
from engine.layers.decoder_config import DecoderConfig
from engine.media.video.sampling import glm4v_indices, glm46v_indices
from engine.media.video.video import Pace
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.native_config import GatedMergerConfig, NativeVisionConfig
from engine.vision.transformer_config import VisionConfig

_GLM4V, _GLM46V, _GLM4V_MOE, _GLM_OCR = (
    f"{name}ForConditionalGeneration" for name in ("Glm4v", "Glm46V", "Glm4vMoe", "GlmOcr")
)
#: In ``extra``: times have tenths of seconds and their unit.
_TENTHS = "tenths"
_IMAGE, _VIDEO = "<|image|>", "<|video|>"
_AROUND = "<|begin_of_image|>", "<|end_of_image|>"


def _vision(raw: Json, processor: Json, hidden: int) -> NativeVisionConfig:
    ocr = _GLM_OCR in (raw.get("architectures") or [])
    filled = {
        "depth": 24,
        "hidden_size": 1024 if ocr else 1536,
        "hidden_act": "silu",
        "attention_bias": ocr,
        "num_heads": 16 if ocr else 12,
        "image_size": 336,
        "patch_size": 14,
        "rms_norm_eps": 1e-5,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 1536 if ocr else 4096,
        "intermediate_size": 4096 if ocr else 13696,
        **(raw.get("vision_config") or {}),
    }
    activation, bias = vision_activation(filled["hidden_act"]), flag(filled, "attention_bias")
    inner, out = integer(filled, "intermediate_size"), integer(filled, "out_hidden_size")
    eps = number(filled, "rms_norm_eps")

    def tower(width: int, patch_dim: int) -> VisionConfig:
        return VisionConfig(
            hidden_size=width,
            intermediate_size=inner if ocr else out,
            num_layers=integer(filled, "depth"),
            num_heads=integer(filled, "num_heads"),
            patch_dim=patch_dim,
            patch_bias=True,
            bias=bias and ocr,
            qkv_bias=bias,
            qk_norm_eps=eps if ocr else None,
            qk_norm_each=True,
            activation=activation,
            gated_mlp=True,
            norm="rms",
            norm_eps=eps,
            pre_norm=not ocr,
            positions_last=True,
            post_norm=True,
            rope_theta=axial_theta(filled),
        )

    return native_vision(
        filled,
        processor,
        hidden,
        width_field="hidden_size",
        out_field="out_hidden_size",
        tower=tower,
        position_side=None if ocr else integer(filled, "image_size") // integer(filled, "patch_size"),
        position_cubic=True,
        gated=GatedMergerConfig(3 * out if ocr else inner, activation),
    )


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """A video's steps one by one, each between the tokens that enclose images and before its second.

    Raises:
        CheckpointError: the tokenizer lacks a token that encloses images.
    """
    assert config.image_token_id is not None
    if item.kind == "image":
        return item.placeholder
    start, end = (encode(text) for text in _AROUND)
    if len(start) != 1 or len(end) != 1:
        raise CheckpointError(f"the tokenizer lacks the tokens around images: {' and '.join(_AROUND)}")
    runs = []
    for seconds in item.times:
        time = f"{seconds:.1f} seconds" if config.extra and config.extra[_TENTHS] else str(int(seconds))
        runs.append(PlaceholderRun(start[0], 1, False))
        runs.append(PlaceholderRun(config.image_token_id, item.num_tokens // len(item.times), True))
        runs += [PlaceholderRun(token, 1, False) for token in [*end, *encode(time)]]
    return tuple(runs)


def first_times(pace: Pace, temporal: int) -> tuple[float, ...]:
    """The second of each temporal patch: of every other frame, whatever a patch's number of frames. The last
    one stands for those that lack."""
    steps = -(-len(pace.times) // temporal)
    times = tuple(pace.times[::2])[:steps]
    return times + times[-1:] * (steps - len(times))


def _weights(config: ModelConfig) -> WeightRules:
    merger = VISUAL + r"merger\."
    return WeightRules(
        language=GLM_RULES,
        vision=(
            (VISUAL + r"embeddings\.position_embedding\.weight", "position_embedding"),
            (VISUAL + r"patch_embed\.proj\.(.*)", r"tower.patch_embed.\1"),
            (VISUAL + r"post_conv_layernorm\.(.*)", r"tower.pre_norm.\1"),
            (VISUAL + r"post_layernorm\.(.*)", r"tower.post_norm.\1"),
            (VISUAL + r"(blocks\..*)", r"tower.\1"),
            (VISUAL + r"downsample\.(.*)", r"merger.reduction.\1"),
            (merger + r"post_projection_norm\.(.*)", r"merger.norm.\1"),
            (merger + r"proj\.(.*)", r"merger.proj.\1"),
            (merger + r"((?:gate|up|down)_proj\..*)", r"merger.mlp.\1"),
        ),
        ignore=(
            VISUAL + r"rotary_pos_emb\.inv_freq",
            further_layers(config.decoder.num_layers),
        ),
    )


def _is_later(named: Iterable[Any], architecture: str) -> bool:
    """Return whether a processor is that of GLM-4.6V.

    Args:
        named: names of classes, the first of which counts, or None; without any the architecture decides.
    """
    for name in named:
        if isinstance(name, str) and name.startswith(("Glm46V", "Glm4v")):
            return name.startswith("Glm46V")
    return architecture in (_GLM46V, _GLM_OCR)


def _with_times(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """``config`` with the form of the times of videos, by the class of the whole processor."""
    kinds = ("processor", "preprocessor", "video_preprocessor", "tokenizer")
    files = (f"{kind}_config.json" for kind in kinds)
    named = (checkpoint.json(file).get("processor_class") for file in files)
    return replace(config, extra={_TENTHS: _is_later(named, config.architecture)})


def _samples_later(checkpoint: Checkpoint, config: ModelConfig) -> bool:
    """Return whether frames are chosen as for GLM-4.6V, by the class of the video or image processor."""
    stated = checkpoint.video_preprocessor_config
    named = (stated.get(field) for field in ("video_processor_type", "image_processor_type"))
    return _is_later(named, config.architecture)


def _media_token(field: str, default: int, *, moe: int) -> TokenId:
    """The id in ``field``; ``default`` or, of models with experts, ``moe`` where config.json has none."""

    def token(raw: Json, decoder: DecoderConfig) -> int | None:
        return token_field(field, default=moe if decoder.experts else default)(raw, decoder)

    return token


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Json) -> QwenProcessor:
    videos = VideoRules(
        size=video_size,
        times=first_times,
        sample=glm46v_indices if _samples_later(checkpoint, config) else glm4v_indices,
        bounds=(112 * 112, 28 * 28 * 2 * 30000),
        named_bounds=False,
    )
    # An image is a video of equal frames, and its bounds are those of all of them.
    images = ImageRules(enlarged, bounds=(112 * 112, 28 * 28 * 15000), fill_patch=True, named_bounds=False)
    return QwenProcessor.create(checkpoint, config, options, videos, images)


def _prompt_format(config: ModelConfig) -> PromptFormat:
    # The chat template of GLM-4.1V-Thinking leaves it to the model to open a thought.
    thoughts = None if config.architecture == _GLM_OCR else "think"
    return PromptFormat(image=_IMAGE, video=_VIDEO, thoughts=thoughts)


FAMILY: Family = replace(
    QWEN2_VL,
    name="glm4v",
    architectures=(_GLM4V, _GLM46V, _GLM4V_MOE, _GLM_OCR),
    reader=ConfigReader(
        text=nested_text("glm4v_text", "glm4v_moe_text", "glm_ocr_text"),
        vision=_vision,
        image_token=_media_token("image_token_id", 151343, moe=151363),
        video_token=_media_token("video_token_id", 151344, moe=151364),
        finish=_with_times,
    ),
    prompt_format=_prompt_format,
    placeholder=_placeholder,
    processor=_processor,
    weights=_weights,
)
