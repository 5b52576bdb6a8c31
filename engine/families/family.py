"""A model family: the steps that all families share, and the parts in which one differs from the others.

A family's module makes one value of :class:`Family` and states only its difference; every field that has a
default may be left out. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import ConfigError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.model import ConfigReader
from engine.families.retrieval import RetrievalFormat
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun

if TYPE_CHECKING:
    from engine.layers.build import BuildContext

Options = Mapping[str, Any]
Positions = tuple[np.ndarray, int]


def with_head(architecture: str) -> tuple[str, ...]:
    """An entry of ``architectures``, and the names that it may have with a head.

    Embedding models are saved without one, such as ``Qwen3VLModel`` of ``Qwen3VLForConditionalGeneration``.
    """
    stem = architecture.removesuffix("Model")
    if stem == architecture:
        return (architecture,)
    return architecture, f"{stem}ForConditionalGeneration", f"{stem.removesuffix('Text')}ForCausalLM"


def item_placeholder(
    config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
) -> tuple[PlaceholderRun, ...]:
    """The item's own placeholder: embedding rows without text among them."""
    return item.placeholder


def nothing_around(config: ModelConfig, item: MediaItem) -> tuple[str, str]:
    """No texts around an item's placeholder string."""
    return "", ""


def plain_positions(config: ModelConfig, ids: Sequence[int], spans: Sequence[MediaSpan]) -> Positions | None:
    """No positions of the family's own: a token's position is its index."""
    return None


def no_encoder(config: ModelConfig, build: BuildContext) -> MediaEncoder:
    """For text-only families, which are never asked for an encoder."""
    raise AssertionError("a text-only model has no encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        name: the folder under ``engine.families``.
        architectures: the entries of ``architectures`` in config.json that the family serves.
        reader: reads config.json and the files beside it.
        prompt_format: the placeholder strings in prompts of a model.
        placeholder: token runs that replace the placeholder string of the ``index``-th item (from 0) of its
            kind in a prompt; ``encode`` tokenises text without adding special tokens.
        around: texts that a prompt gets before and behind an item's placeholder string. They are tokenised
            with the text beside them.
        video_mark_text: what a prompt has of a video in place of the format's ``video_mark``.
        positions: rotary positions ``(axes, len(ids))`` int64 of a prompt's ``ids``, and the number to add to
            the index of every later token to get its position on all axes; None if positions are token
            indices.
        processor: makes the media processor of a checkpoint with the user's options; None if the family is
            text-only.
        options: names of the ``mm_processor_kwargs`` that ``processor`` takes.
        retrieval: the prompts of a model that retrieves or ranks.
        weights: the names of the checkpoint's tensors, without those that every family ignores.
        build_encoder: makes the vision part with its weights allocated but not filled; the result is also a
            ``torch.nn.Module``.
    """

    name: str
    architectures: tuple[str, ...]
    reader: ConfigReader
    prompt_format: Callable[[ModelConfig], PromptFormat] = lambda config: PromptFormat()
    placeholder: Callable[
        [ModelConfig, MediaItem, int, Callable[[str], list[int]]], tuple[PlaceholderRun, ...]
    ] = item_placeholder
    around: Callable[[ModelConfig, MediaItem], tuple[str, str]] = nothing_around
    video_mark_text: Callable[[ModelConfig, MediaItem], str] = lambda config, item: ""
    positions: Callable[[ModelConfig, Sequence[int], Sequence[MediaSpan]], Positions | None] = plain_positions
    processor: Callable[[Checkpoint, ModelConfig, Options], MediaProcessor] | None = None
    options: tuple[str, ...] = ()
    retrieval: Callable[[ModelConfig], RetrievalFormat] = lambda config: RetrievalFormat()
    weights: Callable[[ModelConfig], WeightRules] = lambda config: WeightRules()
    build_encoder: Callable[[ModelConfig, BuildContext], MediaEncoder] = no_encoder

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        """Read the checkpoint's JSON files.

        Raises:
            CheckpointError: naming the field that is missing or not supported.
        """
        served = (
            name
            for stated in checkpoint.architectures
            for name in with_head(stated)
            if name in self.architectures
        )
        architecture = next(served, self.architectures[0])
        return self.reader.read(checkpoint, self.name, architecture)

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Options
    ) -> MediaProcessor | None:
        """The processor of a checkpoint with the user's ``mm_processor_kwargs``; None for a text-only model.

        Raises:
            CheckpointError: naming the field of the processor's file that is not supported.
            ConfigError: naming the option that is unknown or out of bounds.
        """
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ConfigError(
                    f"mm_processor_kwargs: {config.architecture} has no option {name!r}; it has {known}",
                    param=f"mm_processor_kwargs.{name}",
                )
        return None if self.processor is None else self.processor(checkpoint, config, options)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        """Rules that give each of the checkpoint's tensors its part of the model and its name there."""
        rules = self.weights(config)
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return replace(rules, ignore=(ROTARY_BUFFERS, *tied, *rules.ignore))
