"""The HTTP side of the application."""

from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI
from ray import serve

from deployments.api import create_api
from deployments.config import AppConfig
from deployments.pipeline import Pipeline, Stages
from deployments.threads import take_turns


@serve.ingress()
class Ingress:
    """Speaks OpenAI. State is made on the replica: nothing of it is pickled.

    Args:
        config: the application's.
        stages: handles of each model's deployments, in the order of ``config.models``.
    """

    def __init__(self, config: AppConfig, *stages: Stages) -> None:
        take_turns()
        self._config = config
        threads = ThreadPoolExecutor(config.ingress.threads, "prompts")
        self._pipelines = {
            spec.name: Pipeline(spec, handles, threads)
            for spec, handles in zip(config.models, stages, strict=True)
        }

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._config.ingress, self._pipelines)
