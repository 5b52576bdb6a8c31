"""Thoughts and tool calls of one answer together."""

from __future__ import annotations

from engine.parsers.events import Event, Parser, Reasoning, Text
from engine.parsers.free_text import FreeTextCalls
from engine.parsers.reasoning import ReasoningParser, ThoughtState


class AnswerParser:
    """Runs an answer through a parser of tool calls and a parser of thoughts.

    Args:
        reasoning: splits thoughts; None if the family has none.
        calls: splits tool calls; None if the request has no tools.
        calls_in_thoughts: whether tags mark calls, so that they are found within a thought too. Calls that
            only their place at the beginning marks are looked for behind the thought.
        trigger: text with which a grammar lets nothing but calls begin; empty if there is none.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        calls: Parser | None,
        *,
        calls_in_thoughts: bool = True,
        trigger: str = "",
    ) -> None:
        self._reasoning, self._calls, self._trigger = reasoning, calls, trigger
        self._calls_first = calls_in_thoughts

    @property
    def thought(self) -> ThoughtState:
        """Whether the next text belongs before a thought, to it or behind it; ``none`` without thoughts."""
        return "none" if self._reasoning is None else self._reasoning.state

    @property
    def last_text_is_whole(self) -> bool:
        """The text of the last free call has its end."""
        return isinstance(self._calls, FreeTextCalls) and self._calls.last_is_whole

    def feed(self, text: str) -> list[Event]:
        return self._pass([Text(text)] if text else [], finish=False)

    def finish(self, *, cut: bool = False) -> list[Event]:
        """Return the events of the text that was held back.

        Args:
            cut: a limit or a stop string has ended the answer. Of a call that has no name yet nothing is
                shown then: its tags are no text.
        """
        events = self._pass([], finish=True)
        if not cut or not self._trigger:
            return events
        # A thought may come in several pieces.
        pieces: list[Text | Reasoning] = []
        while events and isinstance(last := events[-1], Text | Reasoning):
            if pieces and type(last) is not type(pieces[0]):
                break
            pieces.insert(0, last)
            events = events[:-1]
        shown, trigger, _ = "".join(piece.text for piece in pieces).partition(self._trigger)
        if not trigger:
            return [*events, *pieces]
        return [*events, *([type(pieces[0])(shown.rstrip())] if shown.strip() else [])]

    def _pass(self, events: list[Event], *, finish: bool) -> list[Event]:
        if self._calls_first:
            events = _through(self._calls, events, finish)
            return self._split_thoughts(events, finish)
        return _through(self._calls, self._split_thoughts(events, finish), finish)

    def _split_thoughts(self, events: list[Event], finish: bool) -> list[Event]:
        if self._reasoning is None:
            return events
        split: list[Event] = []
        for event in events:
            if isinstance(event, Text):
                split += self._reasoning.feed(event.text)
            else:
                split += [*self._reasoning.interrupt(), event]
        return split + (self._reasoning.finish() if finish else [])


def _through(parser: Parser | None, events: list[Event], finish: bool) -> list[Event]:
    """Replace the visible text of ``events`` with what ``parser`` makes of it."""
    if parser is None:
        return events
    parsed: list[Event] = []
    for event in events:
        parsed += parser.feed(event.text) if isinstance(event, Text) else [event]
    return parsed + (parser.finish() if finish else [])
