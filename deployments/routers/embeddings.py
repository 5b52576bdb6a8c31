"""Embeddings of texts, and of messages with images."""

import asyncio
import base64
import time
import uuid
from dataclasses import replace

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.body import read_body
from deployments.conversations import caller_fields
from deployments.pipeline import Pipeline
from deployments.protocol import embeddings as wire
from deployments.routers.models import find_pipeline
from deployments.routers.values import usage_body
from deployments.tasks import all_or_none
from engine.errors import InvalidRequest
from engine.inputs.messages import parse_messages
from engine.outputs import EmbeddingOutput, Usage
from engine.prompt import EngineInput, MediaItem

router = APIRouter()

#: Inputs of one request that are in the engine at a time: one caller's list doesn't push out all others.
_AT_A_TIME = 64


@router.post("/v1/embeddings")
async def create_embedding(request: Request) -> Response:
    """Vectors for all inputs."""
    body = await read_body(request, wire.EmbeddingRequest, request.app.state.config.max_body_bytes)
    pipeline = find_pipeline(request, body.model)
    body.check()
    params = body.pooling_params()
    name = f"embd-{uuid.uuid4().hex}"
    places = asyncio.Semaphore(_AT_A_TIME)

    async def embed(index: int, given: str | list[int]) -> EmbeddingOutput:
        async with places:
            prompt = await (_chat(pipeline, body) if body.messages else _plain(pipeline, body, given))
            return await pipeline.embed(f"{name}-{index}", prompt, params)

    with caller_fields({"prompt": "messages" if body.messages else "input"}):
        outputs = await all_or_none(embed(index, given) for index, given in enumerate(body.inputs))
    tokens = sum(output.usage.prompt_tokens for output in outputs)
    cached = sum(output.usage.cached_tokens for output in outputs)
    vectors = [_shortened(output.embedding, body) for output in outputs]
    response = wire.EmbeddingResponse(
        id=name,
        created=int(time.time()),
        model=pipeline.name,
        data=[
            wire.EmbeddingObject(index=index, embedding=_encoded(vector, body.encoding_format))
            for index, vector in enumerate(vectors)
        ],
        usage=usage_body(Usage(tokens, 0, cached)),
    )
    return JSONResponse(response.model_dump())


def _shortened(vector: list[float], body: wire.EmbeddingRequest) -> list[float]:
    """The first ``dimensions`` numbers, at length 1 again if the vector was normalised.

    Raises:
        InvalidRequest: the vector has fewer.
    """
    size = body.dimensions
    if size is None or size == len(vector):
        return vector
    if size > len(vector):
        raise InvalidRequest(
            f"dimensions is {size}, but this model's vectors have {len(vector)}.", param="dimensions"
        )
    cut = np.array(vector[:size])
    if body.normalize:
        cut /= max(float(np.linalg.norm(cut)), 1e-12)
    return cut.tolist()


async def _chat(pipeline: Pipeline, body: wire.EmbeddingRequest):
    messages, sources = parse_messages(body.messages or [])

    def build(items: list[MediaItem]) -> EngineInput:
        return pipeline.builder.from_messages(
            messages,
            items,
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
            cache_salt=body.cache_salt,
        )

    return await pipeline.prepare(build, sources, min_tokens=0, salt=body.cache_salt)


async def _plain(pipeline: Pipeline, body: wire.EmbeddingRequest, given: str | list[int]):
    limit = body.truncate_prompt_tokens
    if limit is not None:
        most = await pipeline.max_model_len()
        limit = most if limit == -1 else min(limit, most)

    def build(_: list[MediaItem]) -> EngineInput:
        if not isinstance(given, str):
            return pipeline.builder.from_token_ids(given[:limit], cache_salt=body.cache_salt)
        inputs = pipeline.builder.from_text(
            given,
            add_special_tokens=body.add_special_tokens,
            cache_salt=body.cache_salt,
            placeholders_are_text=True,
        )
        return replace(inputs, token_ids=inputs.token_ids[:limit])

    return await pipeline.prepare(build, min_tokens=0, salt=body.cache_salt)


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
