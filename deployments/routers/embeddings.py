"""Embeddings of texts, and of messages with images."""

import asyncio
import time
import uuid

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.openapi import described
from deployments.protocol import embeddings as wire
from deployments.routers.models import read_request
from deployments.routers.values import usage_body
from deployments.vectors import encoded, total_usage, vectors
from engine.errors import InvalidRequest
from engine.outputs import EmbeddingOutput

router = APIRouter()


@router.post("/v1/embeddings")
@described(wire.EmbeddingRequest, wire.EmbeddingResponse)
async def create_embedding(request: Request) -> Response:
    """Vectors for all inputs."""
    body, pipeline = await read_request(request, wire.EmbeddingRequest)
    body.check()
    name = f"embd-{uuid.uuid4().hex}"
    outputs = await vectors(pipeline, name, body)

    def response() -> bytes:
        data = [
            wire.EmbeddingObject(index=index, embedding=_embedding(output, body))
            for index, output in enumerate(outputs)
        ]
        made = wire.EmbeddingResponse(
            id=name,
            created=int(time.time()),
            model=pipeline.name,
            data=data,
            usage=usage_body(total_usage(outputs)),
        )
        return made.model_dump_json().encode()

    # Long lists of numbers take a while to write.
    return Response(await asyncio.to_thread(response), media_type="application/json")


def _embedding(output: EmbeddingOutput, body: wire.EmbeddingRequest) -> list[float] | str:
    vector = _shortened(output.embedding, body)
    return vector if body.encoding_format == "float" else encoded(np.array(vector), body)


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
    if body.normalized:
        cut /= max(float(np.linalg.norm(cut)), 1e-12)
    return cut.tolist()
