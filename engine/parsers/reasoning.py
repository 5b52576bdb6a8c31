"""Thoughts between tags: ``<think> ... </think>`` and its relatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.parsers.events import Event, Reasoning, SteppedParser, Text, first_marker, held_back

ThoughtState = Literal["before", "inside", "after", "none"]


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The tags around a thought.

    Attributes:
        start: opens a thought.
        end: closes it.
        label: text that the model writes behind ``start``; it is no part of the thought.
        around: the tags before and behind the visible text, which are no part of it; none if empty.
        bare: what is left of the tag before it where the prompt has begun that; of answers without a thought.
        again: opens a further thought behind a visible text; empty if there is none.
    """

    start: str
    end: str
    label: str = ""
    around: tuple[()] | tuple[str, str] = ()
    bare: str = ""
    again: str = ""

    def open_in(self, prompt: str) -> bool:
        """Return whether ``prompt`` ends within a thought that has just begun."""
        return prompt.rstrip().endswith((self.start, (self.start + self.label).rstrip()))


class ReasoningParser(SteppedParser):
    """Splits thoughts from visible text. White space beside the tags is layout and is dropped.

    A thought is opened at the answer's beginning only: a tag that the visible text mentions later is text.

    Args:
        tags: the family's.
        begins_inside: the prompt has opened the thought, so the answer begins within it.
        thinks: false takes all but the tags around the visible text as visible.
    """

    def __init__(self, tags: ReasoningTags, *, begins_inside: bool = False, thinks: bool = True) -> None:
        self._tags = tags
        self._state: ThoughtState = "inside" if begins_inside else "before" if thinks else "none"
        super().__init__()
        self._trim, self._bare = thinks, tags.bare
        self._markers = (*tags.around, *filter(None, [tags.again if thinks else ""]))

    @property
    def state(self) -> ThoughtState:
        """Where the text that comes next stands. ``none``: there is no thought."""
        return self._state

    def finish(self) -> list[Event]:
        """Return what was held back. White space at the end of a thought is dropped, as at its tags."""
        rest, self._buffer = self._buffer, ""
        if self._state == "inside":
            rest = rest.strip() if self._trim else rest.rstrip()
            if self._trim and self._tags.label.startswith(rest):
                return []
            return [Reasoning(rest)] if rest else []
        return [Text(rest)] if rest else []

    def interrupt(self) -> list[Event]:
        """Return what was held back, because something else follows, such as a tool call."""
        events = self.finish()
        if self._state == "before":
            self._state = "none"
        return events

    def _step(self, events: list[Event]) -> bool:
        if self._state == "before":
            return self._read_beginning()
        if self._state == "inside":
            return self._read_thought(events)
        return self._read_visible(events)

    def _read_beginning(self) -> bool:
        stripped = self._buffer.lstrip()
        if stripped.startswith(self._tags.start):
            self._buffer = stripped[len(self._tags.start) :]
            self._state = "inside"
            return True
        if self._tags.start.startswith(stripped):
            return False
        # No thought: the answer's own white space stays.
        self._state, self._trim = "none", False
        return True

    def _read_visible(self, events: list[Event]) -> bool:
        """Pass on the visible text up to the next of the tags around it or of a thought, which is dropped."""
        if self._bare and self._state == "none":
            stripped = self._buffer.lstrip()
            if self._bare.startswith(stripped) and stripped != self._bare:
                return False
            if stripped.startswith(self._bare):
                self._buffer = stripped[len(self._bare) :]
            self._bare = ""
        position, tag = first_marker(self._buffer, self._markers) or (
            len(self._buffer) - held_back(self._buffer, self._markers),
            "",
        )
        text = self._buffer[:position].lstrip() if self._trim else self._buffer[:position]
        self._buffer = self._buffer[position + len(tag) :]
        if text:
            self._trim = False
            events.append(Text(text))
        if tag and tag == self._tags.again:
            self._state, self._trim = "inside", True
        return bool(tag)

    def _read_thought(self, events: list[Event]) -> bool:
        if self._trim:
            self._buffer = self._buffer.lstrip()
            # The template has opened the thought already, and the model repeats the tag.
            leading = tuple(filter(None, (self._tags.start, self._tags.label)))
            while found := next(filter(self._buffer.startswith, leading), None):
                self._buffer = self._buffer[len(found) :].lstrip()
            if any(text.startswith(self._buffer) for text in leading):
                return False
        position = self._buffer.find(self._tags.end)
        if position >= 0:
            thought = self._buffer[:position].rstrip()
            if thought:
                events.append(Reasoning(thought))
            self._buffer = self._buffer[position + len(self._tags.end) :]
            self._state, self._trim = "after", True
            return True
        kept = len(self._buffer) - held_back(self._buffer, (self._tags.end,))
        kept = len(self._buffer[:kept].rstrip())
        if kept:
            events.append(Reasoning(self._buffer[:kept]))
            self._buffer = self._buffer[kept:]
            self._trim = False
        return False
