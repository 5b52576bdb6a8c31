"""The pieces that an answer's text is split into: visible text, thoughts, and tool calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Visible text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of a thought, without its tags."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins.

    Attributes:
        index: number of the call in the answer, from 0.
        name: the function's name.
        is_free: the arguments are a text, not JSON; see :mod:`engine.parsers.free_text`.
    """

    index: int
    name: str
    is_free: bool = False


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments; the pieces of one call join up to one JSON object. Of a
    call that is free: a piece of its text."""

    index: int
    text: str
    is_free: bool = False


Event = Text | Reasoning | CallStart | CallArguments


class Parser(Protocol):
    """Splits an answer that arrives in pieces. The joined events don't depend on how the text was cut."""

    def feed(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``."""

    def finish(self) -> list[Event]:
        """Return the events of the text that was held back; nothing may be fed afterwards."""


class SteppedParser:
    """A :class:`Parser` that consumes its buffer step by step, until a step needs more text."""

    def __init__(self) -> None:
        self._buffer = ""
        self._searched = 0

    def feed(self, text: str) -> list[Event]:
        self._buffer += text
        events: list[Event] = []
        while self._step(events):
            pass
        return events

    def _step(self, events: list[Event]) -> bool:
        """Consume a part of the buffer and add what it says to ``events``; False if more text is needed."""
        raise NotImplementedError

    def _search(self, markers: tuple[str, ...], start: int = 0) -> tuple[int, str] | None:
        """Return :func:`first_marker` of the buffer at or after ``start``. Without one, the next search goes
        on where this one ended: it must be for the same markers in the same buffer with more text."""
        found = first_marker(self._buffer, markers, max(start, self._searched))
        longest = max(map(len, markers))
        self._searched = max(0, len(self._buffer) - longest + 1) if found is None else 0
        return found


def whole_characters(text: str) -> str:
    """``text`` as it can be sent. JSON spells a character beyond 16 bits as two escapes, of which a model may
    write one: half a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def held_back(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of one of ``markers``."""
    longest = max((len(marker) for marker in markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def first_marker(text: str, markers: tuple[str, ...], start: int = 0) -> tuple[int, str] | None:
    """Position and text of the earliest marker at or after ``start``; the longest one where several begin."""
    first: tuple[int, str] | None = None
    for marker in markers:
        # Behind one that was found the others don't count: a long text behind it is not searched.
        end = len(text) if first is None else first[0] + len(marker)
        position = text.find(marker, start, end)
        if position >= 0 and (first is None or (position, -len(marker)) < (first[0], -len(first[1]))):
            first = position, marker
    return first
