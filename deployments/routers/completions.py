"""Text completions: prompts as they stand, without a chat template."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments import sse
from deployments.answers import AnswerReader, FinishedChoice, WholeAnswer, gather, piece_of_text
from deployments.caller_fields import caller_fields
from deployments.openapi import described
from deployments.pipeline import EncodedPrompt, Pipeline
from deployments.protocol import completions as wire
from deployments.protocol.generation import check_named_tokens
from deployments.protocol.usage import usage_extras
from deployments.report import current_report
from deployments.routers.models import read_request
from deployments.routers.values import (
    TokenName,
    finite,
    is_asked,
    prompt_row,
    token_name,
    usage_body,
    whole_response,
)
from deployments.tasks import all_or_none, merged
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage, merge_updates
from engine.prompt import EngineInput, MediaItem, PagesItem
from engine.sampling_params import SamplingParams

router = APIRouter()


@dataclass(slots=True)
class _Running:
    """One prompt's completion on its way.

    Attributes:
        number: the prompt's place in the request.
        text: what the completion's text begins with: the prompt if it is to be given back.
    """

    number: int
    text: str
    token_ids: list[int]
    updates: AsyncGenerator[StreamUpdate, None]


@router.post("/v1/completions")
@described(wire.CompletionRequest, wire.Completion, wire.Completion)
async def create_completion(request: Request) -> Response:
    """Continue texts, as one JSON object or as a stream of events."""
    body, pipeline = await read_request(request, wire.CompletionRequest)
    body.check()
    names: dict[str, str] = {}
    constraint, constraint_field = body.constraint()
    if constraint is not None and constraint_field is not None:
        names = {"structured": constraint_field}
    with caller_fields(names):
        params = replace(body.sampling_params(pipeline.sampling_defaults), structured=constraint)
    check_named_tokens(params, len(body.prompts) * params.n * (params.max_tokens or 0))
    tokenizer = pipeline.builder.tokenizer
    answer = Answer(
        f"cmpl-{uuid.uuid4().hex}",
        int(time.time()),
        pipeline.name,
        body,
        params,
        lambda token: tokenizer.first_token_bytes(token).decode(errors="ignore"),
        token_name(body),
    )
    current_report().answer = answer.id
    relay = sse.EventRelay()
    if answer.text_alone and len(body.prompts) == 1:
        relay.event = answer.plain_event
    with caller_fields(names):
        prompts = await all_or_none(_prepared(pipeline, body, given, params) for given in body.prompts)
    running = []
    for number, (given, prompt) in enumerate(zip(body.prompts, prompts, strict=True)):
        updates = pipeline.generate(
            f"{answer.id}-{number}", prompt, params, priority=body.priority, names=names, relay=relay
        )
        if body.only_echo:
            updates = _without_completion(updates)
        if body.echo and body.logprobs is not None:
            updates = _prompt_first(updates, len(prompt.inputs.token_ids))
        ids, text = prompt.inputs.token_ids, ""
        if body.echo:
            text = given if isinstance(given, str) else tokenizer.decode(ids)
        running.append(_Running(number, text, ids, updates))
    if not body.stream:
        found = await all_or_none(gather(each.updates, AnswerReader(lambda: None)) for each in running)
        return await whole_response(partial(_whole, answer, running, found), params)
    streams = [each.updates for each in running]
    events = merged(streams) if len(streams) > 1 else _numbered(*streams)
    # What fails before the first token is still an error of its own, not an event in a stream.
    first = await anext(events)
    return sse.EventResponse(_events(answer, running, first, events), sse.error_event, sse.DONE, relay)


async def _prepared(
    pipeline: Pipeline, body: wire.CompletionRequest, given: str | list[int], params: SamplingParams
) -> EncodedPrompt:
    def build(_: list[MediaItem | PagesItem]) -> EngineInput:
        if not isinstance(given, str):
            return pipeline.builder.from_token_ids(given, cache_salt=body.cache_salt)
        return pipeline.builder.from_text(
            given,
            add_special_tokens=body.add_special_tokens,
            cache_salt=body.cache_salt,
            placeholders_are_text=True,
        )

    return await pipeline.prepare(build, params=params, salt=body.cache_salt)


async def _numbered(
    updates: AsyncGenerator[StreamUpdate, None],
) -> AsyncGenerator[tuple[int, StreamUpdate], None]:
    """The updates of the only prompt, as of several. No task stands between them and who reads them: updates
    that are relayed may not pass by others."""
    async with aclosing(updates) as stream:
        async for update in stream:
            yield 0, update


async def _without_completion(
    updates: AsyncGenerator[StreamUpdate, None],
) -> AsyncGenerator[StreamUpdate, None]:
    """Updates without the token that had to be made: the prompt alone is wanted."""
    async with aclosing(updates) as stream:
        async for update in stream:
            deltas = [
                OutputDelta(
                    delta.index,
                    "",
                    [],
                    None if delta.logprobs is None else [],
                    None if delta.finish_reason is None else "length",
                )
                for delta in update.deltas
            ]
            yield replace(update, deltas=deltas, usage=replace(update.usage, completion_tokens=0))


async def _prompt_first(
    updates: AsyncGenerator[StreamUpdate, None], length: int
) -> AsyncGenerator[StreamUpdate, None]:
    """Updates of which the first has the log-probabilities of all ``length`` tokens of the prompt. They may
    come in pieces, and one choice of several may begin before another has them."""
    async with aclosing(updates) as stream:
        first = await anext(stream)
        while len(first.prompt_logprobs or ()) < length and not first.finished:
            first = merge_updates(first, await anext(stream))
        yield first
        async for update in stream:
            yield update


@dataclass(frozen=True, slots=True)
class Answer:
    """Fields that all parts of one response share.

    Attributes:
        first_text: returns the text of a token that begins a prompt, or none if it is a part of a character.
        name: what log-probabilities call a token.
    """

    id: str
    created: int
    model: str
    body: wire.CompletionRequest
    params: SamplingParams
    first_text: Callable[[int], str]
    name: TokenName
    _around_texts: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)

    @property
    def text_alone(self) -> bool:
        """Events hold text, and nothing else but a reason to finish."""
        body = self.body
        return not (body.echo or body.only_echo or body.logprobs is not None or body.return_token_ids)

    @property
    def event_fields(self) -> dict[str, Any]:
        """Further fields of each event."""
        return {"usage": None} if self.body.ends_with_usage else {}

    def plain_event(self, update: StreamUpdate, number: int = 0) -> bytes | None:
        """The event of an update that holds a piece of one choice's text, empty if there is no text; None if
        it holds something else.

        Args:
            number: of the prompt.
        """
        if (delta := piece_of_text(update)) is None:
            return None
        if not delta.text:
            return b""
        index = number * self.params.n + delta.index
        if (around := self._around_texts.get(index)) is None:
            begin, end = sse.around_choices(self.completion([], **self.event_fields))
            choice = wire.CompletionChoice(index=index, text=sse.ANY_TEXT, logprobs=None, finish_reason=None)
            before, after = sse.around_text(choice)
            around = self._around_texts[index] = begin + before, after + end
        return around[0] + sse.quoted(delta.text) + around[1]

    def usage_extras(self) -> dict[str, Any]:
        """Further fields of the usage, once all choices have ended."""
        return usage_extras(current_report()) if self.body.include_timings else {}

    def completion(self, choices: list[wire.CompletionChoice], **fields) -> wire.Completion:
        return wire.Completion(
            id=self.id,
            object="text_completion",
            created=self.created,
            model=self.model,
            choices=choices,
            **fields,
        )


def _whole(answer: Answer, running: Sequence[_Running], found: Sequence[WholeAnswer]) -> dict:
    """The finished response: the choices of the first prompt, then those of the second, and so on. Its
    log-probabilities are iterators."""
    made = [
        (each, choice, whole.prompt_logprobs)
        for each, whole in zip(running, found, strict=True)
        for choice in whole.choices
    ]
    choices = [_choice(answer, each, choice) for each, choice, _ in made]
    total = sum((whole.usage for whole in found), Usage())
    usage_sent = usage_body(total, extras=answer.usage_extras())
    body = answer.completion(choices, usage=usage_sent).model_dump(exclude={"system_fingerprint"})
    for choice, (each, ended, prompt_logprobs) in zip(body["choices"], made, strict=True):
        if ended.logprobs is not None:
            before, start = _echoed(answer, each, prompt_logprobs)
            rows = zip(ended.token_ids, ended.logprobs, strict=False)
            choice["logprobs"] = dict(_logprobs(answer, [*before, *rows], start)[0])
        if answer.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = map(prompt_row, prompt_logprobs)
        for name in ("token_ids", "prompt_token_ids", "prompt_logprobs"):
            if choice[name] is None:
                del choice[name]
    return body


def _choice(answer: Answer, each: _Running, choice: FinishedChoice) -> wire.CompletionChoice:
    body = answer.body
    made = wire.CompletionChoice(
        index=each.number * answer.params.n + choice.index,
        text=each.text + choice.text,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )
    if body.return_token_ids:
        made.token_ids, made.prompt_token_ids = choice.token_ids, each.token_ids
    return made


#: A token, and the log-probabilities in its place; None for the first token of a prompt, which has none.
_Row = tuple[int, Mapping[int, TokenLogprob] | None]


def _echoed(answer: Answer, each: _Running, prompt_logprobs: list) -> tuple[list[_Row], int]:
    """The rows of a prompt that is given back, and where its first token begins in the choice's text."""
    rows: list[_Row] = list(zip(each.token_ids, prompt_logprobs, strict=False)) if answer.body.echo else []
    # Tokens that the tokenizer put before the text begin where it does.
    return rows, len(each.text) - sum(len(_added(answer, *row)) for row in rows)


def _logprobs(answer: Answer, rows: Sequence[_Row], offset: int) -> tuple[wire.CompletionLogprobs, int]:
    """Rows in the older form, and where the text behind them begins in the choice's text.

    All tokens have an entry, also one that ends the text: callers count them, from either end.

    Args:
        offset: where the first token's text begins; negative if the choice's text begins later.
    """
    made = wire.CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token, row in rows:
        own = TokenLogprob(0.0, decoded_token=_added(answer, token, None)) if row is None else row[token]
        made.text_offset.append(max(0, offset))
        made.tokens.append(answer.name(token, own))
        made.token_logprobs.append(None if row is None else finite(own.logprob))
        made.top_logprobs.append(None if row is None else _tops(answer, token, row))
        offset += len(_added(answer, token, row))
    return made, offset


def _added(answer: Answer, token: int, row: Mapping[int, TokenLogprob] | None) -> str:
    """Text that a token adds to the answer."""
    if row is None:
        return answer.first_text(token)
    own = row[token]
    return (own.decoded_token or "") if own.bytes else ""


def _tops(answer: Answer, own: int, row: Mapping[int, TokenLogprob]) -> dict[str, float]:
    """The tokens that were asked for, and the token itself where it is none of them. Of those with the same
    text the likeliest."""
    params = answer.params
    shown = [(token, value) for token, value in row.items() if token == own or is_asked(token, value, params)]
    shown.sort(key=lambda each: -each[1].logprob)
    found: dict[str, float] = {}
    for token, value in shown:
        found.setdefault(answer.name(token, value), finite(value.logprob))
    return found


async def _events(
    answer: Answer,
    running: list[_Running],
    first: tuple[int, StreamUpdate],
    updates: AsyncGenerator[tuple[int, StreamUpdate], None],
) -> AsyncGenerator[bytes, None]:
    """The response as events."""
    offsets: dict[int, int] = {}
    usages: dict[int, Usage] = {}
    echoes: dict[int, tuple[list[_Row], int]] = {}
    left = len(running)
    async with aclosing(updates) as stream:
        item: tuple[int, StreamUpdate] | None = first
        while item is not None:
            number, update = item
            usages[number] = update.usage
            left -= update.finished
            data = answer.plain_event(update, number) if answer.text_alone else None
            if data is None:
                if number not in echoes:
                    echoes[number] = _echoed(answer, running[number], update.prompt_logprobs or [])
                data = b"".join(
                    _delta_event(answer, running[number], delta, echoes[number], offsets)
                    for delta in update.deltas
                )
            if data:
                yield data if left else sse.Closing(data)
            item = await anext(stream, None)
    if answer.body.ends_with_usage:
        total = usage_body(sum(usages.values(), Usage()), extras=answer.usage_extras())
        event = answer.completion([], usage=total)
        yield sse.Closing(sse.event(event))


def _delta_event(
    answer: Answer,
    each: _Running,
    delta: OutputDelta,
    echo: tuple[list[_Row], int],
    offsets: dict[int, int],
) -> bytes:
    """The event of a delta; nothing while its tokens give no text yet, unless the client wants each token.

    Args:
        echo: see :func:`_echoed`.
        offsets: where the text of further tokens begins in each choice that has begun.
    """
    index = each.number * answer.params.n + delta.index
    text, begins = delta.text, index not in offsets
    rows: list[_Row] = []
    if begins:
        text = each.text + text
        # Of the tokens so far: text may still be held back.
        before, offsets[index] = echo
        rows += before
    choice = wire.CompletionChoice(index=index, text=text, logprobs=None, finish_reason=delta.finish_reason)
    rows += zip(delta.token_ids, delta.logprobs or (), strict=False)
    if rows or delta.logprobs is not None:
        choice.logprobs, offsets[index] = _logprobs(answer, rows, offsets[index])
    if delta.stop_reason is not None:
        choice.stop_reason = delta.stop_reason
    if answer.body.return_token_ids:
        choice.token_ids = delta.token_ids
        if begins:
            choice.prompt_token_ids = each.token_ids
    if not (text or delta.finish_reason or rows or answer.body.return_token_ids):
        return b""
    return sse.event(answer.completion([choice], **answer.event_fields))
