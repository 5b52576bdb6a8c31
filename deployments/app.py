"""Builds the Ray Serve application from a configuration: ``import_path: deployments.app:build``."""

from collections.abc import Callable, Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.config import AppConfig, ModelSpec
from deployments.logs import LoggingConfig
from deployments.ray_serve.hosts import FirstHostRouter, HostReplica
from deployments.ray_serve.ingress import Ingress
from deployments.ray_serve.process import LOGGING
from deployments.ray_serve.references import ReferencesReplica
from deployments.ray_serve.replicas import LanguageModelReplica, PreprocessorReplica, VisionEncoderReplica
from deployments.ray_serve.reservations import Host, check_reservation, known_hosts
from deployments.ray_serve.root import StagesRoot
from deployments.ray_serve.routing import EncoderRouter, LanguageModelRouter
from deployments.response_store import KeptResponses
from deployments.stage_config import Routing, StageConfig
from engine.errors import ConfigError
from engine.model_parts import load_media_processor, load_prompt_builder, load_retrieval

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
    stages = [_stages(spec, args, hosts) for spec in args.models]
    ingress = serve.deployment(name="Ingress", **_options(args.ingress, args.logging))(Ingress)
    if not args.ingress.has_several_replicas:
        return ingress.bind(args, *stages)
    # One replica of each: it is what the replicas of the ingress share.
    responses = serve.deployment(name="Responses", **_shared_options(args))(KeptResponses)
    references = serve.deployment(name="References", **_shared_options(args))(ReferencesReplica)
    return ingress.bind(
        args,
        *stages,
        responses=responses.bind(*args.ingress.response_limits),
        references=references.bind(args.ingress.references),
    )


def build_stages(args: AppConfig) -> Application:
    """The stages of one model as an application without HTTP (``route_prefix: null``).

    The ingress is in another application, whose ``models`` name this one as the model's ``application``. A
    change of these ``args`` replaces replicas of this model alone.

    Raises:
        CheckpointError, ConfigError: as :func:`build`.
    """
    if len(args.models) != 1:
        raise ConfigError("an application of stages has exactly one model", param="models")
    (spec,) = args.models
    stages = _deploy_stages(spec, args, known_hosts())
    root = serve.deployment(name=f"Stages:{spec.slug}", **_shared_options(args))(StagesRoot)
    return root.bind(*stages.values())


def _stages(spec: ModelSpec, args: AppConfig, hosts: Sequence[Host]) -> dict[str, Any]:
    """For each stage of a model a deployment, or the names of one and its application."""
    if spec.application is None:
        return _deploy_stages(spec, args, hosts)
    load_retrieval(spec.engine, load_prompt_builder(spec.engine))
    names = {"language_model": "LanguageModel"}
    if load_media_processor(spec.engine) is not None:
        encoder = "LanguageModel" if spec.encoder.with_language_model else "VisionEncoder"
        names |= {"preprocessor": "Preprocessor", "encoder": encoder}
    return {stage: (f"{name}:{spec.slug}", spec.application) for stage, name in names.items()}


def shared_stage(args: AppConfig) -> StageConfig:
    """The stage of a deployment with one replica beside the ingress, such as the store of responses."""
    return StageConfig(
        # A deployment that reserves nothing may be placed on the cluster's head, and is lost with it.
        num_cpus=0.01,
        # An autoscaler keeps a node while a replica is on it, so no replica is on the nodes of other stages.
        label_selector=args.ingress.label_selector,
        max_ongoing_requests=_OPEN_CALLS,
    )


def _shared_options(args: AppConfig) -> dict[str, Any]:
    """The options of the deployment of :func:`shared_stage`, which takes nothing over while it runs."""
    options = _options(shared_stage(args), args.logging)
    del options["user_config"]
    return options


def _deploy_stages(spec: ModelSpec, args: AppConfig, hosts: Sequence[Host]) -> dict[str, Application]:
    """Deployments of one model; the ingress gets a handle for each."""
    load_retrieval(spec.engine, load_prompt_builder(spec.engine))

    def deploy(name: str, replica: type, stage: StageConfig, *init: Any, **options: Any) -> Application:
        check_reservation(f"{name} of {spec.name}", stage, hosts)
        options |= _options(stage, args.logging) | {"name": f"{name}:{spec.slug}"}
        return serve.deployment(**options)(replica).bind(args.tracing, stage, *init)

    sees = load_media_processor(spec.engine) is not None
    stages = _deploy_media_stages(spec, args, deploy) if sees else {}
    spread = spec.language_model.hosts > 1
    encodes = sees and spec.encoder.with_language_model
    stages["language_model"] = deploy(
        "LanguageModel",
        HostReplica if spread else LanguageModelReplica,
        spec.language_model,
        spec.engine,
        *([spec.encoder] if encodes else []),
        request_router_config=_routing(
            FirstHostRouter if spread else LanguageModelRouter,
            spec.language_model.routing,
        ),
    )
    if encodes:
        stages["encoder"] = stages["language_model"]
    return stages


def _deploy_media_stages(
    spec: ModelSpec, args: AppConfig, deploy: Callable[..., Application]
) -> dict[str, Application]:
    stages = {}
    stages["preprocessor"] = deploy(
        "Preprocessor",
        PreprocessorReplica,
        spec.preprocessor,
        spec.engine,
        args.fetch,
        args.images,
        args.videos,
        args.documents,
        args.media,
    )
    if not spec.encoder.with_language_model:
        stages["encoder"] = deploy(
            "VisionEncoder",
            VisionEncoderReplica,
            spec.encoder,
            spec.engine,
            request_router_config=_routing(EncoderRouter, spec.encoder.routing),
        )
    return stages


def _options(stage: StageConfig, logging: LoggingConfig) -> dict[str, Any]:
    """Options of the deployment of ``stage``; its processes log as ``logging`` says."""
    options = stage.options() | {"logging_config": logging.for_serve()}
    if logging != LoggingConfig():
        # Ray starts another process for each set of variables, so the default has none.
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
