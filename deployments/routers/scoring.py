"""Scores and ranks by the cosine of two embeddings; texts and images on either side."""

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.body import read_body
from deployments.caller_fields import caller_fields
from deployments.openapi import described
from deployments.pipeline import EncodedPrompt, Pipeline
from deployments.protocol import scoring as wire
from deployments.routers.models import find_pipeline
from deployments.routers.values import usage_body
from deployments.tasks import all_or_none
from deployments.vectors import AT_A_TIME, total_usage
from engine.errors import InvalidRequest
from engine.inputs.messages import parse_messages
from engine.outputs import EmbeddingOutput, Usage
from engine.pooling_params import PoolingParams
from engine.prompt import EngineInput, MediaItem, PagesItem

router = APIRouter()


@router.post("/v1/score")
@router.post("/score", include_in_schema=False)
@described(wire.ScoreRequest, wire.ScoreResponse)
async def score(request: Request) -> Response:
    """Return the similarity of the two items of each pair, from -1 to 1."""
    body = await read_body(request, wire.ScoreRequest, request.app.state.config.max_body_bytes)
    pipeline = find_pipeline(request, body.model)
    pairs = body.pairs()
    name = f"score-{uuid.uuid4().hex}"
    sides = (("text_1", [pair[0] for pair in pairs]), ("text_2", [pair[1] for pair in pairs]))
    vectors, usage = await _embed(pipeline, name, sides, body.cache_salt)
    data = [
        wire.Score(index=index, score=float(vectors[_key(one)] @ vectors[_key(other)]))
        for index, (one, other) in enumerate(pairs)
    ]
    response = wire.ScoreResponse(
        id=name, created=int(time.time()), model=pipeline.name, data=data, usage=usage_body(usage)
    )
    return JSONResponse(response.model_dump())


@router.post("/v1/rerank")
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@described(wire.RerankRequest, wire.RerankResponse)
async def rerank(request: Request) -> Response:
    """Documents in the order of their nearness to the query."""
    body = await read_body(request, wire.RerankRequest, request.app.state.config.max_body_bytes)
    pipeline = find_pipeline(request, body.model)
    body.check()
    name = f"rerank-{uuid.uuid4().hex}"
    sides = (("query", [body.query]), ("documents", body.documents))
    vectors, usage = await _embed(pipeline, name, sides, body.cache_salt)
    query = vectors[_key(body.query)]
    scores = [float(query @ vectors[_key(document)]) for document in body.documents]
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


async def _embed(
    pipeline: Pipeline, name: str, sides: Sequence[tuple[str, list[wire.Item]]], salt: str
) -> tuple[dict[str, np.ndarray], Usage]:
    """The vectors of all items, each distinct item once, and what they cost."""
    distinct = {_key(item): (item, field) for field, items in sides for item in items}
    places = asyncio.Semaphore(AT_A_TIME)

    async def embed(index: int, item: wire.Item, field: str) -> EmbeddingOutput:
        async with places:
            with caller_fields({"prompt": field, "messages": field}):
                prompt = await _prepared(pipeline, item, field, salt)
            return await pipeline.embed(f"{name}-{index}", prompt, PoolingParams())

    outputs = await all_or_none(
        embed(index, item, field) for index, (item, field) in enumerate(distinct.values())
    )
    vectors = {key: np.array(output.embedding) for key, output in zip(distinct, outputs, strict=True)}
    return vectors, total_usage(outputs)


def _key(item: wire.Item) -> str:
    return json.dumps(item, sort_keys=True)


async def _prepared(pipeline: Pipeline, item: wire.Item, field: str, salt: str) -> EncodedPrompt:
    text = item if isinstance(item, str) else item.get("text") if set(item) == {"text"} else None
    if text is not None:
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"{field} must not hold an empty text.", param=field)

        def plain(_: list[MediaItem | PagesItem]) -> EngineInput:
            return pipeline.builder.from_text(text, cache_salt=salt, placeholders_are_text=True)

        return await pipeline.prepare(plain, salt=salt)
    assert isinstance(item, dict)
    messages, sources = parse_messages([{"role": "user", "content": _parts(item, field)}])

    def chat(items: list[MediaItem | PagesItem]) -> EngineInput:
        return pipeline.builder.from_messages(messages, items, add_generation_prompt=False, cache_salt=salt)

    return await pipeline.prepare(chat, sources, salt=salt)


def _parts(item: dict[str, Any], field: str) -> list[Any]:
    """An item as the parts of a chat message."""
    content = item.get("content", item.get("multi_modal"))
    if isinstance(content, list):
        return content
    parts = []
    image = item.get("image", item.get("image_url"))
    if image is not None:
        parts.append({"type": "image_url", "image_url": image if isinstance(image, dict) else {"url": image}})
    if isinstance(item.get("text"), str):
        parts.append({"type": "text", "text": item["text"]})
    if not parts:
        raise InvalidRequest(
            f"{field} must hold texts, or objects with text, image, or a content list.", param=field
        )
    return parts


def _shown(item: wire.Item) -> dict[str, Any]:
    return {"text": item} if isinstance(item, str) else item
