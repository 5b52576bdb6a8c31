"""The ASGI application of the ingress: routes, limits, and errors in OpenAI's form."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from deployments.access import Access
from deployments.admission import AdmissionLimit
from deployments.config import IngressConfig
from deployments.direct import Direct
from deployments.errors import (
    NoSuchRoute,
    WrongMethod,
    as_sightline,
    error_body,
    error_response,
)
from deployments.metrics.collector import Collector, Source
from deployments.metrics.ingress import HttpMeter
from deployments.openapi import DescriptionFile, describe
from deployments.pipeline import Pipeline
from deployments.report import NewIds, current_report
from deployments.request_log import RequestLog
from deployments.response_store import Keeper, KeptResponses, ResponseStore
from deployments.routers import (
    chat,
    completions,
    decisions,
    embeddings,
    health,
    messages,
    metrics,
    models,
    page,
    pooling,
    responses,
    scoring,
    tokens,
)
from deployments.tracing import Tracer
from engine.errors import SightlineError
from engine.media.ledger import Ledger, MediaLimits


def create_api(
    config: IngressConfig,
    pipelines: Mapping[str, Pipeline],
    *,
    replica: str = "local",
    ingress: Source | None = None,
    echo_ids: bool = True,
    keeper: Keeper | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
    tracer: Tracer | None = None,
    media: MediaLimits = MediaLimits(),
) -> FastAPI:
    """The application for the models in ``pipelines``, by the name that clients use.

    Args:
        replica, ingress: see :class:`~deployments.metrics.collector.Collector`, which is ``state.collector``.
        echo_ids: see :class:`~deployments.request_log.RequestLog`.
        keeper: holds the responses of all replicas; None if there is only this one.
        lifespan: what the server enters when it starts and leaves when it stops.
        tracer: makes a span for each request.
        media: the most that the media of open requests may take; ``state.ledger`` counts them.
    """
    new_id = NewIds()
    api = _Api(RequestLog(echo_ids, new_id), title="Sightline", openapi_url=None, lifespan=lifespan)
    api.state.pipelines, api.state.new_id = pipelines, new_id
    if keeper is None:
        keeper = KeptResponses(*config.response_limits)
    api.state.responses = ResponseStore(keeper)
    api.state.background, api.state.logs = set(), {}
    api.state.ledger = ledger = Ledger(media)
    http = HttpMeter()
    api.state.collector = Collector(
        http, pipelines, config.health_timeout_s, replica=replica, ingress=ingress
    )
    generating = (chat, completions, responses, messages, decisions)
    endpoints = [*generating, embeddings, pooling, scoring, tokens, models, health, metrics]
    if config.page:
        endpoints.append(page)
    for endpoint in endpoints:
        api.include_router(endpoint.router)
    routes = [route for endpoint in endpoints for route in endpoint.router.routes]
    shown = [route for route in routes if isinstance(route, APIRoute) and route.include_in_schema]
    api.state.routes = routes
    api.state.paths = frozenset(route.path for route in shown)
    tasks = {name: pipeline.task for name, pipeline in pipelines.items()}
    described = {keys: cache(partial(describe, api, routes, tasks, keys=keys)) for keys in (False, True)}
    api.openapi = lambda: described[bool(api.state.config.keys)]()  # type: ignore[method-assign]
    api.add_route("/openapi.json", DescriptionFile(lambda: api.openapi()).answer, include_in_schema=False)
    api.add_exception_handler(HTTPException, _on_http_error)
    api.add_exception_handler(SightlineError, _on_error)
    api.add_middleware(Direct, routes=routes)
    api.state.admission = admission = AdmissionLimit()
    api.add_middleware(admission.around)
    api.state.access = access = Access(page=config.page, ledger=ledger)
    api.add_middleware(access.around)
    api.add_middleware(Spelling)
    if config.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    api.add_middleware(LastResort)
    if tracer is not None and tracer.on:
        api.add_middleware(tracer.around)
    api.add_middleware(lambda app: http.around(app, routes))
    _use(api, config)
    return api


class _Api(FastAPI):
    """The log is outside of all middleware, of Starlette's too: what it sends goes straight to the server."""

    def __init__(self, log: RequestLog, **options: Any) -> None:
        self._log = log
        super().__init__(**options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # Without FastAPI's look for exporters of telemetry: deployments.tracing makes the spans.
            await Starlette.__call__(self, without_prefix(scope), receive, send)
        else:
            await super().__call__(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        return self._log.around(super().build_middleware_stack())


def without_prefix(scope: Scope) -> Scope:
    """A request as the client of a server without a ``route_prefix`` would send it.

    Servers give a prefix twice: as ``root_path`` and at the beginning of ``path``. Here it becomes
    Starlette's ``app_root_path`` alone, so that all that looks at paths (keys, errors, metrics) sees its own.
    """
    if not (prefix := scope.get("root_path", "").rstrip("/")):
        return scope
    path = scope["path"]
    if path == prefix or path.startswith(f"{prefix}/"):
        path = path[len(prefix) :] or "/"
    return {**scope, "path": path, "root_path": "", "app_root_path": prefix}


def take_over(api: FastAPI, config: IngressConfig) -> None:
    """Have ``api`` use the values of :attr:`IngressConfig.IN_PLACE` from the next request on.

    Raises:
        ConfigError: a key can't be read; then all values stay as they were.
    """
    _use(api, config)
    for pipeline in api.state.pipelines.values():
        pipeline.replay, pipeline.timeout_s = config.replay, config.request_timeout_s


def _use(api: FastAPI, config: IngressConfig) -> None:
    state = api.state
    state.access.change(config.keys)
    state.config = config
    state.admission.limit = config.max_active_requests
    state.admission.patience_s = config.send_timeout_s
    state.collector.timeout = config.health_timeout_s


class Spelling:
    """Takes paths with a slash at their end, and HEAD wherever there is GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The answer to HEAD loses its body where it is sent.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"].rstrip("/") or "/"
        if (path, method) != (scope["path"], scope["method"]):
            scope = {**scope, "path": path, "method": method}
        await self._app(scope, receive, send)


class LastResort:
    """Turns an error that nothing else has handled into a 500, unless the response has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except ClientDisconnect:
            # Its body was not read to the end: there is nothing to answer.
            return
        except Exception as error:
            if current_report().status is not None:
                raise
            await error_response(as_sightline(error), scope)(scope, receive, send)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return error_response(as_sightline(error), request.scope)


def _methods(request: Request) -> set[str]:
    """The methods that a path takes."""
    routes = [*request.app.state.routes, *request.app.routes]
    routes = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
    # See Spelling.
    return methods | ({"HEAD"} if "GET" in methods else set())


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """The response to a path or method that no endpoint takes."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 404:
        if path.startswith("/v1/v1/"):
            meant = path.removeprefix("/v1")
            advice = "The client adds /v1 itself: leave it out of the base URL."
        else:
            meant = f"/v1{path}"
            advice = "Let the client's base URL end in /v1."
        hint = f" Did you mean {meant}? {advice}" if meant in request.app.state.paths else ""
        missing = NoSuchRoute(f"There is no endpoint {path}.{hint}")
        return error_response(missing, request.scope)
    if error.status_code == 405:
        methods = _methods(request)
        taken = " or ".join(sorted(methods))
        wrong = WrongMethod(f"{path} takes {taken} requests, not {request.method[:20]}.", methods)
        return error_response(wrong, request.scope)
    return JSONResponse(error_body(as_sightline(error)), error.status_code)
