"""The Responses API: answers as items, kept for a while, continued by their id."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments import sse
from deployments.access import caller_name, hold_open
from deployments.admission import PLACE, asks_for_events
from deployments.conversations import Conversation, RunningAnswer, conversation, start, tokenize
from deployments.errors import NotFound, as_sightline
from deployments.openapi import described
from deployments.pipeline import Pipeline
from deployments.protocol import responses as wire
from deployments.response_store import Asked, Json, ResponseStore, StoredResponse
from deployments.responses import ResponseBuilder
from deployments.resumption import seeded
from deployments.routers.models import find_pipeline, read_request
from deployments.routers.response_runs import ENDS, EventLog, events_again, events_of, to_the_end
from engine.errors import InvalidRequest, SightlineError, Unavailable

router = APIRouter()


@router.post("/v1/responses")
@described(wire.ResponsesRequest, wire.Response, wire.ResponseEvent)
async def create_response(request: Request) -> Response:
    """Answer an input, as one JSON object, as a stream of typed events, or in the background."""
    body, pipeline = await read_request(request, wire.ResponsesRequest)
    body.check()
    if body.background and not request.app.state.config.stored_responses:
        raise InvalidRequest(
            "This server keeps no responses (stored_responses is 0), so it makes none in the background.",
            param="background",
        )
    store: ResponseStore = request.app.state.responses
    earlier = await _earlier(request, body.previous_response_id)
    given, fields = wire.input_messages(body.input, len(earlier) + bool(body.instructions))
    stored = StoredResponse(_response(body, pipeline), _items(body.input), [*earlier, *given], caller_name())
    given_conversation = _conversation(body, pipeline, stored.messages, fields)
    builder = ResponseBuilder(stored.response)
    if body.background:
        if body.stream:
            params = seeded(given_conversation.params)
            given_conversation = replace(given_conversation, params=params)
            stored.asked = Asked(body, len(earlier), params.seed)
        running = await start(pipeline, stored.id, given_conversation)
        await store.put(stored)
        begun = dict(stored.response)
        log = _run(request, builder, running, stored)
        return JSONResponse(begun) if log is None else _log_response(log)
    running = await start(pipeline, stored.id, given_conversation)
    if not body.stream:
        async for _ in events_of(builder, running, stored):
            pass
        if body.store:
            await store.put(stored)
        return JSONResponse(stored.response)
    # What fails before the first token is still an error of its own, not an event in a stream.
    first = await anext(running.updates)

    def failed(error: SightlineError) -> bytes:
        event = builder.fail(error)
        return sse.named_event(event["type"], event)

    events = events_of(builder, running, stored, first)
    if body.store:
        events = _stored_events(events, request, stored, builder)
    return sse.EventResponse(sse.named(events), failed)


@router.post("/v1/responses/input_tokens")
@described(wire.InputTokensRequest, wire.InputTokens)
async def count_input_tokens(request: Request) -> Response:
    """The tokens of the prompt that a response would have, images, tools and earlier responses included."""
    body, pipeline = await read_request(request, wire.InputTokensRequest)
    body.check()
    earlier = await _earlier(request, body.previous_response_id)
    given, fields = wire.input_messages(body.input, len(earlier) + bool(body.instructions))
    inputs = await tokenize(pipeline, _conversation(body, pipeline, [*earlier, *given], fields))
    return JSONResponse({"object": "response.input_tokens", "input_tokens": len(inputs.token_ids)})


def _run(
    request: Request, builder: ResponseBuilder, running: RunningAnswer, stored: StoredResponse
) -> EventLog | None:
    """Make a response in the background; its events if it is streamed."""
    store: ResponseStore = request.app.state.responses
    logs: dict[str, EventLog] = request.app.state.logs
    log = None
    if stored.asked is not None:
        log = logs[stored.id] = EventLog()
    work = _keep(request, to_the_end(builder, running, stored, store, log))
    work.add_done_callback(lambda _: logs.pop(stored.id, None))
    hold_open(work)
    request.scope[PLACE].hold(work)
    _keep(request, store.unless_stopped(stored.id, work))
    return log


def _log_response(log: EventLog, after: int = -1) -> Response:
    return sse.EventResponse(sse.named(log.after(after)), sse.error_event)


def _keep(request: Request, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run ``work`` to its end: the event loop itself holds no task."""
    tasks: set[asyncio.Task[None]] = request.app.state.background
    task = asyncio.ensure_future(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


async def _stored_events(
    events: AsyncGenerator[Json, None], request: Request, stored: StoredResponse, builder: ResponseBuilder
) -> AsyncGenerator[Json, None]:
    """Passes the events on. The response is stored before the first event, which carries its id, and its
    final state before the last: the client may go on from there at once, by way of another replica."""
    store: ResponseStore = request.app.state.responses
    saved = False
    try:
        async with aclosing(events):
            async for event in events:
                if event["type"] == "response.created":
                    await store.put(stored)
                elif event["type"] in ENDS:
                    await store.update(stored)
                    saved = True
                yield event
    except Exception as error:
        builder.mark_failed(as_sightline(error))
        raise
    finally:
        if not saved:
            if stored.response["status"] == "in_progress":
                # The client has left.
                stored.response["status"] = "cancelled"
            # Nothing can be waited for here, where the task may be cancelled.
            _keep(request, store.update(stored))


@router.get("/v1/responses/{name}")
@described(answer=wire.Response, event=wire.ResponseEvent)
async def retrieve_response(request: Request, name: str) -> Response:
    """A response that was kept. With ``stream=true`` its events, after the number ``starting_after``."""
    stored = await _stored(request, name, "response_id")
    if not asks_for_events(request.query_params):
        if stored.is_lost:
            _mark_lost(stored)
        return JSONResponse(stored.response)
    given = request.query_params.get("starting_after", "-1")
    if not re.fullmatch(r"-1|\d{1,9}", given):
        raise InvalidRequest("starting_after must be the number of an event.", param="starting_after")
    log, after = request.app.state.logs.get(name), int(given)
    if after >= 0 and stored.asked is None:
        raise InvalidRequest(
            "Only events of a response that was created with background and stream keep their numbers. Read "
            "this one without starting_after.",
            param="starting_after",
        )
    if log is None and stored.response["status"] == "in_progress":
        log = await _make_again(request, stored)
    elif log is None:
        log = EventLog()
        events = list(events_again(stored.response))
        for event in events:
            log.add(event)
        log.close()
        if stored.response["status"] == "failed":
            # The client may have events of an item that was not finished.
            after = min(after, len(events) - 2)
    return _log_response(log, after)


async def _make_again(request: Request, stored: StoredResponse) -> EventLog:
    """The events of a response that another ingress has begun, which may be lost."""
    asked = stored.asked
    if asked is None:
        raise InvalidRequest(
            "Only a response that was created with background and stream can be streamed while it is made.",
            param="stream",
        )
    pipeline = find_pipeline(request, asked.body.model)
    _, fields = wire.input_messages(asked.body.input, asked.earlier + bool(asked.body.instructions))
    given = _conversation(asked.body, pipeline, stored.messages, fields)
    given = replace(given, params=replace(given.params, seed=asked.seed))
    # The engine may still work on it under its own name.
    running = await start(pipeline, f"resp_{uuid.uuid4().hex}", given)
    if (log := request.app.state.logs.get(stored.id)) is not None:
        # Another client has asked for the same meanwhile.
        await running.updates.aclose()
        return log
    log = _run(request, ResponseBuilder(stored.response), running, stored)
    assert log is not None
    return log


@router.delete("/v1/responses/{name}")
@described(answer=wire.DeletedResponse)
async def delete_response(request: Request, name: str) -> Response:
    """Forget a response; one that still runs is cancelled."""
    await _stored(request, name, "response_id")
    await request.app.state.responses.delete(name, caller_name())
    return JSONResponse({"id": name, "object": "response", "deleted": True})


@router.post("/v1/responses/{name}/cancel")
@described(answer=wire.Response)
async def cancel_response(request: Request, name: str) -> Response:
    """Cancel a background response."""
    stored = await _stored(request, name, "response_id")
    if not stored.response["background"]:
        raise InvalidRequest("Only background responses can be cancelled.", param="response_id")
    if stored.response["status"] == "in_progress":
        await request.app.state.responses.cancel(name, caller_name())
        stored.response["status"] = "cancelled"
    return JSONResponse(stored.response)


@router.get("/v1/responses/{name}/input_items")
@described(answer=wire.InputItems)
async def list_input_items(request: Request, name: str) -> Response:
    """The input of a response that was kept, the last item first, or the first with ``order=asc``: 20 items,
    or ``limit``, behind the one whose id is ``after``."""
    items = (await _stored(request, name, "response_id")).input_items
    asked = request.query_params
    order, limit, after = asked.get("order", "desc"), asked.get("limit", "20"), asked.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc.", param="order")
    if not re.fullmatch(r"[1-9]\d?|100", limit):
        raise InvalidRequest("limit must be a number from 1 to 100.", param="limit")
    if order == "desc":
        items = items[::-1]
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"The input has no item {after[:100]!r}.", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return JSONResponse({"object": "list", "data": page, "has_more": len(page) < len(items), **ends})


async def _earlier(request: Request, name: str | None) -> list[Json]:
    """The conversation up to the end of an earlier response; empty if none is named."""
    if name is None:
        return []
    stored = await _stored(request, name, "previous_response_id")
    if stored.response["status"] == "in_progress" and not stored.is_lost:
        raise InvalidRequest(
            f"The response {name[:100]!r} is still made, and its end belongs to the conversation. "
            "Wait for it, or cancel it.",
            param="previous_response_id",
        )
    return stored.messages


async def _stored(request: Request, name: str, param: str) -> StoredResponse:
    store: ResponseStore = request.app.state.responses
    stored = await store.get(name, caller_name())
    if stored is None:
        raise NotFound(
            f"There is no response {name[:100]!r}. Responses are kept in memory for a limited time; send the "
            "conversation again.",
            param=param,
        )
    if stored.is_lost and stored.asked is None:
        _mark_lost(stored)
    return stored


def _mark_lost(stored: StoredResponse) -> None:
    advice = "ask again" if stored.asked is None else "read it with stream=true, which makes it again"
    lost = Unavailable(f"The part of the server that made this response was lost; {advice}.")
    ResponseBuilder(stored.response).mark_failed(lost)


def _response(body: wire.ResponsesRequest, pipeline: Pipeline) -> Json:
    """The response object before its output."""
    wanted = body.text.format
    text_format: Json = {"type": wanted.type}
    if wanted.type == "json_schema":
        text_format |= {"name": wanted.name, "schema": wanted.json_schema, "strict": wanted.strict}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": body.background,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata,
        "model": pipeline.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": body.reasoning.effort, "summary": None},
        "service_tier": body.service_tier,
        "store": body.store,
        "temperature": body.temperature,
        "text": {"format": text_format},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": body.truncation,
        "usage": None,
    }


def _items(given: str | list[Any]) -> list[Json]:
    """The input as items, each with an id of its own."""
    if isinstance(given, str):
        given = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": given}]}]
    items: dict[str, Json] = {}
    for item in given:
        name = item.get("id")
        if not isinstance(name, str) or not name or name in items:
            name = f"msg_{uuid.uuid4().hex}"
        items[name] = {"type": "message", **item, "id": name}
    return list(items.values())


def _conversation(
    body: wire.ResponsesRequest,
    pipeline: Pipeline,
    messages: list[Json],
    fields: dict[str, str],
) -> Conversation:
    names = {
        "max_tokens": "max_output_tokens",
        "prompt": "input",
        "logprobs": "top_logprobs",
        "messages": "input",
    }
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return conversation(body, pipeline, [*system, *messages], names | fields)
