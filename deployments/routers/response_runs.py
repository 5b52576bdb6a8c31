"""Runs of responses: their events, their ends, and streams that several clients may read."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from deployments.answers import ChoiceDelta
from deployments.conversations import RunningAnswer
from deployments.errors import as_sightline
from deployments.protocol import responses as wire
from deployments.response_store import Json, ResponseStore, StoredResponse
from deployments.responses import ResponseBuilder
from deployments.resumption import EvenCuts
from deployments.routers.values import content_logprobs
from deployments.text_tokens import TextTokens, TokenByToken
from deployments.tools import name_in_namespace
from engine.outputs import StreamUpdate
from engine.parsers.events import CallArguments, CallStart, Event, Reasoning, Text

#: Types of a stream's last event.
ENDS = ("response.completed", "response.incomplete")


class EventLog:
    """The events of a response that this process makes, for all clients that read them.

    An event's number is its ``sequence_number``.
    """

    def __init__(self) -> None:
        self._events: list[Json] = []
        self._more = asyncio.Event()
        self._closed = False

    def add(self, event: Json) -> None:
        """Append the next event."""
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """No event follows."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    async def after(self, number: int) -> AsyncGenerator[Json, None]:
        """The events after that one, as they come."""
        position = number + 1
        while True:
            while position < len(self._events):
                yield self._events[position]
                position += 1
            if self._closed:
                return
            await self._more.wait()


async def events_of(
    builder: ResponseBuilder,
    running: RunningAnswer,
    stored: StoredResponse,
    first: StreamUpdate | None = None,
    cuts: EvenCuts | None = None,
) -> AsyncGenerator[Json, None]:
    """All events of a response, to its end.

    Args:
        first: an update that has been read from ``running`` already.
        cuts: makes the events the same however often the response is made.
    """
    async with aclosing(running.updates):
        for event in builder.begin():
            yield event
        update = first if first is not None else await anext(running.updates, None)
        reason = None
        single, of_text = TokenByToken(), TextTokens()
        while update is not None:
            for delta in (piece for each in update.deltas for piece in single.cut(each)):
                read = running.reader.read(delta)
                tokens = of_text.add(read)
                if cuts is not None:
                    read = cuts.cut(read)
                ids, rows = [token for token, _ in tokens], [row for _, row in tokens]
                found = content_logprobs(ids, rows, running.params)
                logprobs = [entry.model_dump() for entry in found]
                for event in builder.add(read, logprobs):
                    yield event
                reason = read.finish_reason or reason
            last, update = update, await anext(running.updates, None)
        thoughts, extras = running.reader.reasoning_tokens, running.usage_extras()
        ends = list(builder.finish(reason, last.usage, thoughts, extras))
        stored.messages += wire.input_messages(builder.response["output"])[0]
        for event in ends:
            yield event


async def to_the_end(
    builder: ResponseBuilder,
    running: RunningAnswer,
    stored: StoredResponse,
    store: ResponseStore,
    log: EventLog | None = None,
) -> None:
    """Make a response in the background. What there is of it when it is stopped is kept, too.

    Args:
        log: gets the events.
    """
    cuts = EvenCuts() if log is not None else None
    ends = []
    try:
        async for event in events_of(builder, running, stored, cuts=cuts):
            if event["type"] in ENDS:
                ends.append(event)
            elif log is not None:
                log.add(event)
    except asyncio.CancelledError:
        builder.response["status"] = "cancelled"
    except Exception as error:
        ends = [builder.fail(as_sightline(error))]
    try:
        # Before the last event is sent: the client may go on from there at once, by way of another replica.
        await store.update(stored)
        if log is not None:
            for event in ends:
                log.add(event)
    finally:
        # It may be cancelled here as well, and its readers wait.
        if log is not None:
            log.close()


def events_again(response: Json) -> Iterator[Json]:
    """All events of a response that has ended, as :func:`to_the_end` has given them."""
    begun: Json = {
        "status": "in_progress",
        "output": [],
        "usage": None,
        "error": None,
        "incomplete_details": None,
    }
    builder = ResponseBuilder({**response, **begun})
    yield from builder.begin()
    cuts = EvenCuts()
    for item in response["output"]:
        yield from builder.add(cuts.cut(ChoiceDelta(0, _events_of_item(item), [], finish_reason="stop")))
    yield from builder.end_as(response)


def _events_of_item(item: Json) -> list[Event]:
    if item["type"] in ("function_call", "custom_tool_call"):
        # All calls look alike: the builder only wants to know where one begins.
        is_free = item["type"] == "custom_tool_call"
        text = item["input" if is_free else "arguments"]
        arguments = [CallArguments(0, text, is_free)] if text else []
        return [CallStart(0, name_in_namespace(item.get("namespace"), item["name"]), is_free), *arguments]
    (part,) = item["content"]
    return [(Text if item["type"] == "message" else Reasoning)(part["text"])]
