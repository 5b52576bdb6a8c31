"""Prompts given as token ids of families whose images or videos have words around them: as those in text."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.families.registry import resolve
from engine.media.video.video import Pace, Video
from engine.model_parts import load_prompt_builder
from engine.prompt import MediaItem
from tests.engine.families.case import FamilyCase
from tests.engine.families.cases import CASES
from tests.engine.families.made import Made
from tests.engine.families.opened import media_processor, parse
from tests.engine.tiny import picture

#: SmolVLM's placeholder of videos is no token.
ALL = [case for case in CASES if case.name in ("Gemma 3", "Gemma 4 E2B", "InternVL", "Molmo 2", "SmolVLM")]
TOKENS = [case for case in ALL if case.name != "SmolVLM"]


@pytest.fixture
def model(request, made) -> Made:
    return made(request.param)


def mixed(case: FamilyCase, path: Path, frames: int) -> tuple[str, list[MediaItem]]:
    """A text with an image before a video of some frames, if the family has videos, and the items."""
    processor = media_processor(path)
    items = [processor.prepare(picture(60, 44)).item]
    text = f"see {case.placeholder(0, 1)} and "
    if case.video is not None:
        shown = [picture(60, 44, number) for number in range(frames)]
        items.append(processor.prepare_video(Video.of(shown, Pace.of_rate(frames, 2.0))).item)
        text += f"then {case.video} ok"
    return case.frame.format(text), items


@pytest.mark.parametrize("model", ALL, indirect=True, ids=lambda case: case.name)
@pytest.mark.parametrize("frames", [1, 3])
def test_expanded_placeholders_given_back_are_found_where_they_are(model, frames):
    """A video of one frame may read like an image, or like the end of one."""
    builder = load_prompt_builder(EngineConfig(model=str(model.path)))
    text, items = mixed(model.case, model.path, frames)
    built = builder.from_text(text, items)
    again = builder.from_token_ids(built.token_ids, items)
    assert again.token_ids == built.token_ids
    found, wanted = ([(s.item, s.offset, s.length) for s in one.spans] for one in (again, built))
    assert found == wanted


@pytest.mark.parametrize("model", TOKENS, indirect=True, ids=lambda case: case.name)
def test_a_placeholder_token_brings_the_words_around_it(model):
    builder = load_prompt_builder(EngineConfig(model=str(model.path)))
    text, items = mixed(model.case, model.path, 3)
    checkpoint, config = parse(model.path)
    start = resolve(checkpoint).prompt_format(config).start
    ids = builder.tokenizer.encode(start + text)
    assert len(ids) < 60
    assert builder.from_token_ids(ids, items).token_ids == builder.from_text(text, items).token_ids


@pytest.mark.parametrize("model", TOKENS, indirect=True, ids=lambda case: case.name)
def test_a_placeholder_token_behind_an_expanded_one(model):
    """A turn with an image behind the ids of an earlier one with another."""
    builder, processor = load_prompt_builder(EngineConfig(model=str(model.path))), media_processor(model.path)
    items = [processor.prepare(picture(60, 44, number)).item for number in range(2)]
    first, then = (f"see {model.case.placeholder(number, 2)} {word}" for number, word in enumerate("ab"))
    earlier = builder.from_text(first, items[:1]).token_ids
    ids = [*earlier, *builder.tokenizer.encode(then)]
    assert builder.from_token_ids(ids, items).token_ids == builder.from_text(first + then, items).token_ids
