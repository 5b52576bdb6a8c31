"""Tool calls in messages to a recipient: Muse Glimmer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
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

START, MESSAGE, END = "<|start|>", "<|message|>", "<|eom|>"
CALLS, CALLS_END = "<atem:function_calls>", "</atem:function_calls>"
INVOKE_END = "</atem:invoke>"
PARAMETER_END = "</atem:parameter>"
_INVOKE, _PARAMETER = '<atem:invoke name="', '<atem:parameter name="'
_HEADER = re.compile(r"<\|start\|>assistant(?: to=([^\s<]+))?<\|message\|>")
#: The prompt has the beginning of an answer's first header.
_FIRST_HEADER = re.compile(r"\s*to=([^\s<]+)<\|message\|>")
#: Those whose messages are thoughts and texts.
_READERS = ("self", "user", None)
#: Characters of the longest header.
_MOST = 200
#: A name in a tag, and its end. At the end of a text both may go on.
_NAME = re.compile(r'([^<"]*)(">|"?\Z)?')
#: Characters of the longest name in a tag that no schema has.
_MOST_OF_NAME = 1000


class MuseCalls(SteppedParser):
    """Parses ``<|start|>assistant to=NAME<|message|>CALLS<|eom|>``, where ``CALLS`` is
    ``<atem:function_calls><atem:invoke name="NAME"><atem:parameter name="KEY">VALUE</atem:parameter>...
    </atem:invoke>...</atem:function_calls>``.

    Messages to ``self`` and ``user`` pass as they are, headers included: calls that they quote are text. In a
    message without a header calls count wherever they stand. A value is text for parameters that the schema
    calls strings, JSON for all others; what is no JSON is passed on as a string. The end of a message ends
    all that is open in it: a value, a call, a tag.

    Args:
        schemas: JSON schema of the parameters of each function, by name.
    """

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        super().__init__()
        #: ``begin`` is where a message may have no header, ``calls`` within one to a function.
        self._state = "begin"
        #: The message has a header; a call was opened in it.
        self._addressed = self._opened = False
        self._calls = 0
        self._arguments: TaggedArguments | None = None
        #: The key whose value the buffer begins with.
        self._key: str | None = None

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._state == "calls" and (self._opened or self._addressed):
            return self._cut_off(rest)
        if self._state == "calls":
            return [Text(CALLS + rest)]
        return [Text(rest)] if rest else []

    def _cut_off(self, rest: str) -> list[Event]:
        """The part of an argument in a call that was cut off, whose arguments stay an open object."""
        if self._arguments is None or self._key is None:
            return []
        value = rest[: len(rest) - held_back(rest, (PARAMETER_END, END, START))]
        part = self._arguments.part(self._key, value)
        return [CallArguments(self._calls, part)] if part else []

    def _step(self, events: list[Event]) -> bool:
        if self._state == "begin":
            return self._read_beginning(events)
        if self._state == "text":
            return self._read_text(events)
        return self._read_calls(events) if self._key is None else self._read_value(events)

    def _read_beginning(self, events: list[Event]) -> bool:
        """Find out to whom a message without a whole header is."""
        stripped = self._buffer.lstrip()
        self._addressed = self._opened = False
        if stripped.startswith(CALLS):
            self._buffer, self._state = stripped[len(CALLS) :], "calls"
            return True
        if self._calls and stripped.startswith(END):
            self._buffer = stripped[len(END) :]
            return True
        header = _FIRST_HEADER.match(self._buffer)
        if header is not None:
            return self._enter(events, header)
        if CALLS.startswith(stripped) or END.startswith(stripped) or _is_open(stripped):
            return False
        self._state = "text"
        return True

    def _read_text(self, events: list[Event]) -> bool:
        """Pass on a message to a reader up to the next one."""
        markers = (START, END) if self._addressed else (START, END, CALLS)
        found = first_marker(self._buffer, markers)
        if found is None:
            kept = len(self._buffer) - held_back(self._buffer, markers)
            self._pass(events, kept, "text")
            return False
        position, marker = found
        if marker == END:
            return self._pass(events, position + len(END), "begin")
        if marker == CALLS:
            self._pass(events, position, "calls")
            self._buffer = self._buffer[len(CALLS) :]
            return True
        if position:
            return self._pass(events, position, "text")
        header = _HEADER.match(self._buffer)
        if header is not None:
            return self._enter(events, header)
        if _is_open(self._buffer[len(START) :], "assistant"):
            return False
        return self._pass(events, len(START), "text")

    def _enter(self, events: list[Event], header: re.Match[str]) -> bool:
        """Go on behind a header, which is dropped where it is a function's."""
        self._addressed = True
        if header[1] in _READERS:
            return self._pass(events, header.end(), "text")
        self._buffer, self._state = self._buffer[header.end() :], "calls"
        return True

    def _pass(self, events: list[Event], length: int, state: str) -> bool:
        if length:
            events.append(Text(self._buffer[:length]))
        self._buffer, self._state = self._buffer[length:], state
        return True

    def _read_calls(self, events: list[Event]) -> bool:
        """Read the next tag; what stands between tags is dropped."""
        tags = (_INVOKE,) if self._arguments is None else (_INVOKE, _PARAMETER)
        found = self._search((*tags, INVOKE_END, CALLS_END, END, START))
        if found is None:
            return False
        position, marker = found
        self._buffer = self._buffer[position:]
        if marker == _INVOKE:
            return self._open(events)
        if marker == _PARAMETER:
            return self._read_key()
        if marker == INVOKE_END:
            self._close(events)
        elif marker != CALLS_END:
            # A call without its end is over, too.
            self._close(events)
            self._state = "begin" if marker == END else "text"
        elif not self._addressed:
            self._close(events)
            self._state = "begin"
        self._buffer = self._buffer[len(marker) if marker != START else 0 :]
        return True

    def _open(self, events: list[Event]) -> bool:
        name = self._tag(_INVOKE, self._schemas)
        if not name:
            return name is not None
        # A call without its end is over where the next one begins.
        self._close(events)
        self._opened = True
        # Functions whose names have no namespace are written in one of their own name.
        space, _, bare = name.partition(".")
        name = bare if name not in self._schemas and space == bare and bare in self._schemas else name
        self._arguments = TaggedArguments(self._schemas.get(name, {}))
        events += [CallStart(self._calls, name), CallArguments(self._calls, "{")]
        return True

    def _close(self, events: list[Event]) -> None:
        if self._arguments is not None:
            events.append(CallArguments(self._calls, "}"))
            self._calls += 1
            self._arguments = None

    def _read_key(self) -> bool:
        assert self._arguments is not None
        key = self._tag(_PARAMETER, self._arguments.stated)
        if key:
            self._key = self._arguments.key(key)
        return key is not None

    def _read_value(self, events: list[Event]) -> bool:
        found = self._search((PARAMETER_END, END, START))
        if found is None:
            return False
        assert self._arguments is not None and self._key is not None
        position, marker = found
        if entry := self._arguments.entry(self._key, self._buffer[:position]):
            events.append(CallArguments(self._calls, entry))
        self._buffer = self._buffer[position + (len(marker) if marker == PARAMETER_END else 0) :]
        self._key = None
        return True

    def _tag(self, opening: str, known: Collection[str]) -> str | None:
        """Consume the tag that the buffer begins with and return its name; None if more text is needed. Of
        what is no tag the ``opening`` is dropped, with an empty name.

        Args:
            known: names that may hold any character.
        """
        most = max(_MOST_OF_NAME, *(len(name) + 2 for name in known)) if known else _MOST_OF_NAME
        text = self._buffer[len(opening) : len(opening) + most]
        if any(f'{name}">'.startswith(text) and len(text) < len(name) + 2 for name in known):
            return None
        whole = [name for name in known if text.startswith(f'{name}">')]
        if whole:
            name, end = max(whole, key=len), '">'
        else:
            found = _NAME.match(text)
            assert found is not None
            name, end = found[1], found[2]
            if end is not None and end != '">' and len(text) < most:
                return None
        if end != '">':
            name = ""
        self._buffer = self._buffer[len(opening) + (len(name) + 2 if name else 0) :]
        return name


def _is_open(text: str, role: str = "") -> bool:
    """Return whether ``text`` may be the beginning of a header behind its tag, with ``role`` first."""
    if len(text) >= _MOST or not text.startswith(role):
        return role.startswith(text)
    rest = text[len(role) :].removeprefix(" " if role else "")
    named = re.fullmatch(r"(?:t|to|to=[^\s<]*)?(<[^<]*)?", rest)
    return named is not None and MESSAGE.startswith(named[1] or "")
