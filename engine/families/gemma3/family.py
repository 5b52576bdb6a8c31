"""Gemma 3 (4, 12 and 27B): SigLIP, features averaged over squares, and images that attend both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import SANDWICH_RULES, WeightRules
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.families.encoders import crop_encoder
from engine.families.family import Family
from engine.families.gemma3.processor import Gemma3Processor
from engine.families.llava.towers import CONNECTOR, TOWER
from engine.families.parsing.fields import Json, integer
from engine.families.parsing.model import (
    ConfigReader,
    named_tokens,
    nested_text,
    tied_unless_stated,
    token_field,
)
from engine.families.parsing.processor import parse_normalisation
from engine.families.parsing.tower import parse_siglip, tower_rules, unused_tensors
from engine.prompt import MediaItem, PlaceholderRun
from engine.vision.crops_config import CropVisionConfig
from engine.vision.normalisation import HALF_NORMALISATION

#: The tokenizer's fields of the tokens around an image and of its rows, and the public models' values.
_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
_BEFORE_CROPS = "\n\n and here are some crops to help you see better \n\n"
_BETWEEN_CROPS = "\n\n \n\n"


def _vision(raw: Json, processor: Json, hidden: int) -> CropVisionConfig:
    tower = parse_siglip(raw.get("vision_config") or {})
    rows = integer({"mm_tokens_per_image": 256, **raw}, "mm_tokens_per_image")
    side, patches = int(rows**0.5), tower.grid_side
    if side * side != rows or patches % side:
        raise CheckpointError(
            f"config.json: mm_tokens_per_image should be the square of a number that divides the tower's "
            f"{patches} patches per side, not {rows}",
            param="mm_tokens_per_image",
        )
    return tower.crops(
        out_features=hidden,
        normalisation=parse_normalisation(processor, HALF_NORMALISATION),
        averaged=patches // side,
    )


def _finished(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Remembers the tokens of images that the tokenizer's files name."""
    decoder = replace(config.decoder, both_ways="images")
    return replace(config, decoder=decoder, extra=named_tokens(checkpoint, _TOKENS))


def _prompt_format(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["boi_token"])


def _around(config: ModelConfig, item: MediaItem) -> tuple[str, str]:
    """Line feeds, which the tokenizer may join with others; and words before an image that has crops."""
    return "Here is the original image \n\n" if item.grid[0] > 1 else "\n\n", "\n\n"


def _placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The rows of the image, and of each crop, between two tokens, with words between them.

    Raises:
        CheckpointError: the tokenizer lacks one of the tokens.
    """
    assert config.extra is not None and config.image_token_id is not None
    around = [encode(config.extra[field]) for field in ("boi_token", "eoi_token")]
    if any(len(ids) != 1 for ids in around):
        raise CheckpointError(
            f"the tokenizer lacks the tokens around an image: {config.extra['boi_token']} and "
            f"{config.extra['eoi_token']}"
        )
    (start,), (end,) = around
    crops, runs = item.grid[0], list[PlaceholderRun]()
    for crop in range(crops):
        words = "" if not crop else _BEFORE_CROPS if crop == 1 else _BETWEEN_CROPS
        runs += [PlaceholderRun(token, 1, False) for token in [*encode(words), start]]
        runs.append(PlaceholderRun(config.image_token_id, item.num_tokens // crops, True))
        runs.append(PlaceholderRun(end, 1, False))
    return tuple(runs)


def _weights(config: ModelConfig) -> WeightRules:
    return WeightRules(
        language=SANDWICH_RULES,
        vision=(
            (CONNECTOR + r"mm_soft_emb_norm\.(.*)", r"connector.norm.\1"),
            (CONNECTOR + r"mm_input_projection_weight", r"connector.weight"),
            *tower_rules(TOWER),
        ),
        ignore=unused_tensors(TOWER, config.vision.tower),
    )


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    reader=ConfigReader(
        text=tied_unless_stated(nested_text("gemma3_text")),
        vision=_vision,
        image_token=token_field("image_token_index", "image_token_id", default=262144),
        finish=_finished,
    ),
    prompt_format=_prompt_format,
    around=_around,
    placeholder=_placeholder,
    processor=Gemma3Processor.create,
    options=(
        "do_pan_and_scan",
        "pan_and_scan_max_num_crops",
        "pan_and_scan_min_crop_size",
        "pan_and_scan_min_ratio_to_activate",
    ),
    weights=_weights,
    build_encoder=crop_encoder,
)
