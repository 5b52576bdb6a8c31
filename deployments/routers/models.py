"""Endpoints that list the served models."""

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from deployments.body import M, read_body
from deployments.config import IngressConfig
from deployments.pipeline import Pipeline
from deployments.protocol.models import ModelCard, ModelList
from deployments.replay import deadline
from deployments.report import current_report
from engine.errors import InvalidRequest, ModelNotFound, Overloaded, Unavailable

router = APIRouter()
_STARTED = int(time.time())


def find_pipeline(request: Request, name: str) -> Pipeline:
    """The pipeline of the model that a request names.

    Raises:
        ModelNotFound: listing the models there are.
    """
    pipelines = request.app.state.pipelines
    if name not in pipelines:
        known = f"served here: {_listed(pipelines)}"
        raise ModelNotFound(f"The model {name[:200]!r} does not exist; {known}.", param="model")
    current_report().model = name
    return pipelines[name]


async def read_request(request: Request, form: type[M]) -> tuple[M, Pipeline]:
    """The body of a request, and the pipeline of the model that it names, or that alone answers such bodies.

    Raises:
        SightlineError: as :func:`~deployments.body.read_body` and :func:`find_pipeline`.
        InvalidRequest: the body names no model, and there are several.
    """
    config: IngressConfig = request.app.state.config
    body = await read_body(request, form, config.max_body_bytes, deadline(config.request_timeout_s))
    body.model = body.model or _only_model(request, form.TASKS)
    return body, find_pipeline(request, body.model)


def _only_model(request: Request, tasks: Collection[str]) -> str:
    """The only model that is served, or the only one for some tasks."""
    pipelines: Mapping[str, Pipeline] = request.app.state.pipelines
    fitting = [name for name, pipeline in pipelines.items() if pipeline.task in tasks]
    for names in (list(pipelines), fitting):
        if len(names) == 1:
            return names[0]
    raise InvalidRequest(f"model is missing; served here: {_listed(pipelines)}.", param="model")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


@router.get("/v1/models", response_model=ModelList)
async def list_models(request: Request) -> Any:
    """All models; in Anthropic's form, on one page, for clients that send ``anthropic-version``."""
    pipelines = request.app.state.pipelines.values()
    cards = await asyncio.gather(*(_card(request, pipeline) for pipeline in pipelines))
    if not _is_anthropics(request):
        return ModelList(data=cards)
    data = [card.anthropic() for card in cards]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return JSONResponse({"data": data, "has_more": False, **ends})


@router.get("/v1/models/{name:path}", response_model=ModelCard)
async def retrieve_model(request: Request, name: str) -> Any:
    """One model; see :func:`list_models`."""
    card = await _card(request, find_pipeline(request, name))
    return JSONResponse(card.anthropic()) if _is_anthropics(request) else card


def _is_anthropics(request: Request) -> bool:
    return "anthropic-version" in request.headers


async def _card(request: Request, pipeline: Pipeline) -> ModelCard:
    length = None
    # A model that doesn't answer is configured all the same, and will be back.
    with suppress(Unavailable, Overloaded, TimeoutError):
        async with asyncio.timeout(request.app.state.config.health_timeout_s):
            length = await pipeline.known_max_model_len()
    return ModelCard(id=pipeline.name, created=_STARTED, root=pipeline.name, max_model_len=length)
