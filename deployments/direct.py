"""Calls endpoints without FastAPI's routing."""

import inspect
from collections.abc import Awaitable, Callable, Iterable

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.errors import error_response
from engine.errors import SightlineError

Endpoint = Callable[[Request], Awaitable[Response]]


class Direct:
    """Calls endpoints that read the request themselves and make the whole response.

    FastAPI tries one route after the other, and prepares for parameters and dependencies that these endpoints
    don't have: a sixth of a request's CPU time here. All other requests go to ``app``.

    Args:
        routes: those of all endpoints.
    """

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._endpoints: dict[tuple[str, str], Endpoint] = {
            (method, route.path): route.endpoint
            for route in routes
            if isinstance(route, APIRoute) and _is_direct(route)
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await endpoint(Request(scope, receive, send))
        except SightlineError as error:
            response = error_response(error, scope)
        await response(scope, receive, send)


def _is_direct(route: APIRoute) -> bool:
    signature = inspect.signature(route.endpoint)
    made = signature.return_annotation
    reads = [parameter.annotation for parameter in signature.parameters.values()]
    return reads == [Request] and isinstance(made, type) and issubclass(made, Response)
