"""Stands for parts of Ray Serve that a handle has."""

from types import SimpleNamespace
from typing import Any


def serve_router(request_router: Any = None) -> SimpleNamespace:
    """A handle's ``_router``: ``request_router`` chooses replicas, and no autoscaling counts calls."""
    metrics = SimpleNamespace(autoscaling_config=None)
    return SimpleNamespace(
        _asyncio_router=SimpleNamespace(request_router=request_router, _metrics_manager=metrics)
    )
