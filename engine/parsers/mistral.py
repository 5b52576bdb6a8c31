"""Tool calls behind a tag: a JSON list (older Mistral, Granite, Cohere), or by name (newer Mistral)."""

from __future__ import annotations

from collections.abc import Callable

from engine.parsers.events import (
    CallArguments,
    CallStart,
    Event,
    SteppedParser,
    Text,
    first_marker,
    held_back,
)
from engine.parsers.json_call import HeldCall, JsonCall, JsonValue, MalformedCall

_ARGS = "[ARGS]"
_CALL_ID = "[CALL_ID]"


class MistralCalls(SteppedParser):
    """Parses ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` and ``[TOOL_CALLS]name[ARGS]{...}``.

    Args:
        tag: the text before the list or the name.
        new_call: makes the reader of one object of the list.
    """

    def __init__(self, tag: str = "[TOOL_CALLS]", new_call: Callable[[], JsonCall] = JsonCall) -> None:
        super().__init__()
        self._tag, self._new_call = tag, new_call
        self._state: Callable[[list[Event]], bool] = self._read_text
        self._held = HeldCall(new_call())
        self._value = JsonValue()
        self._calls = 0
        self._named = False

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._state == self._read_text:
            return [Text(rest)] if rest else []
        # A tag without a call is text.
        return [Text(self._tag + rest)] if not self._started else []

    @property
    def _started(self) -> bool:
        """True if a call was reported."""
        return self._calls > 0 or self._named or self._held.call.name is not None

    def _step(self, events: list[Event]) -> bool:
        return self._state(events)

    def _read_text(self, events: list[Event]) -> bool:
        found = first_marker(self._buffer, (self._tag,))
        if found is None:
            kept = len(self._buffer) - held_back(self._buffer, (self._tag,))
            kept = len(self._buffer[:kept].rstrip())
            if kept:
                events.append(Text(self._buffer[:kept]))
                self._buffer = self._buffer[kept:]
            return False
        visible = self._buffer[: found[0]].rstrip()
        if visible:
            events.append(Text(visible))
        self._buffer = self._buffer[found[0] + len(self._tag) :]
        self._state = self._read_tag
        return True

    def _read_tag(self, events: list[Event]) -> bool:
        """Tell the two forms apart by the first character."""
        rest = self._buffer.lstrip()
        if not rest:
            return False
        self._buffer = rest
        self._state = self._read_list if rest[0] == "[" else self._read_name
        return True

    def _read_list(self, events: list[Event]) -> bool:
        call = self._held.call
        start = 0 if call.name is not None else self._buffer.find("{")
        if start < 0:
            return False
        try:
            rest = self._held.read(self._buffer, start, self._calls, events)
        except MalformedCall:
            self._held, self._state = HeldCall(self._new_call()), self._read_rest
            if self._calls == 0:
                events.append(Text(self._tag))
                self._state = self._read_text
            return True
        if rest is None:
            return False
        self._buffer = rest
        if call.broken:
            self._state = self._read_rest
        elif call.done:
            self._calls += 1
            self._held = HeldCall(self._new_call())
        else:
            return False
        return True

    def _read_name(self, events: list[Event]) -> bool:
        end = first_marker(self._buffer, (_ARGS, "{"))
        if end is None:
            return False
        name = self._buffer[: end[0]].partition(_CALL_ID)[0].strip()
        self._buffer = self._buffer[end[0] + (len(_ARGS) if end[1] == _ARGS else 0) :].lstrip()
        self._state, self._value, self._named = self._read_space, JsonValue(), True
        events.append(CallStart(self._calls, name))
        return True

    def _read_space(self, events: list[Event]) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = self._read_arguments if self._buffer[0] == "{" else self._read_rest
        return True

    def _read_arguments(self, events: list[Event]) -> bool:
        if not self._buffer:
            return False
        end, state = self._value.feed(self._buffer, 0)
        if end:
            events.append(CallArguments(self._calls, self._buffer[:end]))
        self._buffer = self._buffer[end:]
        if state == "more":
            return False
        self._calls += 1
        self._state = self._read_again if state == "ended" else self._read_rest
        return True

    def _read_again(self, events: list[Event]) -> bool:
        """Another call begins with the tag again."""
        rest = self._buffer.lstrip()
        if self._tag.startswith(rest):
            return False
        if rest.startswith(self._tag):
            self._buffer, self._state = rest[len(self._tag) :], self._read_tag
        else:
            self._state = self._read_rest
        return True

    def _read_rest(self, events: list[Event]) -> bool:
        """Drop what follows the last call."""
        self._buffer = ""
        return False
