"""MiniCPM-V 4.6: an overview and slices of each image, merged in the tower and behind it, and a Qwen3.5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import MULTI_TOKEN_HEADS, WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, ModelConfig, PromptFormat
from engine.families.family import Family
from engine.families.minicpm_v4_6.config import MergedVisionConfig, all_pieces
from engine.families.minicpm_v4_6.processor import MiniCPMV46Processor
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import ConfigReader, named_tokens, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.layers.decoder_config import DecoderConfig
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.normalisation import HALF_NORMALISATION

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

_TOWER = r"(?:model\.)?vision_tower\."
_MERGER = r"(?:model\.)?merger\.mlp\.0\."
#: Attributes of the tokenizer that name tokens in a prompt, and those of the public checkpoint.
_MARKS = {
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def _vision(raw: Json, processor: Json, hidden: int) -> MergedVisionConfig:
    stated = raw.get("vision_config") or {}
    for part, field in ((raw, "merge_kernel_size"), (stated, "window_kernel_size")):
        if part.get(field, [2, 2]) != [2, 2]:
            raise CheckpointError(
                f"config.json: {field} {part[field]!r} is not supported; [2, 2] is", param=field
            )
    if raw.get("merger_times", 1) != 1:
        raise CheckpointError(
            f"config.json: merger_times {raw['merger_times']!r} is not supported; 1 is", param="merger_times"
        )
    mode = raw.get("downsample_mode", "16x")
    if mode not in ("4x", "16x"):
        raise CheckpointError(
            f"config.json: downsample_mode {mode!r} is not supported; 4x and 16x are", param="downsample_mode"
        )
    tower = parse_siglip(stated)
    after = integer({"insert_layer_id": 6, **raw}, "insert_layer_id", least=0)
    if mode == "16x" and after >= tower.config.num_layers:
        raise CheckpointError(
            f"config.json: insert_layer_id {after} is not in a tower of {tower.config.num_layers} layers",
            param="insert_layer_id",
        )
    return MergedVisionConfig(
        tower=tower.config,
        merged_after=after if mode == "16x" else None,
        patch_size=tower.patch_size,
        position_side=tower.grid_side,
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
    )


def _video_token(raw: Json, decoder: DecoderConfig) -> int | None:
    return None if raw.get("video_token_id") is None else integer(raw, "video_token_id", least=0)


def _with_marks(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Adds the strings of the tokens in prompts, and the kinds of media that prompts number."""
    texts: dict[int | None, str] = {index: text for text, index in checkpoint.added_tokens.items()}
    placeholder, of_video = texts.get(config.image_token_id), texts.get(config.video_token_id)
    if placeholder is None:
        raise CheckpointError(
            f"config.json: image_token_id {config.image_token_id} is no special token of the tokenizer",
            param="image_token_id",
        )
    stated = bool(checkpoint.preprocessor_config.get("use_image_id", True))
    numbered = {"image": stated, "video": stated}
    marks: dict[str, Any] = named_tokens(checkpoint, _MARKS)
    marks |= {"image": placeholder, "video": of_video, "numbered": numbered}
    # A model whose tokenizer has no token for videos isn't shown any.
    return replace(config, extra=marks, video_token_id=None if of_video is None else config.video_token_id)


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The image's number, the overview, and the slices row by row; of a video likewise, frame by frame."""
    marks = config.extra
    assert marks is not None
    row = marks[item.kind]
    _, _, rows, columns, _, _, *frames = item.grid
    frame = f"{marks['image_start_token']}{row}{marks['image_end_token']}"
    frame += "\n".join([f"{marks['slice_start_token']}{row}{marks['slice_end_token']}" * columns] * rows)
    text = f"{marks['image_id_start_token']}{index}{marks['image_id_end_token']}"
    text = text if marks["numbered"][item.kind] else ""
    text += frame * (frames[0] if frames else 1)
    token_id = config.video_token_id if item.kind == "video" else config.image_token_id
    counts = iter(height * width // config.vision.side**2 for height, width in all_pieces(item.grid))
    return runs_with_rows(encode(text), token_id, counts)


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image"], video=config.extra["video"])


def _weights(config: ModelConfig) -> WeightRules:
    vision: MergedVisionConfig = config.vision
    window = _TOWER + r"vit_merger\."
    unused = (window + ".*",) if vision.merged_after is None else ()
    return WeightRules(
        vision=(
            (window + r"layer_norm1\.(.*)", r"window_merger.norm1.\1"),
            (window + r"self_attn\.out_proj\.(.*)", r"window_merger.attn.proj.\1"),
            (window + r"self_attn\.(.*)", r"window_merger.attn.\1"),
            (window + r"pre_norm\.(.*)", r"window_merger.norm2.\1"),
            (window + r"linear_([12])\.(.*)", r"window_merger.mlp.fc\1.\2"),
            (_MERGER + r"pre_norm\.(.*)", r"merger.norm.\1"),
            (_MERGER + r"linear_([12])\.(.*)", r"merger.mlp.fc\1.\2"),
            *tower_rules(_TOWER),
        ),
        ignore=(*unused, *unused_tensors(_TOWER, vision.tower), MULTI_TOKEN_HEADS),
    )


def _encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    from engine.families.minicpm_v4_6.encoder import MergedVisionEncoder

    return MergedVisionEncoder(config.vision, build)


FAMILY = Family(
    name="minicpm_v4_6",
    architectures=("MiniCPMV4_6ForConditionalGeneration",),
    reader=ConfigReader(
        text=nested_text("qwen3_5_text", text_may_tie=False),
        vision=_vision,
        image_token=token_field("image_token_id", default=0),
        video_token=_video_token,
        finish=_with_marks,
    ),
    prompt_format=_prompt_format,
    placeholder=_placeholder,
    processor=MiniCPMV46Processor.create,
    options=("max_slice_nums",),
    weights=_weights,
    build_encoder=_encoder,
)
