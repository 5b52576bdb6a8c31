"""Anthropic's Messages API: answers as content blocks."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments import sse
from deployments.answers import ChoiceDelta
from deployments.conversations import Conversation, RunningAnswer, conversation, start, tokenize
from deployments.errors import anthropic_error_body
from deployments.messages import Json, MessageBuilder
from deployments.openapi import described
from deployments.pipeline import Pipeline
from deployments.protocol import messages as wire
from deployments.routers.models import read_request
from engine.errors import SightlineError
from engine.outputs import StreamUpdate

router = APIRouter()


@router.post("/v1/messages")
@described(wire.MessagesRequest, wire.Message, wire.MessageEvent)
async def create_message(request: Request) -> Response:
    """Answer a conversation in Anthropic's form, as one JSON object or as a stream of typed events."""
    body, pipeline = await read_request(request, wire.MessagesRequest)
    builder = MessageBuilder(
        pipeline.name, body.max_tokens, shows_thoughts=body.thinking.display != "omitted"
    )
    running = await start(pipeline, builder.message["id"], _conversation(body, pipeline))
    # What fails before the first token is still an error of its own, not an event in a stream.
    first = await anext(running.updates)
    events = _events(builder, running, first)
    if body.stream:
        return sse.EventResponse(sse.named(events), _failed)
    async for _ in events:
        pass
    return JSONResponse(builder.message)


@router.post("/v1/messages/count_tokens")
@described(wire.CountTokensRequest, wire.CountedTokens)
async def count_tokens(request: Request) -> Response:
    """The tokens of a conversation's prompt, images and tools included."""
    body, pipeline = await read_request(request, wire.CountTokensRequest)
    inputs = await tokenize(pipeline, _conversation(body, pipeline))
    return JSONResponse({"input_tokens": len(inputs.token_ids)})


def _conversation(body: wire.MessagesBody, pipeline: Pipeline) -> Conversation:
    body.check()
    chat = body.chat_messages()
    return conversation(
        body,
        pipeline,
        chat.messages,
        {**body.FIELD_NAMES, **chat.fields},
        continue_final_message=chat.continues,
    )


async def _events(
    builder: MessageBuilder, running: RunningAnswer, first: StreamUpdate
) -> AsyncGenerator[Json, None]:
    async with aclosing(running.updates):
        for event in builder.begin(first.usage):
            yield event
        update: StreamUpdate | None = first
        read: ChoiceDelta | None = None
        while update is not None:
            for delta in update.deltas:
                read = running.reader.read(delta)
                for event in builder.add(read):
                    yield event
            last, update = update, await anext(running.updates, None)
        thoughts, extras = running.reader.reasoning_tokens, running.usage_extras()
        for event in builder.finish(read, last.usage, thoughts, extras):
            yield event


def _failed(error: SightlineError) -> bytes:
    return sse.named_event("error", anthropic_error_body(error))
