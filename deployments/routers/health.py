"""Whether requests can be served."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

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
