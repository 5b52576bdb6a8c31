"""The HTTP side of the application as a Ray Serve deployment."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api import create_api, take_over
from deployments.config import AppConfig
from deployments.in_place import InPlace
from deployments.leaving import PIECES, ends_with_client
from deployments.metrics.families import Part
from deployments.pipeline import make_pipelines
from deployments.ray_serve.doorstep import Doorstep
from deployments.ray_serve.garbage import collect_regularly
from deployments.ray_serve.handles import MEASURE_S, remote_stages
from deployments.ray_serve.handoff import by_reference, everywhere
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.stores import RemoteKeeper, RemoteReferences
from deployments.readiness import announce
from deployments.tracing import make_tracer


@serve.ingress()
class Ingress:
    """Speaks OpenAI's protocol. Its state is made on the replica: none of it is pickled.

    Args:
        config: the application's.
        stages: for each of ``config.models``, the arguments of
            :func:`~deployments.ray_serve.handles.remote_stages` by name: handles, or the names of a
            deployment and its application.
        responses: a :class:`~deployments.response_store.KeptResponses` that all replicas share.
        references: a :class:`~deployments.ray_serve.references.ReferencesReplica` likewise.
    """

    def __init__(
        self,
        config: AppConfig,
        *stages: dict[str, Any],
        responses: DeploymentHandle | None = None,
        references: DeploymentHandle | None = None,
    ) -> None:
        prepare_process()
        handles = [{name: _handle(given) for name, given in each.items()} for each in stages]
        media_keeper = None if references is None else RemoteReferences(references)
        pipelines = make_pipelines(config, [remote_stages(**each) for each in handles], media_keeper)

        @asynccontextmanager
        async def announced(_: FastAPI) -> AsyncIterator[None]:
            tasks = [
                asyncio.ensure_future(announce(pipelines, await asyncio.to_thread(_address))),
                asyncio.ensure_future(collect_regularly()),
            ]
            yield
            if responses is not None:
                # Clients will ask other replicas for what is still made here in the background.
                while background := self._api.state.background:
                    await asyncio.wait(background)
            for task in tasks:
                task.cancel()

        context = serve.get_replica_context()
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        self._api = create_api(
            config.ingress,
            pipelines,
            # Ray Serve's proxies send each request's id themselves.
            echo_ids=False,
            keeper=None if responses is None else RemoteKeeper(responses),
            lifespan=announced,
            replica=context.replica_id.unique_id,
            ingress=self._all_replicas,
            tracer=make_tracer(config.tracing, "ingress"),
            media=config.media,
        )
        self._in_place = InPlace(config.ingress, config.ingress.IN_PLACE, partial(take_over, self._api))
        self._api.add_middleware(Disconnects)
        Doorstep.loop = asyncio.get_running_loop()

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Take over values while the replica runs; Ray Serve calls this."""
        self._in_place.take_over(user_config)

    async def check_health(self) -> None:
        """Answer on the event loop that does the work: Ray Serve's own answer comes from another one."""

    async def measured(self) -> list[Part]:
        """The metrics that this replica keeps."""
        return self._api.state.collector.own()

    async def _all_replicas(self) -> list[Part]:
        """The metrics that the replicas of the ingress keep."""
        found = await everywhere(by_reference(self._handle), "measured", MEASURE_S)
        return [part for parts in found for part in parts]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


class Disconnects:
    """Tells the application in ASGI's way that a client has left; Ray Serve raises errors of Ray.

    Where Ray Serve leaves it to the application, work on requests ends here when their clients leave. Ray
    Serve is told so by the same error as in tasks that it cancels itself.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._attentive = ends_with_client(app, stays_cancelled=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if PIECES in scope:
            await self._attentive(scope, receive, send)
            return

        async def receive_or_leave() -> Message:
            try:
                return await receive()
            except RayError:
                return {"type": "http.disconnect"}

        await self._app(scope, receive_or_leave if scope["type"] == "http" else receive, send)


def _handle(given: DeploymentHandle | tuple[str, str]) -> DeploymentHandle:
    """A handle; the deployment and its application may be yet to come."""
    if isinstance(given, DeploymentHandle):
        return given
    name, application = given
    return serve.get_deployment_handle(name, application, _check_exists=False)


def _address() -> str:
    """The address at which this cluster's proxies listen."""
    client = _get_global_client()
    assert client is not None, "a replica always has a client"
    options = client.http_config
    host = f"[{options.host}]" if ":" in (options.host or "") else options.host
    return f"http://{host}:{options.port}{options.root_path}"
