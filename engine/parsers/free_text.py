"""Calls of functions whose only argument is a free text: the text itself in place of the JSON around it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import reduce
from typing import Literal

from engine.parsers.events import CallArguments, CallStart, Event, Parser, whole_characters

#: The argument that holds the text.
ARGUMENT = "input"

_SPACE = r"[ \t\r\n]*"
_PARTS_OF_HEAD = (_SPACE, r"\{", _SPACE, *f'"{ARGUMENT}"', _SPACE, ":", _SPACE, '"')
_HEAD = re.compile("".join(_PARTS_OF_HEAD))
#: The beginning of a head.
_BEGUN_HEAD = re.compile(reduce(lambda behind, part: f"({part}{behind})?", reversed(_PARTS_OF_HEAD), ""))
#: Most characters of a head; JSON may have any number of spaces.
_MOST_OF_HEAD = 64
#: Some plain characters of a JSON string, or an escape.
_PIECE = re.compile(r'[^"\\]+|\\(?:u.{4}|[^u])', re.DOTALL)
#: The halves of a surrogate pair, and what may become the second.
_HIGH, _LOW = re.compile(r"\\u[dD][89abAB]"), re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_PART_OF_LOW = re.compile(r"\\?|\\u.{0,3}", re.DOTALL)


class FreeText:
    """Reads ``{"input": "..."}`` from pieces.

    Half of a surrogate pair, which no text can hold, becomes U+FFFD. Other arguments than these, which models
    write where no grammar holds them, are a text as they stand.
    """

    def __init__(self) -> None:
        self._buffer = ""
        self._state: Literal["head", "text", "other", "end"] = "head"

    @property
    def is_open(self) -> bool:
        """The text has no end yet."""
        return self._state in ("head", "text")

    def feed(self, text: str) -> str:
        """Return what is certain of the text after ``text``."""
        if self._state == "other":
            return text
        if self._state == "end":
            return ""
        self._buffer += text
        if self._state == "head":
            head = _HEAD.match(self._buffer, 0, _MOST_OF_HEAD)
            if head is None and len(self._buffer) < _MOST_OF_HEAD and _BEGUN_HEAD.fullmatch(self._buffer):
                return ""
            if head is None:
                self._state = "other"
                return self._buffer
            self._buffer, self._state = self._buffer[head.end() :], "text"
        texts, end = [], 0
        while piece := _PIECE.match(self._buffer, end):
            behind = piece.end()
            if _HIGH.match(piece[0]):
                if low := _LOW.match(self._buffer, behind):
                    behind = low.end()
                elif _PART_OF_LOW.fullmatch(self._buffer, behind):
                    break
            texts.append(_decoded(self._buffer[end:behind]))
            end = behind
        self._buffer = self._buffer[end:]
        if self._buffer.startswith('"'):
            self._state = "end"
        return "".join(texts)


class FreeTextCalls:
    """A parser of calls that gives the arguments of some functions as text.

    Args:
        calls: gives the arguments of all functions as JSON.
        names: of the functions.
    """

    def __init__(self, calls: Parser, names: Collection[str]) -> None:
        self._calls, self._names = calls, names
        self._texts: dict[int, FreeText] = {}

    @property
    def last_is_whole(self) -> bool:
        """The last text has its end."""
        return bool(self._texts) and not self._texts[max(self._texts)].is_open

    def feed(self, text: str) -> list[Event]:
        return self._with_text(self._calls.feed(text))

    def finish(self) -> list[Event]:
        return self._with_text(self._calls.finish())

    def _with_text(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if isinstance(event, CallStart) and event.name in self._names:
                self._texts[event.index] = FreeText()
                event = CallStart(event.index, event.name, is_free=True)
            elif isinstance(event, CallArguments) and event.index in self._texts:
                if not (text := self._texts[event.index].feed(event.text)):
                    continue
                event = CallArguments(event.index, text, is_free=True)
            found.append(event)
        return found


def _decoded(piece: str) -> str:
    if not piece.startswith("\\"):
        return piece
    try:
        found: str = json.loads(f'"{piece}"')
    except ValueError:
        # JSON doesn't know this escape: it stands for itself.
        return piece
    return whole_characters(found)
