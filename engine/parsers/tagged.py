"""Tool calls as JSON objects between tags: Hermes and Qwen, InternLM, and their relatives."""

from __future__ import annotations

from engine.parsers.events import (
    CallArguments,
    CallStart,
    Event,
    SteppedParser,
    Text,
    first_marker,
    held_back,
)
from engine.parsers.json_call import JsonCall, MalformedCall


class TaggedCalls(SteppedParser):
    """Parses ``BEGIN {"name": ..., "arguments": {...}} END`` anywhere in an answer.

    White space beside a call is layout and is dropped. A block that is no call stays visible text, tags
    included.

    Args:
        begin: spellings of the opening tag.
        end: the closing tag; a call may lack it at the answer's end.
    """

    def __init__(self, begin: tuple[str, ...], end: str) -> None:
        self._begin, self._end = begin, end
        super().__init__()
        self._call: JsonCall | None = None
        #: The opening tag of the call with the white space before it, and the call's text behind it.
        self._tag = self._read = ""
        self._calls = 0
        self._between = self._visible = False

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._call is not None:
            if self._call.name is None:
                events.append(Text(self._tag + self._read))
        elif self._buffer and not (self._between and self._buffer.isspace()):
            events.append(Text(self._buffer))
        self._buffer = ""
        return events

    def _step(self, events: list[Event]) -> bool:
        """Consume what is certain of the buffer; return whether another step may follow."""
        if self._call is None:
            return self._read_text(events)
        if self._call.broken:
            return self._read_broken()
        if not self._call.done:
            return self._read_call(events)
        return self._read_end()

    def _read_text(self, events: list[Event]) -> bool:
        if self._between:
            text = self._buffer.lstrip()
            if not text:
                return False
            # White space behind a call separates two texts; without a text before the call it is dropped.
            self._buffer, self._between = self._buffer if self._visible else text, False
        found = first_marker(self._buffer, self._begin)
        if found is None:
            # White space may stand before a tag, and is dropped then.
            kept = len(self._buffer) - held_back(self._buffer, self._begin)
            kept = len(self._buffer[:kept].rstrip())
            if kept:
                events.append(Text(self._buffer[:kept]))
                self._visible = True
                self._buffer = self._buffer[kept:]
            return False
        position, marker = found
        visible = self._buffer[:position].rstrip()
        if visible:
            events.append(Text(visible))
            self._visible = True
        self._tag = self._buffer[len(visible) : position + len(marker)]
        self._buffer = self._buffer[position + len(marker) :]
        self._call = JsonCall()
        return True

    def _read_call(self, events: list[Event]) -> bool:
        assert self._call is not None
        if not self._buffer:
            return False
        known, piece = self._call.name is not None, self._buffer
        try:
            arguments, self._buffer = self._call.feed(piece)
        except MalformedCall:
            # Only the tag is certain to be text: a call may begin behind it.
            events.append(Text(self._tag))
            self._buffer, self._call, self._read = self._read + piece, None, ""
            return True
        self._read += piece[: len(piece) - len(self._buffer)]
        if not known and self._call.name is not None:
            events.append(CallStart(self._calls, self._call.name))
        if arguments:
            events.append(CallArguments(self._calls, arguments))
        return self._call.done or self._call.broken

    def _read_broken(self) -> bool:
        """Drop the rest of a call whose name was passed on already."""
        position = self._buffer.find(self._end)
        if position < 0:
            self._buffer = self._buffer[len(self._buffer) - held_back(self._buffer, (self._end,)) :]
            return False
        self._buffer = self._buffer[position:]
        assert self._call is not None
        self._call.done, self._call.broken = True, False
        return True

    def _read_end(self) -> bool:
        """Skip the closing tag, or take the next call for its end."""
        rest = self._buffer.lstrip()
        if self._end.startswith(rest) and rest != self._end:
            self._buffer = rest
            return False
        self._buffer = rest.removeprefix(self._end)
        self._call, self._read, self._between = None, "", True
        self._calls += 1
        return bool(self._buffer)
