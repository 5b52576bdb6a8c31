"""Scores and ranks texts and images: by their vectors, or by a reranker that reads them together."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.caller_fields import caller_fields
from deployments.openapi import described
from deployments.pipeline import EncodedPrompt, Pipeline
from deployments.protocol import scoring as wire
from deployments.routers.models import read_request
from deployments.routers.values import usage_body
from deployments.tasks import all_or_none
from deployments.vectors import AT_A_TIME, chat_prompt, text_prompt, total_usage
from engine.errors import InvalidRequest
from engine.inputs.media_options import with_options
from engine.inputs.messages import parse_messages
from engine.inputs.retrieval import compare, item_key, only_text, pair_score, parts_of
from engine.outputs import EmbeddingOutput, Usage
from engine.prompt import EngineInput, MediaItem, PagesItem

router = APIRouter()

#: Most numbers of the vectors that one request's items have together.
MAX_NUMBERS = 1 << 26


@router.post("/v1/score")
@router.post("/score", include_in_schema=False)
@described(wire.ScoreRequest, wire.ScoreResponse)
async def score(request: Request) -> Response:
    """Return a score for each pair: its items' similarity, or a reranker's probability of a match."""
    body, pipeline = await read_request(request, wire.ScoreRequest)
    body.check()
    name = f"score-{uuid.uuid4().hex}"
    scores, usage = await _scores(pipeline, name, body.pairs(), body)
    data = [wire.Score(index=index, score=score) for index, score in enumerate(scores)]
    response = wire.ScoreResponse(
        id=name, created=int(time.time()), model=pipeline.name, data=data, usage=usage_body(usage)
    )
    return JSONResponse(response.model_dump())


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@described(wire.RerankRequest, wire.RerankResponse)
async def rerank(request: Request) -> Response:
    """Documents in the order of their scores for the query."""
    body, pipeline = await read_request(request, wire.RerankRequest)
    body.check()
    name = f"rerank-{uuid.uuid4().hex}"
    scores, usage = await _scores(pipeline, name, body.pairs(), body)
    # Equal scores keep the documents' order.
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
    results = [
        wire.RankedDocument(
            index=index,
            document=_shown(body.documents[index]) if body.return_documents else None,
            relevance_score=scores[index],
        )
        for index in order
    ]
    response = wire.RerankResponse(id=name, model=pipeline.name, usage=usage_body(usage), results=results)
    return JSONResponse(response.model_dump(exclude_none=True))


async def _scores(
    pipeline: Pipeline, name: str, pairs: Sequence[wire.Pair], body: wire.ScoringBody
) -> tuple[list[float], Usage]:
    """The score of each pair, and what all cost."""
    if body.max_tokens_per_query or body.max_tokens_per_doc:
        pairs = await asyncio.to_thread(_cut, pipeline, pairs, body)
    if pipeline.retrieval.ranks_pairs:
        return await _judge(pipeline, name, pairs, body)
    vectors, usage = await _embed(pipeline, name, pairs, body)

    def compared() -> list[float]:
        return [compare(vectors[0, item_key(each.one)], vectors[1, item_key(each.other)]) for each in pairs]

    # Thousands of vectors per item make this long.
    return await asyncio.to_thread(compared), usage


def _cut(pipeline: Pipeline, pairs: Sequence[wire.Pair], body: wire.ScoringBody) -> list[wire.Pair]:
    """The pairs with items that are nothing but text cut to as many tokens as ``body`` allows; 0 is all."""
    tokenizer = pipeline.builder.tokenizer

    @cache
    def cut(text: str, most: int) -> str:
        ids = tokenizer.encode_plain(text)
        if len(ids) <= most:
            return text
        begin = tokenizer.decode(ids[:most])
        if not text.startswith(begin):
            # The last token may hold a part of a character.
            begin = begin.rstrip("\ufffd")
        # One character stays, though it has more tokens.
        return begin or text[:1]

    def shortened(item: wire.Item, most: int) -> wire.Item:
        text = only_text(item)
        return item if text is None or not most else cut(text, most)

    return [
        pair._replace(
            one=shortened(pair.one, body.max_tokens_per_query),
            other=shortened(pair.other, body.max_tokens_per_doc),
        )
        for pair in pairs
    ]


async def _judge(
    pipeline: Pipeline, name: str, pairs: Sequence[wire.Pair], body: wire.ScoringBody
) -> tuple[list[float], Usage]:
    """Scores by a reranker, each distinct pair once."""
    retrieval, places = pipeline.retrieval, asyncio.Semaphore(AT_A_TIME)
    keys = [(item_key(pair.one), item_key(pair.other)) for pair in pairs]
    distinct: dict[tuple[str, str], wire.Pair] = {}
    for key, pair in zip(keys, pairs, strict=True):
        distinct.setdefault(key, pair)

    async def judge(index: int, pair: wire.Pair) -> EmbeddingOutput:
        async with places:
            with caller_fields(_pair_names(pair)):
                prompt = await _pair_prompt(pipeline, pair.one, pair.other, body)
            return await pipeline.embed(f"{name}-{index}", prompt, retrieval.params())

    outputs = await all_or_none(judge(index, pair) for index, pair in enumerate(distinct.values()))
    scores = dict(zip(distinct, map(pair_score, outputs), strict=True))
    return [scores[key] for key in keys], total_usage(outputs)


def _pair_names(pair: wire.Pair) -> dict[str, str]:
    """The caller's fields by the parts of a reranker's prompt: two texts, the query, a text, the document.

    Faults of the whole prompt, such as its length, count as the document's.

    Raises:
        InvalidRequest: naming the caller's field.
    """
    fields = pair.fields
    counts = [2 + len(parts_of(pair.one, fields[0])), 1 + len(parts_of(pair.other, fields[1]))]
    parts = [field for field, count in zip(fields, counts, strict=True) for _ in range(count)]
    return {"prompt": fields[1], "messages": fields[1]} | {
        f"messages[1].content[{index}]": field for index, field in enumerate(parts)
    }


async def _pair_prompt(
    pipeline: Pipeline, query: wire.Item, document: wire.Item, body: wire.ScoringBody
) -> EncodedPrompt:
    messages, sources = parse_messages(pipeline.retrieval.pair(query, document, body.instruction))
    sources = with_options(sources, body.mm_processor_kwargs, body.media_io_kwargs)

    def build(items: list[MediaItem | PagesItem]) -> EngineInput:
        return pipeline.retrieval.pair_builder.from_messages(messages, items, cache_salt=body.cache_salt)

    return await pipeline.prepare(build, sources, salt=body.cache_salt)


async def _embed(
    pipeline: Pipeline, name: str, pairs: Sequence[wire.Pair], body: wire.ScoringBody
) -> tuple[dict[tuple[int, str], EmbeddingOutput], Usage]:
    """The vectors of all items by their side and key, and what they cost.

    Each distinct item is computed once. The instruction belongs to the first side, the queries; with one, an
    item that stands on both sides has two vectors.
    """
    places = asyncio.Semaphore(AT_A_TIME)
    keys: dict[tuple[int, str], tuple[wire.Item, str, str | None]] = {}
    for pair in pairs:
        for side, item in enumerate((pair.one, pair.other)):
            work = item, pair.fields[side], body.instruction if side == 0 else None
            keys.setdefault((side, item_key(item)), work)
    distinct = {(key, work[2]): work for (_, key), work in keys.items()}
    numbers = 0

    async def embed(index: int, item: wire.Item, field: str, instruction: str | None) -> EmbeddingOutput:
        async with places:
            parts = {f"messages[0].content[{index}]": field for index in range(len(parts_of(item, field)))}
            with caller_fields({"prompt": field, "messages": field} | parts):
                prompt = await _prepared(pipeline, item, field, instruction, body)
            output = await pipeline.embed(f"{name}-{index}", prompt, pipeline.retrieval.params())
        if output.token_embeddings is not None:
            nonlocal numbers
            numbers += output.token_embeddings.size
            if numbers > MAX_NUMBERS:
                raise InvalidRequest(
                    f"The vectors of all items have more than {MAX_NUMBERS} numbers; send fewer items.",
                    param=field,
                )
        return output

    outputs = await all_or_none(embed(index, *work) for index, work in enumerate(distinct.values()))
    made = dict(zip(distinct, outputs, strict=True))
    return {place: made[place[1], work[2]] for place, work in keys.items()}, total_usage(outputs)


async def _prepared(
    pipeline: Pipeline, item: wire.Item, field: str, instruction: str | None, body: wire.ScoringBody
) -> EncodedPrompt:
    parts, text = parts_of(item, field), only_text(item)
    if text is not None:
        return await text_prompt(pipeline, text, instruction, body.cache_salt)
    messages = [{"role": "user", "content": parts}]
    options = body.mm_processor_kwargs, body.media_io_kwargs
    return await chat_prompt(pipeline, messages, instruction, body.cache_salt, options=options)


def _shown(item: wire.Item) -> dict[str, Any]:
    return {"text": item} if isinstance(item, str) else item
