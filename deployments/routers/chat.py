"""Chat completions."""

import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments import sse
from deployments.answers import Call, ChoiceDelta, FinishedChoice, WholeAnswer, piece_of_text
from deployments.conversations import Conversation, RunningAnswer, conversation, start
from deployments.openapi import described
from deployments.pipeline import Pipeline
from deployments.protocol import chat as wire
from deployments.resumption import Resumption, resumption
from deployments.routers.models import read_request
from deployments.routers.values import (
    content_logprobs,
    content_rows,
    prompt_row,
    token_name,
    usage_body,
    whole_response,
)
from engine.outputs import StreamUpdate
from engine.parsers.events import CallArguments, CallStart, Event, Reasoning, Text

router = APIRouter()


@router.post("/v1/chat/completions")
@described(wire.ChatCompletionRequest, wire.ChatCompletion, wire.ChatCompletionChunk)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as one JSON object or as a stream of events."""
    body, pipeline = await read_request(request, wire.ChatCompletionRequest)
    answer = Answer(f"chatcmpl-{request.app.state.new_id()}", int(time.time()), pipeline.name, body)
    given = _conversation(body, pipeline)
    name = answer.id
    if body.stream_options is not None and body.stream_options.event_ids:
        last = request.headers.get("last-event-id")
        answer.resumption, params = resumption(body, last, answer.id, answer.created, given.params)
        given = replace(given, params=params)
        # The engine may still work for the stream that broke off, so its name is not used again.
        answer.id, answer.created = answer.resumption.answer, answer.resumption.created
    running = await start(pipeline, name, given)
    if not body.stream:
        found = await running.whole()
        return await whole_response(partial(_whole, answer, found, running), running.params)
    # What fails before the first token is still an error of its own, not an event in a stream.
    first = await anext(running.updates)
    return sse.EventResponse(_events(answer, first, running), sse.error_event, sse.DONE, running.relay)


def _conversation(body: wire.ChatCompletionRequest, pipeline: Pipeline) -> Conversation:
    """The conversation that a body asks to answer.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    body.check()
    return conversation(
        body,
        pipeline,
        body.messages,
        body.field_names(),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continues,
    )


@dataclass(slots=True)
class Answer:
    """Fields that all parts of one response share."""

    id: str
    created: int
    model: str
    body: wire.ChatCompletionRequest
    resumption: Resumption | None = None
    _around: tuple[bytes, bytes] | None = None
    _around_texts: dict[tuple[int, str | None], tuple[bytes, bytes]] = field(default_factory=dict)
    _call_ids: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def counts_in_each(self) -> bool:
        """Every event holds the usage so far."""
        options = self.body.stream_options
        return options is not None and options.continuous_usage_stats

    @property
    def calls_functions(self) -> bool:
        """True if the request has ``functions``, the older form of tools."""
        return self.body.in_older_form

    def call_id(self, choice: int, index: int) -> str:
        """The id of a choice's call."""
        if (choice, index) not in self._call_ids:
            # The same each time that the answer is made.
            digest = hashlib.sha256(f"{self.id} {choice} {index}".encode()).hexdigest()
            self._call_ids[choice, index] = f"call_{digest[:24]}"
        return self._call_ids[choice, index]

    def prompt_fields(self, running: RunningAnswer) -> dict[str, Any]:
        """What the request wants to be told of its prompt."""
        fields: dict[str, Any] = {}
        if self.body.return_token_ids:
            fields["prompt_token_ids"] = running.prompt_token_ids
        if self.body.return_prompt_text:
            fields["prompt_text"] = running.prompt_text
        return fields

    def finish_reason(self, reason: str | None) -> str | None:
        return "function_call" if reason == "tool_calls" and self.calls_functions else reason

    def line(self) -> bytes:
        """The line with an event's id; nothing if events have none."""
        return b"" if self.resumption is None else self.resumption.line()

    def text_event(self, index: int, text: str, finish_reason: str | None = None) -> bytes:
        """The event of a piece of text, which nearly all events are."""
        if (around := self._around_texts.get((index, finish_reason))) is None:
            begin, end = self._around_choices()
            before, after = _around_text(index, finish_reason)
            around = self._around_texts[index, finish_reason] = begin + before, after + end
        return around[0] + sse.quoted(text) + around[1]

    def plain_event(self, update: StreamUpdate) -> bytes | None:
        """The event of an update that holds a piece of one choice's text, empty if there is no text; None if
        it holds something else."""
        if (delta := piece_of_text(update)) is None:
            return None
        return self.text_event(delta.index, delta.text) if delta.text else b""

    def event(self, choices: bytes) -> bytes:
        """The event of some choices in JSON."""
        before, after = self._around_choices()
        return before + choices + after

    def _around_choices(self) -> tuple[bytes, bytes]:
        if self._around is None:
            self._around = sse.around_choices(self.chunk([]))
        return self._around

    def chunk(self, choices: list[wire.ChunkChoice], **fields: Any) -> wire.ChatCompletionChunk:
        if self.body.service_tier is not None:
            fields["service_tier"] = self.body.service_tier
        if self.body.ends_with_usage:
            # OpenAI: null in all events but the last.
            fields.setdefault("usage", None)
        return wire.ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **fields,
        )


@lru_cache(1024)
def _around_text(index: int, finish_reason: str | None) -> tuple[bytes, bytes]:
    """The JSON of a choice before and after its text; a choice that ends has no stop string."""
    choice = wire.ChunkChoice(
        index=index, delta=wire.Delta(content=sse.ANY_TEXT), finish_reason=finish_reason
    )
    if finish_reason is not None:
        choice.logprobs = choice.stop_reason = None
    return sse.around_text(choice)


@lru_cache(1024)
def _beginning(count: int) -> bytes:
    """The choices of the first event, in JSON."""
    choices = [
        wire.ChunkChoice(
            index=index, delta=wire.Delta(role="assistant", content=""), logprobs=None, finish_reason=None
        )
        for index in range(count)
    ]
    return b",".join(choice.model_dump_json(exclude_unset=True).encode() for choice in choices)


def _whole(answer: Answer, found: WholeAnswer, running: RunningAnswer) -> dict:
    """The finished response; its log-probabilities are iterators."""
    completion = wire.ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[_choice(answer, choice) for choice in found.choices],
        usage=usage_body(found.usage, found.reasoning_tokens, running.usage_extras()),
        service_tier=answer.body.service_tier,
        **answer.prompt_fields(running),
    )
    absent = {"prompt_logprobs"} if running.params.prompt_logprobs is None else set()
    absent |= {
        name
        for name in ("service_tier", "prompt_token_ids", "prompt_text")
        if getattr(completion, name) is None
    }
    response = completion.model_dump(exclude=absent)
    if running.params.prompt_logprobs is not None:
        response["prompt_logprobs"] = map(prompt_row, found.prompt_logprobs)
    namer = token_name(answer.body)
    for choice, made in zip(response["choices"], found.choices, strict=True):
        if made.logprobs is not None:
            content = content_rows(made.token_ids, made.logprobs, running.params, name=namer)
            choice["logprobs"] = {"content": content, "refusal": None}
        # Fields of thoughts, calls and ids that aren't there are left out.
        message = choice["message"]
        for name in ("reasoning_content", "reasoning", "tool_calls", "function_call"):
            if message[name] is None:
                del message[name]
        if choice["token_ids"] is None:
            del choice["token_ids"]
    return response


def _choice(answer: Answer, found: FinishedChoice) -> wire.Choice:
    message = wire.ChatMessage(content=found.text)
    if found.reasoning:
        message.reasoning_content = message.reasoning = found.reasoning
    if found.calls:
        message.content = found.text or None
        if answer.calls_functions:
            message.function_call = _called(found.calls[0])
        else:
            message.tool_calls = [
                _tool_call(answer.call_id(found.index, index), call) for index, call in enumerate(found.calls)
            ]
    return wire.Choice(
        index=found.index,
        message=message,
        finish_reason=answer.finish_reason(found.finish_reason),
        stop_reason=found.stop_reason,
        token_ids=found.token_ids if answer.body.return_token_ids else None,
    )


def _called(call: Call) -> wire.FunctionCall:
    return wire.FunctionCall(name=call.name, arguments=call.arguments)


def _tool_call(name: str, call: Call) -> wire.ToolCall | wire.CustomToolCall:
    if call.is_free:
        return wire.CustomToolCall(id=name, custom=wire.CustomCall(name=call.name, input=call.arguments))
    return wire.ToolCall(id=name, function=_called(call))


async def _events(answer: Answer, first: StreamUpdate, running: RunningAnswer) -> AsyncGenerator[bytes, None]:
    """The response as events; those that are there at the same time come together. Nearly all updates hold a
    piece of text and nothing else: those take the short way."""
    text_alone = not (
        running.reader.parses
        or answer.counts_in_each
        or answer.body.return_token_ids
        or answer.resumption is not None
    )
    if text_alone:
        running.relay.event = answer.plain_event
    async with aclosing(running.updates) as stream:
        resumed = answer.resumption is not None and answer.resumption.resumed
        data = b"" if resumed else answer.line() + _first_event(answer, running)
        data += _update_events(answer, running, first)
        last = first
        if data:
            yield sse.Closing(data) if last.finished else data
        async for last in stream:
            if not text_alone or (plain := answer.plain_event(last)) is None:
                plain = _update_events(answer, running, last)
            if plain:
                yield sse.Closing(plain) if last.finished else plain
        if answer.body.ends_with_usage:
            usage = usage_body(last.usage, running.reader.reasoning_tokens, running.usage_extras())
            yield sse.Closing(sse.event(answer.chunk([], usage=usage)))


def _first_event(answer: Answer, running: RunningAnswer) -> bytes:
    choices, fields = _beginning(running.params.n), answer.prompt_fields(running)
    if not fields:
        return answer.event(choices)
    before, after = sse.around_choices(answer.chunk([], **fields))
    return before + choices + after


def _update_events(answer: Answer, running: RunningAnswer, update: StreamUpdate) -> bytes:
    read = map(running.reader.read, update.deltas)
    if answer.resumption is None:
        return b"".join(event for delta in read for event in _delta_events(answer, running, delta, update))
    parts = (part for delta in read for part in answer.resumption.unseen(delta))
    return b"".join(
        answer.line() + event for part in parts for event in _delta_events(answer, running, part, update)
    )


def _delta_events(
    answer: Answer, running: RunningAnswer, delta: ChoiceDelta, update: StreamUpdate
) -> list[bytes]:
    """Events of a delta; none while its tokens give no text yet, unless the client wants each token."""
    ids = answer.body.return_token_ids and delta.token_ids
    bare = not (answer.counts_in_each or ids or delta.logprobs)
    plain = bare and not delta.finish_reason
    if bare and len(delta.events) == 1 and isinstance(text := delta.events[0], Text):
        if plain:
            return [answer.text_event(delta.index, text.text)]
        if delta.logprobs is None and delta.stop_reason is None:
            reason = answer.finish_reason(delta.finish_reason)
            return [answer.text_event(delta.index, text.text, reason)]
    deltas = [_wire_delta(answer, delta.index, event) for event in delta.events]
    if not deltas:
        if plain or not (ids or delta.logprobs or delta.finish_reason):
            return []
        deltas = [wire.Delta()]
    choices = [
        wire.ChunkChoice(index=delta.index, delta=part, logprobs=None, finish_reason=None) for part in deltas
    ]
    if delta.logprobs is not None:
        name = token_name(answer.body)
        content = content_logprobs(delta.token_ids, delta.logprobs, running.params, name=name)
        choices[0].logprobs = wire.Logprobs(content=content)
    if ids:
        choices[0].token_ids = delta.token_ids
    if delta.finish_reason is not None:
        choices[-1].finish_reason = answer.finish_reason(delta.finish_reason)
        choices[-1].stop_reason = delta.stop_reason
    fields = {}
    if answer.counts_in_each:
        fields["usage"] = usage_body(update.usage, running.reader.reasoning_tokens)
    return [sse.event(answer.chunk([choice], **fields)) for choice in choices]


def _wire_delta(answer: Answer, choice: int, event: Event) -> wire.Delta:
    if isinstance(event, Text):
        return wire.Delta(content=event.text)
    if isinstance(event, Reasoning):
        return wire.Delta(reasoning_content=event.text, reasoning=event.text)
    if answer.calls_functions:
        return wire.Delta(function_call=_function(event))
    return wire.Delta(tool_calls=[_call_delta(answer, choice, event)])


def _call_delta(answer: Answer, choice: int, event: CallStart | CallArguments) -> wire.ToolCallDelta:
    if isinstance(event, CallStart):
        name = answer.call_id(choice, event.index)
        if event.is_free:
            called = wire.CustomCallDelta(name=event.name, input="")
            return wire.ToolCallDelta(index=event.index, id=name, type="custom", custom=called)
        return wire.ToolCallDelta(index=event.index, id=name, type="function", function=_function(event))
    if event.is_free:
        return wire.ToolCallDelta(index=event.index, custom=wire.CustomCallDelta(input=event.text))
    return wire.ToolCallDelta(index=event.index, function=_function(event))


def _function(event: CallStart | CallArguments) -> wire.FunctionCall:
    if isinstance(event, CallStart):
        return wire.FunctionCall(name=event.name, arguments="")
    return wire.FunctionCall(arguments=event.text)
