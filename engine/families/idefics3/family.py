"""Idefics3, SmolVLM and SmolVLM2: an image in crops and once as a whole, SigLIP, and a Llama decoder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.idefics3.processor import Idefics3Processor
from engine.families.idefics3.video import SmolVLMProcessor, words_around, words_of_frame
from engine.families.parsing.defaults import DecoderKind
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import ConfigReader, nested_text, token_field
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, require_squares, tower_rules, unused_tensors
from engine.prompt import MediaItem, PlaceholderRun, runs_with_rows
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION

_TOWER = r"model\.vision_model\."
_TOWER_DEFAULTS = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
_SMOLVLM = "SmolVLMForConditionalGeneration"
IMAGE, _FAKE = "<image>", "<fake_token_around_image>"
WHOLE_TEXT = f"{_FAKE}<global-img>{IMAGE}{_FAKE}"
"""The text that shows an image as a whole."""


def _text(raw: Json) -> tuple[Json, DecoderKind]:
    """The decoder's fields, or those of a config.json that states none."""
    stated = raw.get("text_config") or {"rms_norm_eps": 1e-5}
    return nested_text("llama", text_may_tie=False)({**raw, "text_config": stated})


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    tower = parse_siglip(raw.get("vision_config") or {}, defaults=_TOWER_DEFAULTS)
    factor = integer({"scale_factor": 2, **raw}, "scale_factor")
    require_squares(tower.grid_side, factor, "scale_factor")
    return tower.crops(
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
        pixel_shuffle=factor,
        bucketed_positions=True,
    )


def tiles_text(rows: int, columns: int) -> str:
    """The text that shows the tiles of an image line by line, each after the name of its place."""
    lines = [
        "".join(f"{_FAKE}<row_{row}_col_{column}>{IMAGE}" for column in range(1, columns + 1))
        for row in range(1, rows + 1)
    ]
    return "".join(f"{line}\n" for line in lines)


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """An image's crops row by row, each after the name of its place, then the whole; or a video's frames."""
    crops, rows, columns = item.grid
    text = tiles_text(rows, columns) + (f"\n{WHOLE_TEXT}" if rows else WHOLE_TEXT)
    if item.kind == "video":
        # The words before the first frame stand before the placeholder.
        text += "".join(words_of_frame(seconds) + WHOLE_TEXT for seconds in item.times[1:-1])
    # Tokenised as one text: two line feeds are one token in some vocabularies and two in others.
    return runs_with_rows(encode(text), config.image_token_id, repeat(item.num_tokens // crops))


def _around(config: ModelConfig, item: MediaItem) -> tuple[str, str]:
    return words_around(item) if item.kind == "video" else ("", "")


def _prompt_format(config: ModelConfig) -> PromptFormat:
    return PromptFormat(image=IMAGE, video="<video>" if config.architecture == _SMOLVLM else None)


def _processor(checkpoint: Checkpoint, config: ModelConfig, options: Json) -> Idefics3Processor:
    kind = SmolVLMProcessor if config.architecture == _SMOLVLM else Idefics3Processor
    return kind.create(checkpoint, config, options)


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        vision=(
            (r"model\.connector\.modality_projection\.(proj\..*)", r"connector.\1"),
            *tower_rules(_TOWER),
        ),
        ignore=unused_tensors(_TOWER, config.vision.tower),
    )


FAMILY = Family(
    name="idefics3",
    architectures=("Idefics3ForConditionalGeneration", _SMOLVLM),
    reader=ConfigReader(
        text=_text,
        vision=_vision,
        image_token=token_field("image_token_id", default=128257),
    ),
    prompt_format=_prompt_format,
    around=_around,
    placeholder=_placeholder,
    processor=_processor,
    options=("do_image_splitting", "size"),
    weights=_weights,
    build_encoder=crop_encoder,
)
