"""From a configuration to a Ray Serve application: ``import_path: deployments.app:build``."""

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig, ModelSpec, StageConfig
from deployments.encoder import VisionEncoder
from deployments.ingress import Ingress
from deployments.language_model import LanguageModel
from deployments.pipeline import Stages
from deployments.preprocessor import Preprocessor
from deployments.routing import SessionRouter
from engine.frontend import load_media_processor, load_prompt_builder


def build(args: AppConfig) -> Application:
    """The application that ``args`` describe.

    Raises:
        CheckpointError, ConfigError: a model can't be served. Told here, a running version stays up.
    """
    stages = [_stages(spec, args) for spec in args.models]
    ingress = serve.deployment(name="Ingress", **args.ingress.options())(Ingress)
    return ingress.bind(args, *stages)


def _stages(spec: ModelSpec, args: AppConfig) -> Stages:
    load_prompt_builder(spec.engine)

    def deploy(cls: type, stage: StageConfig, *init: Any, **options: Any) -> Any:
        # What is bound here reaches the ingress as a handle.
        name = f"{cls.__name__}:{spec.slug}"
        return serve.deployment(name=name, **stage.options(), **options)(cls).bind(*init)

    routing = RequestRouterConfig(request_router_class=SessionRouter)  # type: ignore[arg-type]
    language_model = deploy(LanguageModel, spec.language_model, spec.engine, request_router_config=routing)
    if load_media_processor(spec.engine) is None:
        return Stages(language_model)
    stage = spec.preprocessor
    preprocessor = deploy(Preprocessor, stage, spec.engine, args.fetch, args.images, stage.threads)
    settings = spec.encoder
    limits = (settings.max_batch_patches, settings.cache_bytes, settings.duty_cycle)
    encoder = deploy(VisionEncoder, settings, spec.engine, *limits)
    return Stages(language_model, preprocessor, encoder)
