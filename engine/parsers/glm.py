"""Tool calls as a name and pairs of tags: GLM-4.5 and later, with or without a tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.parsers.events import (
    CallArguments,
    CallStart,
    Event,
    SteppedParser,
    Text,
    first_marker,
    held_back,
)
from engine.parsers.tagged_arguments import TaggedArguments

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"\s*([^\s<]+)\s*")


class GlmCalls(SteppedParser):
    """Parses ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>``.

    White space may stand between the tags. A value is text for parameters that the schema calls strings, JSON
    for all others; what is no JSON is passed on as a string.

    Args:
        schemas: JSON schema of the parameters of each function, by name.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self._schemas = schemas
        self._inside = False
        self._calls = 0
        self._between = self._visible = False
        self._arguments = TaggedArguments({})

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._inside:
            return self._cut_off(rest)
        return [Text(rest)] if rest and not (self._between and rest.isspace()) else []

    def _cut_off(self, rest: str) -> list[Event]:
        """The part of an argument in a call that was cut off, whose arguments stay an open object."""
        key, _, behind = rest.partition(_KEY)[2].partition(_KEY_END)
        value = behind.partition(_VALUE)[2]
        value = value[: len(value) - held_back(value, (_VALUE_END,))]
        key = self._arguments.key(key)
        part = self._arguments.part(key, value)
        return [CallArguments(self._calls, part)] if part else []

    def _step(self, events: list[Event]) -> bool:
        return self._read_argument(events) if self._inside else self._read_text(events)

    def _read_text(self, events: list[Event]) -> bool:
        if self._between:
            text = self._buffer.lstrip()
            if not text:
                return False
            # White space behind a call separates two texts; it is dropped before a call, and without a text.
            if _CALL.startswith(text):
                return False
            dropped = text.startswith(_CALL) or not self._visible
            self._buffer, self._between = text if dropped else self._buffer, False
        found = first_marker(self._buffer, (_CALL,))
        if found is None:
            kept = len(self._buffer) - held_back(self._buffer, (_CALL,))
            self._pass_text(len(self._buffer[:kept].rstrip()), events)
            return False
        start = found[0] + len(_CALL)
        name = _NAME.match(self._buffer, start)
        end = name.end() if name else len(self._buffer)
        rest = self._buffer[end:]
        if name and rest.startswith((_KEY, _CALL_END)):
            self._pass_text(len(self._buffer[: found[0]].rstrip()), events)
            self._buffer = rest
            self._begin(name[1], events)
            return True
        if any(tag.startswith(rest) for tag in (_KEY, _CALL_END)) and (
            name or not self._buffer[start:].strip()
        ):
            return False
        # A tag without a call is text.
        self._pass_text(start, events)
        return True

    def _pass_text(self, end: int, events: list[Event]) -> None:
        if end:
            events.append(Text(self._buffer[:end]))
            self._visible = True
            self._buffer = self._buffer[end:]

    def _begin(self, name: str, events: list[Event]) -> None:
        self._inside, self._arguments = True, TaggedArguments(self._schemas.get(name, {}))
        events += [CallStart(self._calls, name), CallArguments(self._calls, "{")]

    def _read_argument(self, events: list[Event]) -> bool:
        found = first_marker(self._buffer, (_KEY, _CALL_END))
        if found is None:
            return False
        position, marker = found
        if marker == _CALL_END:
            self._buffer = self._buffer[position + len(marker) :]
            events.append(CallArguments(self._calls, "}"))
            self._calls += 1
            self._inside, self._between = False, True
            return True
        key_start = position + len(_KEY)
        key_end = self._buffer.find(_KEY_END, key_start)
        value_start = self._buffer.find(_VALUE, key_end) if key_end >= 0 else -1
        value_end = self._buffer.find(_VALUE_END, value_start) if value_start >= 0 else -1
        if value_end < 0:
            return False
        key = self._arguments.key(self._buffer[key_start:key_end])
        value = self._buffer[value_start + len(_VALUE) : value_end]
        self._buffer = self._buffer[value_end + len(_VALUE_END) :]
        if entry := self._arguments.entry(key, value):
            events.append(CallArguments(self._calls, entry))
        return True
