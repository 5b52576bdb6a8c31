"""Tool calls as a list of Python calls: Llama 4, and MiniCPM between its tags. Nothing is evaluated."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any

from engine.parsers.events import (
    CallArguments,
    CallStart,
    Event,
    SteppedParser,
    Text,
    first_marker,
    held_back,
    whole_characters,
)

_OPEN, _CLOSE = "([{", ")]}"
#: Longest call that is parsed, in characters: Python's parser is not made for hostile megabytes.
_MAX_CALL = 100_000
#: Commas of a call that was cut off at which its last whole argument is looked for.
_MAX_COMMAS = 64


class PythonicCalls(SteppedParser):
    """Parses ``[name(key=literal, ...), ...]`` at an answer's beginning, or between tags anywhere.

    A call is reported as soon as its closing parenthesis is there. Arguments must be literals with names.

    Args:
        begin: the opening tag; None where the calls stand at the answer's beginning, in brackets.
        end: the closing tag.
    """

    def __init__(self, begin: str | None = None, end: str | None = None) -> None:
        self._begin, self._end = begin, end
        super().__init__()
        self._state: Callable[[list[Event]], bool] = self._read_start if begin is None else self._read_text
        self._calls = self._in_block = 0
        self._between = self._visible = False
        self._scan = _CallScan()

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._state == self._read_calls:
            cut = _cut_off(rest[self._scan.start :])
            if cut is not None:
                # The arguments stay an open object.
                return [CallStart(self._calls, cut[0]), CallArguments(self._calls, cut[1])]
            return [Text((self._begin or "") + rest)] if not self._in_block else []
        if self._state == self._read_rest or (self._between and rest.isspace()):
            return []
        return [Text(rest)] if rest else []

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def _read_start(self, events: list[Event]) -> bool:
        stripped = self._buffer.lstrip()
        if not stripped:
            return False
        self._state = self._read_calls if stripped[0] == "[" else self._read_plain
        return True

    def _read_plain(self, events: list[Event]) -> bool:
        if self._buffer:
            events.append(Text(self._buffer))
            self._buffer = ""
        return False

    def _read_text(self, events: list[Event]) -> bool:
        assert self._begin is not None
        if self._between:
            text = self._buffer.lstrip()
            if not text:
                return False
            # White space behind a call separates two texts; without a text before the call it is dropped.
            self._buffer, self._between = self._buffer if self._visible else text, False
        found = first_marker(self._buffer, (self._begin,))
        if found is None:
            kept = len(self._buffer) - held_back(self._buffer, (self._begin,))
            kept = len(self._buffer[:kept].rstrip())
            if kept:
                events.append(Text(self._buffer[:kept]))
                self._visible = True
                self._buffer = self._buffer[kept:]
            return False
        visible = self._buffer[: found[0]].rstrip()
        if visible:
            events.append(Text(visible))
            self._visible = True
        self._buffer = self._buffer[found[0] + len(self._begin) :]
        self._state, self._scan, self._in_block = self._read_calls, _CallScan(), 0
        return True

    def _read_calls(self, events: list[Event]) -> bool:
        found = self._scan.next(self._buffer, self._end)
        if found is None:
            return False
        kind, position = found
        if kind == "call":
            call = _parsed(self._buffer[self._scan.start : position])
            if call is not None:
                events += [CallStart(self._calls, call[0]), CallArguments(self._calls, call[1])]
                self._calls += 1
                self._in_block += 1
                self._buffer, self._scan = self._buffer[position:], _CallScan()
                return True
        if kind == "end":
            self._buffer, self._between = self._buffer[position:], True
            self._state = self._read_text if self._begin is not None else self._read_rest
            return True
        # Not a list of calls: the block is text, unless a call of it was reported.
        if self._in_block:
            self._state = self._read_rest
        elif self._begin is None:
            self._state = self._read_plain
        else:
            events.append(Text(self._begin))
            self._state = self._read_text
        return True

    def _read_rest(self, events: list[Event]) -> bool:
        self._buffer = ""
        return False


class _CallScan:
    """Looks for the next complete call in a growing text, of which each character is looked at once.

    Attributes:
        start: where the call begins that is being read, or was found.
    """

    def __init__(self) -> None:
        self.start = 0
        # Up to where the text was read; within a call, the open brackets and the open quote there.
        self._index = self._depth = 0
        self._quote = ""
        self._inside = self._escaped = False

    def next(self, text: str, end: str | None) -> tuple[str, int] | None:
        """Find the next part of a list of calls.

        Args:
            text: begins as the last call's text did.
            end: the tag behind the list; None where a bracket closes it.

        Returns:
            ``("call", index behind it)``, ``("end", index behind the list)`` or ``("broken", index)``. None
            if more text is needed.
        """
        if self._inside:
            return self._call(text)
        while (index := self._index) < len(text):
            if end is not None:
                rest = text[index : index + max(len(end), len("```"))]
                if rest.startswith(end):
                    return "end", index + len(end)
                if end.startswith(rest) or "```".startswith(rest):
                    return None
                if rest.startswith("```"):
                    fence = first_marker(text, ("\n", end), index)
                    if fence is None:
                        return None
                    self._index = fence[0]
                    continue
            elif text[index] == "]":
                return "end", index + 1
            if text[index] not in " \t\r\n,;[]":
                self.start, self._inside = index, True
                return self._call(text)
            self._index += 1
        return None

    def _call(self, text: str) -> tuple[str, int] | None:
        for index in range(self._index, len(text)):
            character = text[index]
            if index - self.start > _MAX_CALL:
                return "broken", index
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif character in "'\"" and self._depth:
                self._quote = character
            elif character in _OPEN:
                if self._depth == 0 and (character != "(" or index == self.start):
                    return "broken", index
                self._depth += 1
            elif character in _CLOSE:
                self._depth -= 1
                if self._depth == 0:
                    return "call", index + 1
                if self._depth < 0:
                    return "broken", index
            elif self._depth == 0 and not (character.isalnum() or character in "_.:-"):
                return "broken", index
        self._index = len(text)
        return None


def _cut_off(text: str) -> tuple[str, str] | None:
    """Name and JSON arguments of a call that was cut off, without the bracket that closes the arguments.

    Of the arguments those are kept that are whole. None if no call had begun.
    """
    if not re.match(r"[\w.:-]+\(", text) or len(text) > _MAX_CALL:
        return None
    # Each comma may stand behind a whole argument; the last that does counts.
    ends = [index for index, character in enumerate(text) if character == ","]
    for end in reversed(ends[-_MAX_COMMAS:]):
        call = _parsed(text[:end] + ")")
        if call is not None:
            return call[0], call[1][:-1]
    return text.partition("(")[0], "{"


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and JSON arguments of one call; None if it isn't one."""
    name, _, arguments = text.partition("(")
    try:
        node = ast.parse("f(" + arguments, mode="eval").body
        assert isinstance(node, ast.Call)
        if node.args:
            return None
        values: dict[str, Any] = {}
        for keyword in node.keywords:
            value = _literal(keyword.value)
            if keyword.arg is None and not isinstance(value, dict):
                return None
            # ``**{...}`` holds arguments whose names are no Python names.
            values |= value if keyword.arg is None else {keyword.arg: value}
        return name.strip(), json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError, AssertionError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; JSON's own ``true``, ``false`` and ``null`` are understood too."""
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(entry) for entry in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(_literal(key)): _literal(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    value = ast.literal_eval(node)
    if isinstance(value, float) and math.isinf(value):
        # JSON has no infinity: a number beyond a double's range becomes the greatest double.
        return math.copysign(sys.float_info.max, value)
    if isinstance(value, str):
        # Python reads two escapes of JSON as two characters.
        return whole_characters(value)
    return value
