"""A model family's facts that the laws need, and its reference's results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from tests.engine.tiny import picture

TOKENS = 10


@dataclass(frozen=True)
class CasePrompt:
    """A rendered prompt with placeholders, and what they stand for."""

    text: str
    pictures: tuple[Image.Image, ...] = ()
    frames: tuple[Image.Image, ...] = ()

    @property
    def entry(self) -> dict[str, Any]:
        """The prompt in the form that ``LLM.generate`` takes."""
        data = {"image": self.pictures, "video": self.frames}
        return {"prompt": self.text, "multi_modal_data": {k: list(v) for k, v in data.items() if v}}

    @property
    def key(self) -> tuple[str, tuple[bytes, ...]]:
        """Tells prompts apart."""
        return self.text, tuple(image.tobytes() for image in (*self.pictures, *self.frames))

    def other(self) -> CasePrompt:
        """Return the prompt's words with other images and frames."""
        return replace(self, pictures=_others(self.pictures), frames=_others(self.frames))

    def others(self, every_frame: bool = True) -> list[CasePrompt]:
        """Return prompts with one image replaced by another, each in turn, or one frame.

        Args:
            every_frame: replace each frame in turn. If False, the first and the last one only.
        """
        frames = range(0, len(self.frames), 1 if every_frame else max(len(self.frames) - 1, 1))
        return [
            replace(self, **{kind: (*images[:i], *_others(images[i : i + 1]), *images[i + 1 :])})
            for kind, images, places in (
                ("pictures", self.pictures, range(len(self.pictures))),
                ("frames", self.frames, frames),
            )
            for i in places
        ]


def _others(images: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    return tuple(picture(*image.size, 99) for image in images)


@dataclass(frozen=True)
class Inputs:
    """A prompt as the reference takes it.

    Attributes:
        ids: of the expanded prompt; None where a row of an image stands that has no id of its own.
        model: the causal model to call.
        arguments: of its forward pass.
        answer_type: ``token_type_ids`` of an answer's tokens.
        vision_ids: tokens that have experts of their own in a prompt, and not in an answer.
    """

    ids: list[int | None]
    model: Any
    arguments: Mapping[str, torch.Tensor]
    answer_type: int = 0
    vision_ids: tuple[int, ...] = ()

    @torch.inference_mode()
    def extended(self, tokens: Sequence[int], token_type: int = 0, *, answer: bool = False) -> Inputs:
        """Return this prompt with text ``tokens`` behind it; with another type they are no part of it, nor as
        an ``answer``."""
        more = torch.tensor([tokens])
        text = {
            "input_ids": more,
            "inputs_embeds": self.model.get_input_embeddings()(more),
            "attention_mask": torch.ones_like(more),
            "mm_token_type_ids": torch.zeros_like(more),
            "moe_mm_token_type_ids": torch.tensor([[not answer and i in self.vision_ids for i in tokens]]),
            "token_type_ids": torch.full_like(more, token_type),
        }
        longer = {
            name: torch.cat([value, text[name]], dim=1) if name in text else value
            for name, value in self.arguments.items()
        }
        return replace(self, ids=[*self.ids, *tokens], arguments=longer)

    @torch.inference_mode()
    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Return float32 log-probabilities of the prompt's tokens but the first, and of ``tokens`` after it.

        Where a row of an image stands, NaN.
        """
        longer = self.extended(tokens, self.answer_type, answer=True).arguments
        table = self.model(**longer).logits[0].log_softmax(-1)
        return torch.tensor(
            [
                math.nan if token is None else float(row[token])
                for row, token in zip(table, [*self.ids[1:], *tokens], strict=False)
            ]
        )


class Reference(Protocol):
    """A loaded checkpoint that we didn't load with our own code."""

    def inputs(self, prompt: CasePrompt) -> Inputs:
        """Return the reference's inputs in float32, on the CPU."""


@dataclass(frozen=True)
class FamilyCase:
    """A row of the table of laws.

    Attributes:
        name: of the row.
        make: writes a tiny checkpoint into a folder: as Transformers saves it, or, given True, with the
            names, the spelling and the shards of the public ones.
        reference: reads what ``make`` wrote.
        frame: the prompt around a text.
        placeholder: what stands for the ``index``-th image of ``count``.
        video: what stands for a video; None if the model has none.
        options: of the engine.
        caches: prefixes of its prompts are cached.
        windows: some of its layers have sliding windows, shorter than its prompts.
        few_tokens: tokens of a step that cut prompts, or hold just one where prompts can't be cut.
        tolerance: how far outputs in bfloat16 may be from the reference's in float32, see
            :meth:`Made.distances <tests.engine.families.made.Made.distances>`.
    """

    name: str
    make: Callable[[Path, bool], object]
    reference: Callable[[Path], Reference]
    frame: str = "{}"
    placeholder: Callable[[int, int], str] | None = None
    video: str | None = None
    texts: tuple[str, ...] = ("hello world 0 1 2 3",)
    single: tuple[tuple[int, int], ...] = ((60, 44), (20, 24))
    several: tuple[tuple[tuple[int, int], ...], ...] = (((90, 30), (33, 70)), ((20, 20), (64, 40), (41, 83)))
    frames: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)
    caches: bool = True
    windows: bool = False
    few_tokens: int = 13
    tolerance: float = 0.06

    @property
    def embeds(self) -> bool:
        """Its outputs are vectors."""
        return self.options.get("task") == "embed"

    def text_prompts(self) -> list[CasePrompt]:
        return [CasePrompt(self.frame.format(text)) for text in self.texts]

    def single_prompts(self) -> list[CasePrompt]:
        """An image at the end, and one at the start."""
        if self.placeholder is None:
            return []
        texts = ("describe this image {}", "{}what is shown?")
        return [
            CasePrompt(self.frame.format(text.format(self.placeholder(0, 1))), (picture(*size, number),))
            for number, (text, size) in enumerate(zip(texts, self.single, strict=True))
        ]

    def several_prompts(self) -> list[CasePrompt]:
        """Images next to each other, and apart."""
        if self.placeholder is None:
            return []
        found = []
        for number, (sizes, between) in enumerate(zip(self.several, ("", " and a red "), strict=False)):
            placeholders = [self.placeholder(index, len(sizes)) for index in range(len(sizes))]
            pictures = tuple(picture(*size, 10 + 10 * number + i) for i, size in enumerate(sizes))
            found.append(
                CasePrompt(self.frame.format(between.join(placeholders) + "what differs?"), pictures)
            )
        return found

    def video_prompts(self) -> list[CasePrompt]:
        """A video before an image."""
        if self.video is None or self.placeholder is None:
            return []
        frames = tuple(picture(40, 56, 50 + number) for number in range(self.frames))
        text = f"a red square {self.video} on a blue {self.placeholder(0, 1)}"
        return [CasePrompt(self.frame.format(text), (picture(20, 50, 60),), frames)]

    def _kinds(self) -> list[list[CasePrompt]]:
        kinds = (self.single_prompts(), self.text_prompts(), self.several_prompts(), self.video_prompts())
        return [kind for kind in kinds if kind]

    def prompts(self) -> list[CasePrompt]:
        """All kinds, mixed."""
        return [prompt for kind in self._kinds() for prompt in kind]

    def one_of_each(self) -> list[CasePrompt]:
        """The last prompt of each kind that the model takes."""
        return [kind[-1] for kind in self._kinds()]
