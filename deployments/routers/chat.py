"""Chat completions."""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict, dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments import sse
from deployments.body import read_body
from deployments.errors import as_sightline
from deployments.pipeline import Pipeline, PreparedPrompt
from deployments.protocol import chat as wire
from deployments.protocol.usage import PromptTokensDetails
from deployments.protocol.usage import Usage as UsageBody
from deployments.routers.models import find_pipeline
from engine.errors import SightlineError
from engine.inputs.messages import parse_messages
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.outputs import TokenLogprob as EngineLogprob
from engine.prompt import EngineInput, MediaItem
from engine.sampling_params import SamplingParams

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, as one JSON object or as a stream of events."""
    body = await read_body(request, wire.ChatCompletionRequest, request.app.state.config.max_body_bytes)
    pipeline = find_pipeline(request, body.model)
    params = body.sampling_params(pipeline.sampling_defaults)
    prompt = await _prepare(pipeline, body, params)
    answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), pipeline.name)
    updates = pipeline.generate(answer.id, prompt, params, priority=body.priority)
    if not body.stream:
        return JSONResponse(await _whole(answer, updates, params))
    # What fails before the first token is still an error of its own, not an event in a stream.
    first = await anext(updates)
    options = body.stream_options or wire.StreamOptions()
    return StreamingResponse(
        _events(answer, first, updates, params, options), media_type=sse.MEDIA_TYPE, headers=sse.HEADERS
    )


async def _prepare(
    pipeline: Pipeline, body: wire.ChatCompletionRequest, params: SamplingParams
) -> PreparedPrompt:
    messages, sources = parse_messages(body.messages)

    def build(items: list[MediaItem]) -> EngineInput:
        return pipeline.builder.from_messages(
            messages,
            items,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            template_kwargs=body.chat_template_kwargs,
            cache_salt=body.cache_salt,
        )

    return await pipeline.prepare(build, sources, min_tokens=params.max_tokens or 1, salt=body.cache_salt)


@dataclass(slots=True)
class Answer:
    """What all parts of one response have in common."""

    id: str
    created: int
    model: str
    _around_text: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    def text_event(self, index: int, text: str) -> bytes:
        """What nearly all events are: the next piece of text and nothing else. All but the text is made once,
        by way of :meth:`chunk`, which takes several times as long.
        """
        if index not in self._around_text:
            event = sse.event(self.chunk([_choice(OutputDelta(index, "text", []), 0)]))
            # No string comes after it.
            before, _, after = event.rpartition(b'"text"')
            self._around_text[index] = before, after
        before, after = self._around_text[index]
        return before + sse.compact(text) + after

    def chunk(self, choices: list[wire.ChunkChoice], usage: Usage | None = None) -> wire.ChatCompletionChunk:
        fields = {} if usage is None else {"usage": _usage(usage)}
        return wire.ChatCompletionChunk(
            id=self.id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **fields,
        )


@dataclass(slots=True)
class _Gathered:
    text: list[str] = field(default_factory=list)
    logprobs: list[wire.TokenLogprob] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


async def _whole(answer: Answer, updates: AsyncIterator[StreamUpdate], params: SamplingParams) -> dict:
    """The finished response."""
    choices: dict[int, _Gathered] = {}
    usage, prompt_logprobs = Usage(), []
    async with aclosing(updates) as stream:  # type: ignore[type-var]
        async for update in stream:
            usage = update.usage
            prompt_logprobs += update.prompt_logprobs or []
            for delta in update.deltas:
                choice = choices.setdefault(delta.index, _Gathered())
                choice.text.append(delta.text)
                if delta.logprobs is not None:
                    choice.logprobs = [*(choice.logprobs or ()), *_logprobs(delta, params.logprobs or 0)]
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
    return wire.ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[
            wire.Choice(
                index=index,
                message=wire.ChatMessage(content="".join(found.text)),
                logprobs=None if found.logprobs is None else wire.Logprobs(content=found.logprobs),
                finish_reason=found.finish_reason,
                stop_reason=found.stop_reason,
            )
            for index, found in sorted(choices.items())
        ],
        usage=_usage(usage),
        prompt_logprobs=[_prompt_logprobs(row) for row in prompt_logprobs],
    ).model_dump(exclude={"prompt_logprobs"} if params.prompt_logprobs is None else None)


async def _events(
    answer: Answer,
    first: StreamUpdate,
    updates: AsyncIterator[StreamUpdate],
    params: SamplingParams,
    options: wire.StreamOptions,
) -> AsyncIterator[bytes]:
    """The response as events; ends in ``[DONE]``, after an error as well."""
    async with aclosing(updates) as stream:  # type: ignore[type-var]
        try:
            roles = [
                wire.ChunkChoice(index=i, delta=wire.Delta(role="assistant", content=""))
                for i in range(params.n)
            ]
            yield sse.event(answer.chunk(roles))
            update: StreamUpdate | None = first
            while update is not None:
                usage = update.usage if options.continuous_usage_stats else None
                for delta in update.deltas:
                    if event := _event(answer, delta, usage, params.logprobs or 0):
                        yield event
                last, update = update, await anext(stream, None)
            if options.include_usage:
                yield sse.event(answer.chunk([], last.usage))
        except SightlineError as error:
            yield sse.error_event(error)
        except Exception as error:
            yield sse.error_event(as_sightline(error))
        yield sse.DONE


def _event(answer: Answer, delta: OutputDelta, usage: Usage | None, tops: int) -> bytes | None:
    """None where there is nothing to be told: tokens whose text isn't final yet wait for the next one, unless
    somebody wants to see each."""
    if not (delta.text or delta.finish_reason or delta.logprobs):
        return None
    if usage is None and delta.logprobs is None and delta.finish_reason is None:
        return answer.text_event(delta.index, delta.text)
    return sse.event(answer.chunk([_choice(delta, tops)], usage))


def _choice(delta: OutputDelta, tops: int) -> wire.ChunkChoice:
    return wire.ChunkChoice(
        index=delta.index,
        delta=wire.Delta(content=delta.text) if delta.text else wire.Delta(),
        logprobs=None if delta.logprobs is None else wire.Logprobs(content=_logprobs(delta, tops)),
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
    )


def _logprobs(delta: OutputDelta, count: int) -> list[wire.TokenLogprob]:
    """Each token with the ``count`` likeliest in its place."""
    found = []
    for token, row in zip(delta.token_ids, delta.logprobs or (), strict=True):
        tops = [_top(value) for value in row.values() if value.rank is not None and value.rank <= count]
        tops.sort(key=lambda top: -top.logprob)
        found.append(wire.TokenLogprob(**_top(row[token]).model_dump(), top_logprobs=tops))
    return found


def _prompt_logprobs(row: dict[int, EngineLogprob] | None) -> dict[int, dict] | None:
    """One place of the prompt; None for its first token, which nothing precedes."""
    if row is None:
        return None
    return {token: asdict(value) | {"logprob": _finite(value.logprob)} for token, value in row.items()}


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that can't be is as good as one that is very unlikely."""
    return max(logprob, -9999.0)


def _top(value: EngineLogprob) -> wire.TopLogprob:
    text = value.decoded_token or ""
    return wire.TopLogprob(token=text, logprob=_finite(value.logprob), bytes=list(text.encode()))


def _usage(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )
