"""Tool calls as bare JSON objects at an answer's beginning: Llama 3."""

from __future__ import annotations

from engine.parsers.events import Event, SteppedParser, Text
from engine.parsers.json_call import HeldCall, JsonCall, MalformedCall

#: Characters between two calls.
_BETWEEN = " \t\r\n;,"


class LeadingJsonCalls(SteppedParser):
    """Parses ``[PREFIX] {"name": ..., "parameters": {...}}[; {...}]``, or a JSON list of such objects.

    An answer that begins otherwise is text, also where it holds JSON later. So is an object without a name.

    Args:
        prefix: a tag that may stand before the first call.
    """

    def __init__(self, prefix: str = "<|python_tag|>") -> None:
        self._prefix = prefix
        super().__init__()
        self._state = "start"
        self._held = HeldCall(JsonCall())
        self._calls = 0

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        # Without a call, everything that was held back is the answer.
        return (
            [Text(rest)] if rest and (self._state == "text" or self._calls == 0) and not self._named else []
        )

    @property
    def _named(self) -> bool:
        return self._held.call.name is not None

    def _step(self, events: list[Event]) -> bool:
        if self._state == "start":
            return self._read_start()
        if self._state == "text":
            if self._buffer:
                events.append(Text(self._buffer))
                self._buffer = ""
            return False
        if self._state == "between":
            self._buffer = self._buffer.lstrip(_BETWEEN)
            if not self._buffer:
                return False
            self._state = "call" if self._buffer[0] == "{" else "rest"
            return True
        if self._state == "rest":
            # What follows the last call isn't meant for the reader: a closing bracket, an end tag, noise.
            self._buffer = ""
            return False
        return self._read_call(events)

    def _read_start(self) -> bool:
        stripped = self._buffer.lstrip()
        if self._prefix.startswith(stripped):
            return False
        body = stripped.removeprefix(self._prefix).lstrip()
        opened = body[1:].lstrip() if body.startswith("[") else body
        if not opened:
            return False
        self._state = "call" if opened.startswith("{") else "text"
        return True

    def _read_call(self, events: list[Event]) -> bool:
        """Hold the text while the name isn't known; afterwards pass the arguments on."""
        call = self._held.call
        start = 0 if self._named or self._calls else self._buffer.find("{")
        try:
            rest = self._held.read(self._buffer, start, self._calls, events)
        except MalformedCall:
            self._state = "text" if self._calls == 0 else "rest"
            return True
        if rest is None:
            return False
        self._buffer = rest
        if call.broken:
            self._state = "rest"
        elif call.done:
            self._calls += 1
            self._held, self._state = HeldCall(JsonCall()), "between"
        else:
            return False
        return True
