"""Vectors of all tokens of texts, and of messages with images."""

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
from engine.outputs import EmbeddingOutput

router = APIRouter()


@router.post("/pooling")
@router.post("/v1/pooling", include_in_schema=False)
@described(wire.PoolingRequest, wire.PoolingResponse)
async def pool(request: Request) -> Response:
    """Vectors of each input's tokens, or its one vector."""
    body, pipeline = await read_request(request, wire.PoolingRequest)
    body.check()
    name = f"pool-{uuid.uuid4().hex}"
    outputs = await vectors(pipeline, name, body)

    def response() -> bytes:
        made = wire.PoolingResponse(
            id=name,
            created=int(time.time()),
            model=pipeline.name,
            data=[_object(index, output, body) for index, output in enumerate(outputs)],
            usage=usage_body(total_usage(outputs)),
        )
        return made.model_dump_json().encode()

    # Long lists of numbers take a while to write.
    return Response(await asyncio.to_thread(response), media_type="application/json")


def _object(index: int, output: EmbeddingOutput, body: wire.PoolingRequest) -> wire.PoolingObject:
    found = output.token_embeddings
    array = np.array(output.embedding, np.float32) if found is None else found
    data = array.tolist() if body.encoding_format == "float" else encoded(array, body)
    return wire.PoolingObject(index=index, data=data, shape=list(array.shape))
