"""Tool calls that begin with a tag anywhere in an answer's text."""

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


class CallsInText(SteppedParser):
    """Passes text on, and finds the calls in it. A tag without a call behind it is text.

    White space beside a call is layout: it is dropped before calls, and behind them unless it separates two
    texts.

    Args:
        begin: the tag that begins a call.
    """

    def __init__(self, begin: str) -> None:
        super().__init__()
        self._begin = begin
        self._inside = self._between = self._visible = False
        self._calls = 0

    def finish(self) -> list[Event]:
        rest, self._buffer = self._buffer, ""
        if self._inside:
            part = self._cut_off(rest)
            return [CallArguments(self._calls, part)] if part else []
        return [Text(rest)] if rest and not (self._between and rest.isspace()) else []

    def _head(self, start: int) -> tuple[str, int] | None:
        """The name of the call whose tag ends at ``start`` of the buffer, and the place behind its head.

        None if there is no call; a place of -1 if more text is needed to tell.
        """
        raise NotImplementedError

    def _open(self, name: str) -> None:
        """Prepare for the arguments of a call, whose object is open."""
        raise NotImplementedError

    def _read_call(self, events: list[Event]) -> bool:
        """Read a part of a call; as :meth:`_step`."""
        raise NotImplementedError

    def _cut_off(self, rest: str) -> str:
        """JSON text of what was held back, ``rest``, in a call that was cut off. Its object stays open."""
        raise NotImplementedError

    def _step(self, events: list[Event]) -> bool:
        return self._read_call(events) if self._inside else self._read_text(events)

    def _read_text(self, events: list[Event]) -> bool:
        if self._between:
            text = self._buffer.lstrip()
            if not text:
                return False
            # White space behind a call separates two texts; it is dropped before a call, and without a text.
            if self._begin.startswith(text):
                return False
            dropped = text.startswith(self._begin) or not self._visible
            self._buffer, self._between = text if dropped else self._buffer, False
        found = first_marker(self._buffer, (self._begin,))
        if found is None:
            kept = len(self._buffer) - held_back(self._buffer, (self._begin,))
            self._pass_text(len(self._buffer[:kept].rstrip()), events)
            return False
        start = found[0] + len(self._begin)
        head = self._head(start)
        if head is None:
            self._pass_text(start, events)
            return True
        name, end = head
        if end < 0:
            return False
        rest = self._buffer[end:]
        self._pass_text(len(self._buffer[: found[0]].rstrip()), events)
        self._buffer, self._inside = rest, True
        self._open(name)
        events += [CallStart(self._calls, name), CallArguments(self._calls, "{")]
        return True

    def _pass_text(self, end: int, events: list[Event]) -> None:
        if end:
            events.append(Text(self._buffer[:end]))
            self._visible = True
            self._buffer = self._buffer[end:]

    def _end_call(self) -> None:
        self._calls += 1
        self._inside, self._between = False, True
