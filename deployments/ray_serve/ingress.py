"""The HTTP side of the application as a Ray Serve deployment."""

from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.api import create_api
from deployments.config import AppConfig
from deployments.pipeline import make_pipelines
from deployments.ray_serve.handles import remote_stages
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
        self._api = create_api(config.ingress, make_pipelines(config, stages))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api
