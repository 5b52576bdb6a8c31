"""An answer's text, thoughts and tool calls, choice by choice, for every endpoint."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from deployments.thought_tokens import Spelling, ThoughtTokens
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage
from engine.parsers.answer import AnswerParser
from engine.parsers.events import CallArguments, CallStart, Event, Reasoning, Text


@dataclass(slots=True)
class ChoiceDelta:
    """New text, tokens and calls of one choice since its last delta.

    Attributes:
        index: of the choice.
        events: the new text, thoughts and pieces of calls, in order.
        token_ids: all tokens since the last delta.
        logprobs: per token, as :class:`engine.outputs.OutputDelta` has them.
        finish_reason: set on the choice's last delta; ``tool_calls`` where the answer holds a call and the
            model ended it. One that a stop string or token has cut within a call keeps ``stop``: a client
            must not run that call.
        stop_reason: the stop string or token id that ended the answer.
        num_thought: how many of the tokens, the first ones, belong to a thought and its tags.
    """

    index: int
    events: list[Event]
    token_ids: list[int]
    logprobs: list[dict[int, TokenLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_thought: int = 0


class AnswerReader:
    """Parses the engine's deltas of one request.

    Args:
        make_parser: makes the parser of one choice; returns None where the text is all there is.
        spelling: of the tokens; None leaves those of thoughts uncounted.
        shows_thoughts: False leaves thoughts out of what :meth:`read` gives.

    Attributes:
        parses: there is more than text; else :meth:`read` need not be called.
    """

    def __init__(
        self,
        make_parser: Callable[[], AnswerParser | None],
        spelling: Spelling | None = None,
        *,
        shows_thoughts: bool = True,
    ) -> None:
        self._make_parser, self._shows_thoughts = make_parser, shows_thoughts
        self._spelling = spelling
        self._parsers: dict[int, AnswerParser | None] = {}
        self.parses = make_parser() is not None
        # The JSON text of the last call of each choice that has called, in pieces; None if the call is free.
        self._last_call: dict[int, list[str] | None] = {}
        self._thoughts: dict[int, ThoughtTokens] = {}

    @property
    def reasoning_tokens(self) -> int:
        """Tokens that belong to thoughts so far, over all choices; see :class:`ThoughtTokens`."""
        return sum(each.count for each in self._thoughts.values())

    def read(self, delta: OutputDelta) -> ChoiceDelta:
        """Parse the next delta of a choice."""
        if delta.index not in self._parsers:
            self._parsers[delta.index] = self._make_parser()
            if self._spelling is not None:
                self._thoughts[delta.index] = ThoughtTokens(self._make_parser, self._spelling)
        parser = self._parsers[delta.index]
        if parser is None:
            found: list[Event] = [Text(delta.text)] if delta.text else []
            return ChoiceDelta(
                delta.index, found, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason
            )
        events = parser.feed(delta.text)
        num_thought = 0
        if self._spelling is not None:
            num_thought = len(delta.token_ids) - self._thoughts[delta.index].add(delta, parser)
        if delta.finish_reason is not None:
            events += parser.finish(cut=delta.finish_reason != "stop" or delta.stop_reason is not None)
        for event in events:
            if isinstance(event, CallStart):
                self._last_call[delta.index] = None if event.is_free else []
            elif isinstance(event, CallArguments) and (pieces := self._last_call[delta.index]) is not None:
                pieces.append(event.text)
        if not self._shows_thoughts:
            events = [event for event in events if not isinstance(event, Reasoning)]
        reason: str | None = delta.finish_reason
        if reason == "stop" and delta.index in self._last_call:
            whole = delta.stop_reason is None or self._is_whole(delta.index, parser)
            reason = "tool_calls" if whole else reason
        return ChoiceDelta(
            delta.index, events, delta.token_ids, delta.logprobs, reason, delta.stop_reason, num_thought
        )

    def _is_whole(self, index: int, parser: AnswerParser) -> bool:
        """Return whether the last call of a choice has its end."""
        pieces = self._last_call[index]
        if pieces is None:
            return parser.last_text_is_whole
        try:
            return isinstance(json.loads("".join(pieces)), dict)
        except (ValueError, RecursionError):
            return False


def piece_of_text(update: StreamUpdate) -> OutputDelta | None:
    """The delta of an update that holds a piece of one choice's text and nothing else, as nearly all do; None
    for any other update. The piece may be empty."""
    if len(update.deltas) != 1 or update.finished:
        return None
    delta = update.deltas[0]
    return delta if delta.finish_reason is None and delta.logprobs is None else None


def continues(last: Event | None, event: Event) -> bool:
    """Return whether ``event`` belongs to the text, thought or call of the event before it."""
    if isinstance(event, CallArguments):
        return True
    return not isinstance(event, CallStart) and type(event) is type(last)


@dataclass(slots=True)
class Call:
    """A tool call of a finished answer; ``arguments`` is JSON text, or a text if the call is free."""

    name: str
    arguments: str = ""
    is_free: bool = False


@dataclass(slots=True)
class FinishedChoice:
    """A finished choice.

    Attributes:
        text: visible text.
        reasoning: text of thoughts.
        calls: tool calls in order.
        token_ids, logprobs, finish_reason, stop_reason: as in :class:`ChoiceDelta`.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, TokenLogprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: ChoiceDelta) -> None:
        """Append a delta."""
        for event in delta.events:
            if isinstance(event, Text):
                self.text += event.text
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
            elif isinstance(event, CallStart):
                self.calls.append(Call(event.name, is_free=event.is_free))
            elif isinstance(event, CallArguments):
                self.calls[-1].arguments += event.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class WholeAnswer:
    """A finished answer of ``n`` choices."""

    choices: list[FinishedChoice]
    usage: Usage
    reasoning_tokens: int = 0
    prompt_logprobs: list[dict[int, TokenLogprob] | None] = field(default_factory=list)


async def gather(updates: AsyncIterator[StreamUpdate], reader: AnswerReader) -> WholeAnswer:
    """Read an answer to its end."""
    choices: dict[int, FinishedChoice] = {}
    answer = WholeAnswer([], Usage())
    async with aclosing(updates) as stream:  # type: ignore[type-var]
        async for update in stream:
            answer.usage = update.usage
            answer.prompt_logprobs += update.prompt_logprobs or []
            for delta in update.deltas:
                read = reader.read(delta)
                choices.setdefault(read.index, FinishedChoice(read.index)).add(read)
    answer.choices = [choice for _, choice in sorted(choices.items())]
    answer.reasoning_tokens = reader.reasoning_tokens
    return answer
