"""Streams that are taken up again, at whichever ingress: the server keeps nothing for that.

Sampling is a function of the seed, the choice and the number of its tokens. So an answer follows from its
request and the seed, and another ingress can make it again, and leave out the part that the client has.

Of a chat, the id of each event says how the answer was begun and how much of it the client has
(:class:`Resumption`). Events of a response are numbered, so they must be cut alike each time
(:class:`EvenCuts`).
"""

import hashlib
import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from pydantic import BaseModel

from deployments.answers import ChoiceDelta, continues
from engine.errors import InvalidRequest, SightlineError
from engine.parsers.events import CallStart, Event
from engine.sampling_params import SamplingParams


class AnswerChanged(SightlineError):
    """An answer that was made again is another one: its rest doesn't continue what the client has."""

    status = 409
    code = "answer_changed"


@dataclass(slots=True)
class Had:
    """The part of one choice that the client has.

    Attributes:
        tokens: their number.
        characters: of its events, see :func:`_text`.
        checksum: of those characters.
        finished: the client knows why the choice has ended.
    """

    tokens: int = 0
    characters: int = 0
    checksum: int = 0
    finished: bool = False

    def add(self, text: str) -> None:
        self.characters += len(text)
        self.checksum = zlib.crc32(text.encode(), self.checksum)


_ANSWER = r"chatcmpl-[0-9a-f]{32}"
_ID = re.compile(rf"({_ANSWER})\.(\d{{1,12}})\.(\d{{0,20}})\.([0-9a-f]{{16}})\.([0-9.,-]{{0,9000}})")
_CHOICE = re.compile(r"(\d{1,4})-(\d{1,9})-(\d{1,9})-(\d{1,10})-([01])")


class Resumption:
    """Ids for the events of one stream. If it is taken up again, it leaves out what the client has.

    Args:
        answer, created: the answer's id, and when it was begun, in seconds of Unix time.
        seed: of the sampling; None if it is greedy.
        digest: of the request.
        had: what the client has, by choice; None if it has nothing.
    """

    def __init__(
        self,
        answer: str,
        created: int,
        seed: int | None,
        digest: str,
        had: Mapping[int, Had] | None = None,
    ) -> None:
        self.answer, self.created, self.seed = answer, created, seed
        self.resumed = had is not None
        self._head = f"{answer}.{created}.{'' if seed is None else seed}.{digest}."
        self._had = had or {}
        self._now: dict[int, Had] = {}

    def line(self) -> bytes:
        """The line of an event that says its id: the client has all that came so far."""
        has = {index: self._has(index) for index in sorted({*self._had, *self._now})}
        choices = ",".join(
            f"{index}-{of.tokens}-{of.characters}-{of.checksum}-{of.finished:d}" for index, of in has.items()
        )
        return f"id: {self._head}{choices}\n".encode()

    def _has(self, index: int) -> Had:
        """The part of a choice that the client has; it may exceed the part that is made again so far."""
        now, had = self._now.get(index), self._had.get(index)
        if now is None or had is None:
            return now or had or Had()
        longer = max(now, had, key=lambda each: each.characters)
        tokens, finished = max(now.tokens, had.tokens), now.finished or had.finished
        return replace(longer, tokens=tokens, finished=finished)

    def unseen(self, delta: ChoiceDelta) -> Iterator[ChoiceDelta]:
        """``delta`` in parts of one event each, without what the client has. Each part changes the id.

        Raises:
            AnswerChanged: the client has another beginning.
        """
        now = self._now.setdefault(delta.index, Had())
        had = self._had.get(delta.index, Had())
        for part in _single_events(delta):
            new = max(0, min(had.tokens - now.tokens, len(part.token_ids)))
            now.tokens += len(part.token_ids)
            part.token_ids = part.token_ids[new:]
            part.logprobs = None if part.logprobs is None else part.logprobs[new:]
            part.events = [event for whole in part.events for event in _unseen_event(whole, now, had)]
            if part.finish_reason is not None:
                if now.characters < had.characters:
                    raise _changed()
                now.finished = True
                if had.finished:
                    part.finish_reason = part.stop_reason = None
            yield part


def resumption(
    body: BaseModel, last_event_id: str | None, answer: str, created: int, params: SamplingParams
) -> tuple[Resumption, SamplingParams]:
    """The resumption of a stream, and parameters that make the same answer each time.

    Args:
        last_event_id: the id of the last event that the client has; None or empty if it has none.
        answer, created: as for :class:`Resumption`; used unless the stream is taken up again.

    Raises:
        InvalidRequest: ``last_event_id`` is not one of this request.
    """
    digest = hashlib.sha256(body.model_dump_json().encode()).hexdigest()[:16]
    if not last_event_id:
        params = seeded(params)
        return Resumption(answer, created, params.seed, digest), params
    found = _ID.fullmatch(last_event_id)
    choices = [_CHOICE.fullmatch(text) for text in found[5].split(",") if text] if found else []
    if found is None or None in choices or (not found[3] and not params.greedy):
        raise InvalidRequest("The header Last-Event-ID is not the id of an event of this server.")
    if found[4] != digest:
        raise InvalidRequest(
            "The header Last-Event-ID belongs to another request: send the body that began the stream."
        )
    had = {
        int(choice[1]): Had(int(choice[2]), int(choice[3]), int(choice[4]), choice[5] == "1")
        for choice in choices
        if choice is not None
    }
    seed = int(found[3]) if found[3] else params.seed
    return Resumption(found[1], int(found[2]), seed, digest, had), replace(params, seed=seed)


def seeded(params: SamplingParams) -> SamplingParams:
    """``params`` with a seed, unless they are greedy: the same answer each time."""
    if params.seed is not None or params.greedy:
        return params
    return replace(params, seed=secrets.randbits(62))


def _text(event: Event) -> str:
    """The characters that an event counts for."""
    return f"\0{event.name}" if isinstance(event, CallStart) else event.text


def _single_events(delta: ChoiceDelta) -> Iterator[ChoiceDelta]:
    """A delta in parts: the tokens come with the first event, the end with the last one."""
    events = [[event] for event in delta.events] or [[]]
    for number, one in enumerate(events):
        part = ChoiceDelta(delta.index, one, [])
        if number == 0:
            part.token_ids, part.logprobs = delta.token_ids, delta.logprobs
        if number == len(events) - 1:
            part.finish_reason, part.stop_reason = delta.finish_reason, delta.stop_reason
        yield part


def _unseen_event(event: Event, now: Had, had: Had) -> list[Event]:
    """The part of an event that the client doesn't have, if any; ``now`` moves on."""
    text = _text(event)
    left = had.characters - now.characters
    if left <= 0:
        now.add(text)
        return [event]
    now.add(text[:left])
    if now.characters == had.characters and now.checksum != had.checksum:
        raise _changed()
    rest = text[left:]
    if not rest:
        return []
    now.add(rest)
    if isinstance(event, CallStart):
        # It was sent whole or not at all.
        raise _changed()
    return [replace(event, text=rest)]


def _changed() -> AnswerChanged:
    return AnswerChanged(
        "The answer can't be carried on: made again, it begins in another way. Send the request without "
        "Last-Event-ID."
    )


#: A word with the space after it, or a part of a long word.
_PIECE = re.compile(r"\S{0,15}\s|\S{16}")


class EvenCuts:
    """Cuts the events of one choice into pieces that depend on the answer alone, not on when it came."""

    def __init__(self) -> None:
        self._waiting: Event | None = None

    def cut(self, delta: ChoiceDelta) -> ChoiceDelta:
        """``delta`` cut anew. What may still grow waits for the next delta, or the choice's end."""
        events: list[Event] = []
        for event in delta.events:
            if isinstance(event, CallStart) or not continues(self._waiting, event):
                events += self._rest()
            if isinstance(event, CallStart):
                events.append(event)
                continue
            if self._waiting is not None:
                event = replace(event, text=_text(self._waiting) + event.text)
            end = 0
            while found := _PIECE.match(event.text, end):
                events.append(replace(event, text=found[0]))
                end = found.end()
            self._waiting = replace(event, text=event.text[end:]) if end < len(event.text) else None
        if delta.finish_reason is not None:
            events += self._rest()
        return replace(delta, events=events)

    def _rest(self) -> list[Event]:
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else [waiting]
