"""Endpoints that report health, version, and the number of open requests."""

import asyncio
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.errors import as_sightline

router = APIRouter()


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 if a replica of every model's language model answers, else 503 saying which doesn't."""
    timeout = request.app.state.config.health_timeout_s
    pipelines = request.app.state.pipelines
    found = await asyncio.gather(
        *(asyncio.wait_for(pipeline.ping(), timeout) for pipeline in pipelines.values()),
        return_exceptions=True,
    )
    states = {
        name: "ok" if not isinstance(state, BaseException) else as_sightline(state).message
        for name, state in zip(pipelines, found, strict=True)
    }
    ok = all(state == "ok" for state in states.values())
    return JSONResponse({"status": "ok" if ok else "unavailable", "models": states}, 200 if ok else 503)


@router.get("/ping")
async def ping() -> Response:
    """200 while the ingress runs, whatever the models do."""
    return Response()


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The version of Sightline."""
    try:
        return {"version": version("sightline")}
    except PackageNotFoundError:
        # Run from a folder without an installation.
        return {"version": "unknown"}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Return the number of requests that this ingress replica has open."""
    return {"server_load": request.app.state.admission.active}
