"""Endpoints that list the served models."""

import time

from fastapi import APIRouter, Request

from deployments.body import M, read_body
from deployments.pipeline import Pipeline
from deployments.protocol.models import ModelCard, ModelList
from deployments.report import current_report
from engine.errors import ModelNotFound, Unavailable

router = APIRouter()
_STARTED = int(time.time())


def find_pipeline(request: Request, name: str) -> Pipeline:
    """The pipeline of the model that a request names.

    Raises:
        ModelNotFound: listing the models there are.
    """
    pipelines = request.app.state.pipelines
    if name not in pipelines:
        known = ", ".join(repr(known) for known in pipelines)
        raise ModelNotFound(f"The model {name[:200]!r} does not exist; served here: {known}.", param="model")
    current_report().model = name
    return pipelines[name]


async def read_request(request: Request, form: type[M]) -> tuple[M, Pipeline]:
    """The body of a request, and the pipeline of the model that it names.

    Raises:
        SightlineError: as :func:`~deployments.body.read_body` and :func:`find_pipeline`.
    """
    body = await read_body(request, form, request.app.state.config.max_body_bytes)
    return body, find_pipeline(request, body.model)


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    """All models."""
    return ModelList(data=[await _card(pipeline) for pipeline in request.app.state.pipelines.values()])


@router.get("/v1/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> ModelCard:
    """One model."""
    return await _card(find_pipeline(request, name))


async def _card(pipeline: Pipeline) -> ModelCard:
    try:
        length = await pipeline.max_model_len()
    except Unavailable:
        # It is configured all the same, and will be back.
        length = None
    return ModelCard(id=pipeline.name, created=_STARTED, root=pipeline.name, max_model_len=length)
