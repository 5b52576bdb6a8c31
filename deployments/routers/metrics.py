"""Metrics for Prometheus."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from deployments.metrics.families import render

router = APIRouter()


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """The metrics of all replicas in Prometheus' text form."""
    parts = await request.app.state.collector.collect()
    return Response(render(parts), headers={"Content-Type": CONTENT_TYPE_LATEST})
