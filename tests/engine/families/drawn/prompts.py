"""Prompts of a drawn case: text, images and a video in any order, in one turn or several."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from tests.engine.families.case import CasePrompt
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.pictures import MODES, draw_image, draw_size, seen

_WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "what", "is", "shown", "picture"),
    *(
        "red",
        "square",
        "0",
        "33",
        "4567",
        "USER:",
        "{}",
        "café",
        "你好",
        "𝛼",
        "\n",
        "\t",
        "->",
        "(a+b)*c;",
        "f(x)",
    ),
)

KINDS = ("text", "image last", "image first", "images", "images apart", "turns", "video", "video and image")


@dataclass(frozen=True)
class Style:
    """The form of a family's prompts.

    Attributes:
        frame: text around what a user says, with the start of the answer.
        end: text between an answer and the next turn.
        placeholder: placeholder of the ``index``-th of ``count`` images; None for a model without images.
        video: placeholder of a video; None for a model without videos.
        area: pixels of a large image.
        longest: greatest ratio of an image's sides.
        frames: most frames of a video.
        several: most images of one prompt.
        words: most words of a text.
    """

    frame: str
    end: str = "\n"
    placeholder: Callable[[int, int], str] | None = None
    video: str | None = None
    area: int = 3000
    longest: float = 8.0
    frames: int = 0
    several: int = 3
    words: int = 40


def draw_prompts(draw: Draw, style: Style, count: int) -> list[CasePrompt]:
    """``count`` prompts of kinds that the family has, the first of them of its richest kind."""
    kinds = [kind for kind in KINDS if _has(style, kind)]
    order = draw.stream("kinds of prompts").sample(kinds, len(kinds))
    return [_prompt(draw, style, f"prompt {i}", order[i % len(order)]) for i in range(count)]


def as_seen(prompt: CasePrompt) -> CasePrompt:
    """The prompt with its images in RGB, as the reference takes them."""
    return replace(prompt, pictures=tuple(map(seen, prompt.pictures)), frames=tuple(map(seen, prompt.frames)))


def _has(style: Style, kind: str) -> bool:
    if "video" in kind:
        return style.video is not None and style.frames > 0
    return "image" not in kind or style.placeholder is not None


def _prompt(draw: Draw, style: Style, name: str, kind: str) -> CasePrompt:
    rng = draw.stream(name)
    turns = rng.choice((2, 3)) if kind == "turns" else 1
    wanted = 0
    if style.placeholder is not None:
        wanted = {"image last": 1, "image first": 1, "video and image": 1}.get(kind, 0)
        if kind in ("images", "images apart"):
            wanted = rng.randint(2, max(style.several, 2))
        elif kind == "turns":
            wanted = rng.randint(0, turns)
    images = tuple(_image(draw, style, f"{name} image {i}") for i in range(wanted))
    placeholders = (
        [style.placeholder(i, wanted) for i in range(wanted)] if style.placeholder is not None else []
    )
    frames: tuple[Image.Image, ...] = ()
    if "video" in kind:
        assert style.video is not None
        frames = _video(draw, style, name)
        placeholders.insert(rng.randint(0, len(placeholders)), style.video)
    text = style.end.join(
        style.frame.format(said) + (_words(rng, 6) if i + 1 < turns else "")
        for i, said in enumerate(_said(rng, style, kind, placeholders, turns))
    )
    return CasePrompt(text, images, frames)


def _said(rng: random.Random, style: Style, kind: str, placeholders: list[str], turns: int) -> list[str]:
    """The user's words in each turn, with the placeholders of media."""
    words = [_words(rng, style.words // turns) for _ in range(turns)]
    if kind == "turns":
        for i, placeholder in enumerate(placeholders):
            words[i] = placeholder + words[i] if rng.random() < 0.5 else words[i] + placeholder
        return words
    if kind == "image last":
        return [words[0] + placeholders[0]]
    if kind == "images apart":
        return ["".join(placeholder + _words(rng, 4) for placeholder in placeholders) + words[0]]
    return ["".join(placeholders) + words[0]]


def _words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, max(most, 1))))


def _image(draw: Draw, style: Style, name: str) -> Image.Image:
    rng = draw.stream(name)
    mode = draw.variant(f"{name} mode", MODES, 0.35)
    return draw_image(rng, draw_size(rng, style.area, style.longest), mode)


def _video(draw: Draw, style: Style, name: str) -> tuple[Image.Image, ...]:
    rng = draw.stream(name + " video")
    count = rng.randint(1, min(9, style.frames))
    if draw.varies(f"{name} long video", 0.25):
        count = rng.randint(1, style.frames)
    size = draw_size(rng, style.area // 4, 3.0)
    mode = draw.variant(f"{name} video mode", ("RGB", "L", "RGBA", "P"), 0.2)
    return tuple(draw_image(rng, size, mode) for _ in range(count))
