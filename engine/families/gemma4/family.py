"""Gemma 4 (E2B, E4B, 26B-A4B, 31B): images and videos at their own shape, and layers of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import GEMMA4_RULES, WeightRules, unused_keys
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.gemma4.config import PooledVisionConfig
from engine.families.gemma4.processor import Gemma4Processor, centred, stated_normalisation
from engine.families.parsing.fields import Json, flag, integer, number, vision_activation
from engine.families.parsing.model import (
    ConfigReader,
    named_tokens,
    nested_text,
    tied_unless_stated,
    token_field,
)
from engine.media.video.video import minutes_and_seconds
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.transformer_config import VisionConfig

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

#: The tokenizer's fields of the tokens around an image and of its rows, and the public models' values.
_TOKENS = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
_VIDEO = "<|video|>"
_TOWER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_parameters": None,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "use_clipped_linears": False,
    "standardize": False,
}
_LAYER = r"(?:model\.)?vision_tower\.encoder\.layers\.(\d+)\."
_BLOCK = r"tower.blocks.\1."


def stated_vision(raw: Json) -> Json:
    """The vision part of config.json.

    Raises:
        CheckpointError: the model has none.
    """
    stated = raw.get("vision_config")
    if stated is None:
        raise CheckpointError("config.json: vision_config null is not supported", param="vision_config")
    return stated


def _vision(raw: Json, processor: Json, hidden: int) -> PooledVisionConfig:
    config = {**_TOWER, **stated_vision(raw)}
    width, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    head_dim = integer(config, "head_dim")
    if head_dim * heads != width or head_dim % 4 or integer(config, "num_key_value_heads") != heads:
        raise CheckpointError(
            f"config.json: {heads} heads of {head_dim} don't suit a tower of {width}", param="vision_config"
        )
    if config["attention_bias"]:
        raise CheckpointError(
            "config.json: attention_bias of the vision part is not supported", param="attention_bias"
        )
    rope = {"rope_type": "axial", "rope_theta": 100.0, **(config["rope_parameters"] or {})}
    if rope["rope_type"] not in ("axial", "default"):
        raise CheckpointError(
            f"config.json: rope type {rope['rope_type']!r} of the vision part is not supported",
            param="vision_config",
        )
    patch = integer(config, "patch_size")
    tower = VisionConfig(
        hidden_size=width,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=heads,
        patch_dim=3 * patch * patch,
        bias=False,
        activation=vision_activation(config["hidden_activation"], "hidden_activation"),
        gated_mlp=True,
        norm="rms",
        norm_eps=number(config, "rms_norm_eps"),
        rope_theta=number(rope, "rope_theta", param="vision_config"),
        sandwich=True,
        bounded=flag(config, "use_clipped_linears"),
    )
    return PooledVisionConfig(
        tower=tower,
        patch_size=patch,
        num_positions=integer(config, "position_embedding_size"),
        side=integer(config, "pooling_kernel_size"),
        standardised=flag(config, "standardize"),
        out_features=hidden,
        normalisation=centred(stated_normalisation(processor, normalises=False)),
    )


def with_media_tokens(
    config: ModelConfig, checkpoint: Checkpoint, both_ways: str | None = None
) -> ModelConfig:
    """Adds the tokens of images that the tokenizer's files name, and what they are to the decoder.

    Args:
        both_ways: ``use_bidirectional_attention`` where config.json doesn't say.
    """
    text = checkpoint.config.get("text_config") or {}
    sees_ahead = text.get("use_bidirectional_attention", both_ways) == "vision"
    sound = checkpoint.config.get("audio_token_id", 258881)
    media = (config.image_token_id, config.video_token_id, sound)
    decoder = replace(
        config.decoder,
        both_ways="images" if sees_ahead else None,
        media_tokens=tuple(token for token in media if token is not None),
        blank_token=integer({"pad_token_id": 0, **text}, "pad_token_id", least=0),
    )
    # A model whose tokenizer has no token for videos isn't shown any.
    video = config.video_token_id if _VIDEO in checkpoint.added_tokens else None
    tokens = named_tokens(checkpoint, _TOKENS)
    return replace(config, decoder=decoder, video_token_id=video, extra=tokens)


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    video = None if config.video_token_id is None else _VIDEO
    return PromptFormat(image=config.extra["image_token"], video=video)


def _around(config: ModelConfig, item: MediaItem) -> tuple[str, str]:
    """The time of a video's first frame."""
    return (f"{minutes_and_seconds(item.times[0])} ", "") if item.kind == "video" else ("", "")


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The rows of the image between two tokens; of a video those of each frame, with its time before them."""
    tokens = config.extra
    assert tokens is not None
    frames, height, width = item.grid
    is_video = item.kind == "video"
    row = _VIDEO if is_video else tokens["image_token"]
    shown = f"{tokens['boi_token']}{row}{tokens['eoi_token']}"
    text = shown + "".join(f" {minutes_and_seconds(seconds)} {shown}" for seconds in item.times[1:])
    row_token = config.video_token_id if is_video else config.image_token_id
    counts = iter([height * width // config.vision.side**2] * frames)
    return runs_with_rows(encode(text), row_token, counts)


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (r"(?:model\.)?vision_tower\.patch_embedder\.input_proj\.(.*)", r"tower.patch_embed.\1"),
            (r"(?:model\.)?vision_tower\.patch_embedder\.position_embedding_table", "position_embedding"),
            (r"(?:model\.)?vision_tower\.(std_(?:bias|scale))", r"\1"),
            (r"(?:model\.)?embed_vision\.embedding_projection\.(.*)", r"projection.\1"),
            (_LAYER + r"input_layernorm\.(.*)", _BLOCK + r"norm1.\2"),
            (_LAYER + r"post_attention_layernorm\.(.*)", _BLOCK + r"attention_out_norm.\2"),
            (_LAYER + r"pre_feedforward_layernorm\.(.*)", _BLOCK + r"norm2.\2"),
            (_LAYER + r"post_feedforward_layernorm\.(.*)", _BLOCK + r"mlp_out_norm.\2"),
            (_LAYER + r"self_attn\.([qk]_norm\..*)", _BLOCK + r"attn.\2"),
            (_LAYER + r"self_attn\.([qkvo]_proj\.)(?:linear\.)?(.*)", _BLOCK + r"attn.\2\3"),
            (_LAYER + r"mlp\.([a-z]+_proj\.)(?:linear\.)?(.*)", _BLOCK + r"mlp.\2\3"),
        ),
        language=GEMMA4_RULES,
        ignore=(
            r"(?:model\.)?(?:audio_tower|embed_audio)\..*",
            *unused_keys(config.decoder.borrowing_layers),
        ),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.gemma4.encoder import PooledVisionEncoder

    return PooledVisionEncoder(config.vision, build)


FAMILY = Family(
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("gemma4_text")),
        vision=_vision,
        image_token=token_field("image_token_id", default=258880),
        video_token=token_field("video_token_id", default=258884),
        finish=with_media_tokens,
    ),
    prompt_format=_prompt_format,
    around=_around,
    placeholder=_placeholder,
    processor=Gemma4Processor.create,
    options=("max_soft_tokens",),
    weights=_weights,
    build_encoder=_encoder,
)
