"""The HTTP side of the application as a Ray Serve deployment."""

from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.api import create_api
from deployments.config import AppConfig
from deployments.metrics.families import Part
from deployments.pipeline import make_pipelines
from deployments.ray_serve.handles import MEASURE_S, remote_stages
from deployments.ray_serve.handoff import by_reference, everywhere
from deployments.threads import take_turns


@serve.ingress()
class Ingress:
    """Speaks OpenAI's protocol. Its state is made on the replica: none of it is pickled.

    Args:
        config: the application's.
        handles: for each of ``config.models``, the arguments of
            :func:`~deployments.ray_serve.handles.remote_stages` by name.
    """

    def __init__(self, config: AppConfig, *handles: dict[str, Any]) -> None:
        take_turns()
        stages = [remote_stages(**each) for each in handles]
        context = serve.get_replica_context()
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        self._api = create_api(
            config.ingress,
            make_pipelines(config, stages),
            replica=context.replica_id.unique_id,
            ingress=self._all_replicas,
        )

    async def measured(self) -> list[Part]:
        """The metrics that this replica keeps."""
        return self._api.state.collector.own()

    async def _all_replicas(self) -> list[Part]:
        """The metrics that the replicas of the ingress keep."""
        found = await everywhere(by_reference(self._handle), "measured", MEASURE_S)
        return [part for parts in found for part in parts]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api
