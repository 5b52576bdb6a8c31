"""Builds the Ray Serve application from a configuration: ``import_path: deployments.app:build``."""

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig, ModelSpec, Routing, StageConfig
from deployments.logs import LoggingConfig
from deployments.ray_serve.hosts import FirstHostRouter, HostReplica
from deployments.ray_serve.ingress import Ingress
from deployments.ray_serve.process import LOGGING
from deployments.ray_serve.replicas import LanguageModelReplica, PreprocessorReplica, VisionEncoderReplica
from deployments.ray_serve.reservations import Host, check_reservation, known_hosts
from deployments.ray_serve.routing import EncoderRouter, LanguageModelRouter
from deployments.response_store import KeptResponses
from engine.frontend import load_media_processor, load_prompt_builder

#: Calls that the store of responses has open at a time: one for each response that runs in the background.
_OPEN_CALLS = 1 << 16


def build(args: AppConfig) -> Application:
    """The application that ``args`` describes.

    Raises:
        CheckpointError, ConfigError: a model can't be served, or no host can hold a replica. Raised here,
            before any replica is replaced, so that a running version stays up.
    """
    hosts = known_hosts()
    check_reservation("Ingress", args.ingress, hosts)
    stages = [_deploy_stages(spec, args, hosts) for spec in args.models]
    ingress = serve.deployment(name="Ingress", **_options(args.ingress, args.logging))(Ingress)
    if not args.ingress.has_several_replicas:
        return ingress.bind(args, *stages)
    # One replica: it is what the replicas of the ingress share.
    stage = StageConfig(num_cpus=0, max_ongoing_requests=_OPEN_CALLS)
    store = serve.deployment(name="Responses", **_options(stage, args.logging))(KeptResponses)
    return ingress.bind(args, *stages, responses=store.bind(*args.ingress.response_limits))


def _deploy_stages(spec: ModelSpec, args: AppConfig, hosts: Sequence[Host]) -> dict[str, Application]:
    """Deployments of one model; the ingress gets a handle for each."""
    load_prompt_builder(spec.engine)

    def deploy(name: str, replica: type, stage: StageConfig, *init: Any, **options: Any) -> Application:
        check_reservation(f"{name} of {spec.name}", stage, hosts)
        options |= _options(stage, args.logging) | {"name": f"{name}:{spec.slug}"}
        return serve.deployment(**options)(replica).bind(args.tracing, *init)

    spread = spec.language_model.hosts > 1
    router = FirstHostRouter if spread else LanguageModelRouter
    stages = {
        "language_model": deploy(
            "LanguageModel",
            HostReplica if spread else LanguageModelReplica,
            spec.language_model,
            spec.engine,
            *([spec.language_model.hosts] if spread else []),
            request_router_config=_routing(router, spec.language_model.routing),
        )
    }
    if load_media_processor(spec.engine) is None:
        return stages
    stages["preprocessor"] = deploy(
        "Preprocessor",
        PreprocessorReplica,
        spec.preprocessor,
        spec.engine,
        args.fetch,
        args.images,
        args.videos,
        spec.preprocessor.threads,
        spec.preprocessor.video_processes,
        args.documents,
        spec.preprocessor.document_processes,
        args.media,
    )
    stages["encoder"] = deploy(
        "VisionEncoder",
        VisionEncoderReplica,
        spec.encoder,
        spec.engine,
        spec.encoder.max_batch_patches,
        spec.encoder.cache_bytes,
        spec.encoder.duty_cycle,
        request_router_config=_routing(EncoderRouter, spec.encoder.routing),
    )
    return stages


def _options(stage: StageConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Options of the deployment of ``stage``; its processes log as ``logging`` says."""
    options = stage.options() | {"logging_config": logging.for_serve()}
    if logging != LoggingConfig():
        # Ray starts a process anew for each set of variables, so the default goes without.
        actor = options["ray_actor_options"]
        environment = actor.setdefault("runtime_env", {}).setdefault("env_vars", {})
        environment[LOGGING] = logging.model_dump_json()
    return options


def _routing(router: type, routing: Routing) -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class=router,  # type: ignore[arg-type]
        request_router_kwargs={"by_content": routing == "content"},
        request_routing_stats_period_s=1.0,  # type: ignore[arg-type]
    )
