"""Decisions: questions about an input, answered by probabilities."""

import uuid

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deployments.decisions import decide
from deployments.openapi import described
from deployments.protocol import decisions as wire
from deployments.routers.models import read_request

router = APIRouter()


@router.post("/v1/decisions")
@described(wire.DecisionRequest, wire.Decision)
async def create_decision(request: Request) -> Response:
    """Answer predicates, choices and scores about texts and images, by the probabilities of the options."""
    body, pipeline = await read_request(request, wire.DecisionRequest)
    answers, usage = await decide(pipeline, f"decision-{uuid.uuid4().hex}", body)
    response = wire.Decision(
        model=pipeline.name,
        answers=answers,
        usage=wire.DecisionUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=wire.InputTokensDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        ),
    )
    return JSONResponse(response.model_dump())
