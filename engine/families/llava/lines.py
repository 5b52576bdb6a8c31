"""The placeholder of images for Pixtral's tower: line by line, each ended by a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.base import ModelConfig, PromptFormat
from engine.prompt import MediaItem, PlaceholderRun

#: Placeholder strings: of a row, and of the ends of a line and of the image; and the fields that state them.
TOKENS = {"image": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}
_FIELDS = {"image": "image_token", "break": "image_break_token", "end": "image_end_token"}


def with_tokens(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """``config`` with the placeholder strings that the checkpoint's processor uses."""
    stated = checkpoint.json("processor_config.json")
    return replace(config, extra={name: stated.get(_FIELDS[name], text) for name, text in TOKENS.items()})


def line_prompt(config: ModelConfig) -> PromptFormat:
    assert config.extra is not None
    return PromptFormat(image=config.extra["image"])


def line_placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The rows of each line of squares and a token behind it; see :class:`engine.families.family.Family`.

    Raises:
        CheckpointError: the tokenizer lacks a token that ends a line.
    """
    assert config.extra is not None and config.image_token_id is not None
    ends = [encode(config.extra[name]) for name in ("break", "end")]
    if any(len(ids) != 1 for ids in ends):
        raise CheckpointError(
            "the tokenizer lacks the tokens that end lines of patches: "
            f"{config.extra['break']} and {config.extra['end']}"
        )
    (line_end,), (image_end,) = ends
    side = 1 if config.vision.squares is None else config.vision.squares.side
    _, height, width = item.grid
    line = PlaceholderRun(config.image_token_id, width // side, True)
    lines = [line, PlaceholderRun(line_end, 1, False)] * (height // side)
    return (*lines[:-1], PlaceholderRun(image_end, 1, False))
