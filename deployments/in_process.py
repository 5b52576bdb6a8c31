"""The whole application in one process, without Ray: the pipeline calls the stages directly."""

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from deployments.api import create_api
from deployments.config import AppConfig, ModelSpec
from deployments.encoder import VisionEncoder
from deployments.language_model import LanguageModel
from deployments.leaving import ends_with_client
from deployments.pipeline import make_pipelines
from deployments.preprocessor import Preprocessor
from deployments.stages import Stages
from deployments.tracing import Tracer, make_tracer
from engine.model_parts import load_media_processor
from engine.turns import Turns


class LocalModel:
    """The stages of one model in this process; the models are loaded here.

    Args:
        spec: the model. Its numbers of replicas and resources are not used.
        config: the application's.
        tracer: makes the spans of requests.
    """

    def __init__(self, spec: ModelSpec, config: AppConfig, tracer: Tracer) -> None:
        has_encoder = load_media_processor(spec.engine) is not None
        turns = Turns() if has_encoder else None
        self.language_model = LanguageModel.load(spec.engine, tracer, turns=turns)
        self.preprocessor: Preprocessor | None = None
        self.encoder: VisionEncoder | None = None
        if has_encoder:
            self.preprocessor = Preprocessor(
                spec.preprocessor,
                spec.engine,
                config.fetch,
                config.images,
                config.videos,
                config.documents,
                config.media,
                tracer,
            )
            self.encoder = VisionEncoder(spec.encoder, spec.engine, tracer, turns=turns)

    @property
    def stages(self) -> Stages:
        return Stages(self.language_model, self.preprocessor, self.encoder)

    async def close(self) -> None:
        """End the stages and their threads."""
        if self.preprocessor is not None:
            await self.preprocessor.close()
        if self.encoder is not None:
            self.encoder.close()
        self.language_model.close()


class LocalApplication:
    """An application of any ASGI server or client. Requests whose clients leave end, as in Ray Serve.

    Args:
        config: the ``args`` of ``serve_config.yaml``.
        tracer: makes the spans of requests; the one that ``config`` describes if None.

    Attributes:
        api: the ASGI application for servers that end requests themselves.
        models: the stages of each model, by name.

    Raises:
        CheckpointError, ConfigError: a model can't be served.
    """

    def __init__(self, config: AppConfig, tracer: Tracer | None = None) -> None:
        tracer = tracer or make_tracer(config.tracing, "server")
        self.models = {spec.name: LocalModel(spec, config, tracer) for spec in config.models}
        stages = [model.stages for model in self.models.values()]
        self.api: FastAPI = create_api(
            config.ingress, make_pipelines(config, stages), tracer=tracer, media=config.media
        )
        self._attentive = ends_with_client(self.api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._attentive(scope, receive, send)

    async def close(self) -> None:
        """End all stages."""
        for model in self.models.values():
            await model.close()
