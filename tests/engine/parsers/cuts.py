"""Feeds a text to a parser in every way of cutting it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from engine.parsers.events import CallArguments, CallStart, Parser, Reasoning, Text


def joined(parser: Parser, pieces: list[str]) -> dict[str, Any]:
    """The visible text, the thoughts, and the calls as pairs of a name and the text of the arguments."""
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls), "calls are numbered in order"
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1, "arguments belong to the last call"
            calls[-1][1] += event.text
    assert all(event.text for event in events if isinstance(event, Text | Reasoning | CallArguments))
    return {
        "text": "".join(event.text for event in events if isinstance(event, Text)),
        "reasoning": "".join(event.text for event in events if isinstance(event, Reasoning)),
        "calls": [(name, arguments) for name, arguments in calls],
    }


def cuts(text: str, draws: int = 40) -> Iterator[list[str]]:
    """All cuts in two, the cut into characters, and random cuts."""
    yield list(text)
    for position in range(1, len(text)):
        yield [text[:position], text[position:]]
    rng = random.Random(text)
    for _ in range(draws):
        places = (
            sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 8)))) if text[1:] else []
        )
        yield [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def parse(make: Callable[[], Parser], text: str) -> dict[str, Any]:
    """Return the result of parsing the whole text; fail if another cut of the text has another result."""
    whole = joined(make(), [text])
    for pieces in cuts(text):
        assert joined(make(), pieces) == whole, pieces
    return whole
