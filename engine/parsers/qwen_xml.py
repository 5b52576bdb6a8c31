"""Tool calls as nested tags: Qwen3-Coder and Qwen3.5."""

from __future__ import annotations

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
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class QwenXmlCalls(SteppedParser):
    """Parses ``<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>``.

    The outer tag may be missing. A value is text for parameters that the schema calls strings, JSON for all
    others; what is no JSON is passed on as a string.

    Args:
        schemas: JSON schema of the parameters of each function, by name.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        super().__init__()
        self._state = "text"
        self._calls = 0
        self._between = self._visible = False
        #: The closing tag of the last call may still come.
        self._open = False
        self._arguments = TaggedArguments({})

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._state != "text":
            return self._cut_off(rest)
        if self._open and _CALL_END.startswith(rest.strip()):
            # White space behind a call, or a piece of its closing tag.
            return []
        return [Text(rest)] if rest else []

    def _cut_off(self, rest: str) -> list[Event]:
        """The part of an argument in a call that was cut off, whose arguments stay an open object."""
        start = rest.find(_PARAMETER)
        key_end = -1 if start < 0 else self._key_end(rest, start + len(_PARAMETER))
        if key_end < 0:
            return []
        key = self._arguments.key(rest[start + len(_PARAMETER) : key_end])
        value = rest[key_end + 1 :].removeprefix("\n")
        value = value[: len(value) - held_back(value, (f"\n{_PARAMETER_END}",))]
        part = self._arguments.part(key, value)
        return [CallArguments(self._calls, part)] if part else []

    def _step(self, events: list[Event]) -> bool:
        return self._read_text(events) if self._state == "text" else self._read_function(events)

    def _read_text(self, events: list[Event]) -> bool:
        if self._between:
            text = self._buffer.lstrip()
            if not text:
                return False
            # White space behind a call separates two texts; without a text before the call it is dropped.
            self._buffer, self._between = self._buffer if self._visible else text, False
        markers = (_FUNCTION, _CALL_END) if self._calls else (_FUNCTION,)
        found = first_marker(self._buffer, markers)
        if found is None:
            return self._pass_text(events, markers)
        position, marker = found
        if marker == _CALL_END:
            self._open = False
            self._buffer, self._between = (
                self._buffer[:position].rstrip() + self._buffer[position + len(marker) :],
                True,
            )
            return True
        name_end = self._buffer.find(">", position)
        if name_end < 0:
            return False
        visible = self._buffer[:position].rstrip().removesuffix(_CALL).rstrip()
        if visible:
            events.append(Text(visible))
            self._visible = True
        name = self._buffer[position + len(_FUNCTION) : name_end].strip()
        self._buffer = self._buffer[name_end + 1 :]
        self._arguments = TaggedArguments(self._schemas.get(name, {}))
        self._state = "function"
        events += [CallStart(self._calls, name), CallArguments(self._calls, "{")]
        return True

    def _pass_text(self, events: list[Event], markers: tuple[str, ...]) -> bool:
        kept = len(self._buffer) - held_back(self._buffer, (*markers, _CALL))
        visible = self._buffer[:kept].rstrip()
        # The outer tag is held until the function's tag tells whether a call begins.
        visible = visible.removesuffix(_CALL).rstrip()
        if visible:
            events.append(Text(visible))
            self._visible, self._open = True, False
            self._buffer = self._buffer[len(visible) :]
        return False

    def _read_function(self, events: list[Event]) -> bool:
        found = first_marker(self._buffer, (_PARAMETER, _FUNCTION_END, _CALL_END))
        if found is None:
            return False
        position, marker = found
        if marker != _PARAMETER:
            self._buffer = self._buffer[position + (len(marker) if marker == _FUNCTION_END else 0) :]
            events.append(CallArguments(self._calls, "}"))
            self._calls += 1
            self._state, self._between, self._open = "text", True, True
            return True
        ending = self._search((_PARAMETER_END,), position)
        key_end = self._key_end(self._buffer, position + len(_PARAMETER))
        if key_end < 0 or ending is None:
            return False
        value_end = ending[0]
        key = self._arguments.key(self._buffer[position + len(_PARAMETER) : key_end])
        value = self._buffer[key_end + 1 : value_end].removeprefix("\n").removesuffix("\n")
        self._buffer = self._buffer[value_end + len(_PARAMETER_END) :]
        if entry := self._arguments.entry(key, value):
            events.append(CallArguments(self._calls, entry))
        return True

    def _key_end(self, text: str, start: int) -> int:
        """Return the place of the ``>`` behind a key, -1 if it isn't there. Known keys may hold one."""
        known = [key for key in self._arguments.stated if text.startswith(f"{key}>", start)]
        return start + len(max(known, key=len)) if known else text.find(">", start)
