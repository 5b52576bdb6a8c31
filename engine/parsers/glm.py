"""Tool calls as a name and pairs of tags: GLM-4.5 and later, with or without a tower."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.parsers.calls_in_text import CallsInText
from engine.parsers.events import CallArguments, Event, first_marker, held_back
from engine.parsers.tagged_arguments import TaggedArguments

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
_NAME = re.compile(r"\s*([^\s<]+)\s*")


class GlmCalls(CallsInText):
    """Parses ``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>...</tool_call>``.

    White space may stand between the tags. A value is text for parameters that the schema calls strings, JSON
    for all others; what is no JSON is passed on as a string.

    Args:
        schemas: JSON schema of the parameters of each function, by name.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(_CALL)
        self._schemas = schemas
        self._arguments = TaggedArguments({})

    def _cut_off(self, rest: str) -> str:
        key, _, behind = rest.partition(_KEY)[2].partition(_KEY_END)
        value = behind.partition(_VALUE)[2]
        value = value[: len(value) - held_back(value, (_VALUE_END,))]
        return self._arguments.part(self._arguments.key(key), value)

    def _head(self, start: int) -> tuple[str, int] | None:
        name = _NAME.match(self._buffer, start)
        end = name.end() if name else len(self._buffer)
        rest = self._buffer[end:]
        if name and rest.startswith((_KEY, _CALL_END)):
            return name[1], end
        unsure = any(tag.startswith(rest) for tag in (_KEY, _CALL_END))
        return ("", -1) if unsure and (name or not self._buffer[start:].strip()) else None

    def _open(self, name: str) -> None:
        self._arguments = TaggedArguments(self._schemas.get(name, {}))

    def _read_call(self, events: list[Event]) -> bool:
        found = first_marker(self._buffer, (_KEY, _CALL_END))
        if found is None:
            return False
        position, marker = found
        if marker == _CALL_END:
            self._buffer = self._buffer[position + len(marker) :]
            events.append(CallArguments(self._calls, "}"))
            self._end_call()
            return True
        key_start = position + len(_KEY)
        key_end = self._buffer.find(_KEY_END, key_start)
        value_start = self._buffer.find(_VALUE, key_end) if key_end >= 0 else -1
        ending = self._search((_VALUE_END,), value_start) if value_start >= 0 else None
        if ending is None:
            return False
        value_end = ending[0]
        key = self._arguments.key(self._buffer[key_start:key_end])
        value = self._buffer[value_start + len(_VALUE) : value_end]
        self._buffer = self._buffer[value_end + len(_VALUE_END) :]
        if entry := self._arguments.entry(key, value):
            events.append(CallArguments(self._calls, entry))
        return True
