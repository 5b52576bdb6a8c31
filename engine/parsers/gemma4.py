"""Tool calls in the notation of Gemma 4's chat template: JSON with bare keys and a quote that is a token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from engine.parsers.arguments import is_json
from engine.parsers.calls_in_text import CallsInText
from engine.parsers.events import CallArguments, Event, first_marker, held_back, whole_characters

CALL, CALL_END = "<|tool_call>", "<tool_call|>"
#: Stands on both sides of a text. A text can't hold it: there is no escape.
QUOTE = '<|"|>'

#: Names have an end, so that a head is soon told from text.
_NAME = r"[^\s{}<:][^\s{}<]{0,127}"
_HEAD = re.compile(rf"\s{{0,16}}call:\s{{0,16}}({_NAME})\s{{0,16}}\{{")
#: What may become a head with more text.
_PART_OF_HEAD = re.compile(rf"\s{{0,16}}(c?|ca|cal|call|call:\s{{0,16}}({_NAME}\s{{0,16}})?)")
#: The text of a JSON string up to its end, or as far as it has come.
_IN_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)
#: How the template, which is Jinja's, writes what JSON spells otherwise.
_SPELLED = {"None": "null"}


class Gemma4Calls(CallsInText):
    """Parses ``<|tool_call>call:NAME{KEY:VALUE,...}<tool_call|>``.

    A value is text between two of ``<|"|>``, a number, ``true``, ``false``, ``null``, a list or an object.
    As for Transformers, keys and texts may be JSON strings as well, and white space may stand between the
    parts. A bare word that is no JSON is a string. A call that breaks the notation ends there, and the rest
    of it is dropped.
    """

    def __init__(self) -> None:
        super().__init__(CALL)
        # Brackets that close what is open, innermost last, and JSON text that stands before the next value.
        self._closing: list[str] = []
        self._before = ""
        # The part of a value or key at the buffer's beginning that holds no end of it.
        self._scanned = 0
        self._read: Callable[[], str | None] = self._read_entry

    def _head(self, start: int) -> tuple[str, int] | None:
        found = _HEAD.match(self._buffer, start)
        if found:
            return found[1], found.end()
        return ("", -1) if _PART_OF_HEAD.fullmatch(self._buffer, start) else None

    def _open(self, name: str) -> None:
        self._closing, self._before, self._read = ["}"], "", self._read_entry
        self._scanned = 0

    def _cut_off(self, rest: str) -> str:
        if self._read == self._read_value:
            scalar = rest.strip()
            return self._before + scalar if is_json(scalar) else ""
        return ""

    def _read_call(self, events: list[Event]) -> bool:
        """Turn the next part of the arguments into JSON text."""
        if self._read not in (self._read_text_value, self._drop):
            self._buffer = self._buffer.lstrip()
            if not self._buffer or CALL_END.startswith(self._buffer):
                return False
            if self._read != self._read_end and self._buffer.startswith(CALL_END):
                self._read = self._drop
        found = self._read()
        if found is None:
            return False
        if found:
            events.append(CallArguments(self._calls, found))
        return True

    def _take(self, end: int) -> str:
        taken, self._buffer = self._buffer[:end], self._buffer[end:]
        self._scanned = 0
        return taken

    def _first(self, *markers: str) -> int:
        """The place of the first of ``markers``; -1 if there is none yet. The buffer is scanned once."""
        if found := first_marker(self._buffer, markers, self._scanned):
            return found[0]
        self._scanned = len(self._buffer) - held_back(self._buffer, markers)
        return -1

    def _read_entry(self) -> str | None:
        """The next key of an object, or its end."""
        if self._buffer[0] == "}":
            return self._close()
        quoted = self._quoted()
        if quoted is None:
            end = self._first(":", "{", "}", CALL_END)
            if end < 0:
                return None
            key = json.dumps(self._buffer[:end].rstrip(), ensure_ascii=False)
        else:
            key, end = quoted
        behind = self._buffer[end:].lstrip() if end >= 0 else ""
        if not behind:
            return None
        if behind[0] != ":" or not end:
            return self._break()
        self._take(len(self._buffer) - len(behind) + 1)
        self._before += f"{key}: "
        self._read = self._read_value
        return ""

    def _quoted(self) -> tuple[str, int] | None:
        """The text at the buffer's beginning as a JSON string, and the place behind it.

        None if there is no quote; a place of -1 if more text is needed. What no JSON string can be is empty.
        """
        if self._buffer[0] == '"':
            start = max(self._scanned, 1)
            inside = _IN_STRING.match(self._buffer, start)
            end = inside.end() if inside else start
            if self._buffer[end : end + 1] != '"':
                self._scanned = end
                return "", -1
            try:
                text = json.loads(self._buffer[: end + 1], strict=False)
            except ValueError:
                return "", 0
            return json.dumps(whole_characters(text), ensure_ascii=False), end + 1
        if QUOTE.startswith(self._buffer):
            return "", -1
        if not self._buffer.startswith(QUOTE):
            return None
        self._scanned = max(self._scanned, len(QUOTE))
        end = self._first(QUOTE)
        if end < 0:
            return "", -1
        return json.dumps(self._buffer[len(QUOTE) : end], ensure_ascii=False), end + len(QUOTE)

    def _read_value(self) -> str | None:
        """The next value, or the first part of it, or the end of a list."""
        before, first = self._before, self._buffer[0]
        if first == "]" and self._closing[-1] == "]":
            return self._close()
        if self._buffer.startswith(QUOTE):
            self._take(len(QUOTE))
            self._before, self._read = "", self._read_text_value
            return before + '"'
        if QUOTE.startswith(self._buffer):
            return None
        if first in "{[":
            self._take(1)
            self._closing.append("}" if first == "{" else "]")
            self._before = ""
            self._read = self._read_entry if first == "{" else self._read_value
            return before + first
        quoted = self._quoted()
        if quoted is not None:
            value, end = quoted
        else:
            end = self._first(",", "}", "]", CALL_END)
            value = _scalar(self._buffer[:end].rstrip()) if end >= 0 else ""
        if end < 0:
            return None
        if not end:
            return self._break()
        self._take(end)
        self._before, self._read = "", self._read_behind
        return before + value

    def _read_text_value(self) -> str | None:
        """The next piece of a text."""
        end = self._buffer.find(QUOTE)
        if end < 0:
            kept = len(self._buffer) - held_back(self._buffer, (QUOTE,))
            return json.dumps(self._take(kept), ensure_ascii=False)[1:-1] if kept else None
        text = self._take(end)
        self._take(len(QUOTE))
        self._read = self._read_behind
        return json.dumps(text, ensure_ascii=False)[1:]

    def _read_behind(self) -> str | None:
        """Read the comma or the bracket behind a value."""
        if self._buffer[0] == ",":
            self._take(1)
            self._before = ", "
            self._read = self._read_entry if self._closing[-1] == "}" else self._read_value
            return ""
        return self._close()

    def _close(self) -> str:
        """The bracket that closes the innermost list or object."""
        if self._buffer[0] != self._closing[-1]:
            return self._break()
        self._take(1)
        # A comma before the bracket separates nothing.
        self._before = ""
        found = self._closing.pop()
        self._read = self._read_behind if self._closing else self._read_end
        return found

    def _read_end(self) -> str:
        """The closing tag, which may be missing."""
        self._buffer = self._buffer.removeprefix(CALL_END)
        self._end_call()
        return ""

    def _break(self) -> str:
        self._read = self._drop
        return ""

    def _drop(self) -> str | None:
        """The rest of a call that isn't in the notation."""
        position = self._buffer.find(CALL_END)
        if position < 0:
            self._take(len(self._buffer) - held_back(self._buffer, (CALL_END,)))
            return None
        self._take(position)
        return self._read_end()


def _scalar(word: str) -> str:
    """JSON text of a bare word."""
    word = _SPELLED.get(word, word)
    return word if is_json(word) else json.dumps(word, ensure_ascii=False)
