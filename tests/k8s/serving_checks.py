"""Faults of the serve config in a RayService: against our own types, and against the pods beside it."""

import math
from collections.abc import Iterator
from typing import Any

import yaml

from deployments.app import shared_stage
from deployments.config import AppConfig
from deployments.stage_config import StageConfig
from tests.k8s.checks import Document, container, environment, groups, pods, reservable
from tests.k8s.tools import rayservice


def app_config(service: Document) -> AppConfig:
    """The application's arguments in ``serveConfigV2``."""
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    return AppConfig.model_validate(application["args"])


def config_faults(found: list[Document]) -> list[str]:
    """Why the configuration would not run on these pods."""
    from ray.serve.schema import ServeDeploySchema

    service = rayservice(found)
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    try:
        ServeDeploySchema.model_validate(config)
        parsed = app_config(service)
    except ValueError as error:
        return [f"serveConfigV2: {error}"]
    faults = list(_unknown_fields(config))
    if config.get("proxy_location", "EveryNode") != "EveryNode":
        faults.append("proxy_location: workers without a proxy are never ready")
    if config.get("http_options", {}).get("host") != "0.0.0.0":
        faults.append("http_options.host: no other pod could reach the proxies")
    ports = {
        port.get("name"): port["containerPort"]
        for _, pod in pods(service)
        for port in container(pod)["ports"]
    }
    if config.get("http_options", {}).get("port", 8000) != ports.get("serve"):
        faults.append("http_options.port isn't the pods' port serve")
    faults += _model_faults(found, parsed)
    for name, stage in stages(parsed):
        faults += _stage_faults(found, name, stage)
    return [*faults, *_capacity_faults(service, parsed)]


def _unknown_fields(config: Document) -> Iterator[str]:
    """Misspelt fields outside of ``args``, which Serve ignores."""
    from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema, ServeDeploySchema

    parts = [(config, ServeDeploySchema), (config.get("http_options", {}), HTTPOptionsSchema)]
    parts.append((config.get("logging_config", {}), LoggingConfig))
    parts += [(application, ServeApplicationSchema) for application in config["applications"]]
    for part, schema in parts:
        if unknown := part.keys() - schema.model_fields.keys():
            yield f"serveConfigV2: Serve knows no field {sorted(unknown)[0]!r}"


def stages(config: AppConfig) -> Iterator[tuple[str, StageConfig]]:
    """Every deployment's configuration by a name for messages."""
    yield "ingress", config.ingress
    if config.ingress.has_several_replicas:
        yield "stored responses", shared_stage(config)
        yield "stored references", shared_stage(config)
    for model in config.models:
        yield f"preprocessor of {model.name}", model.preprocessor
        yield f"encoder of {model.name}", model.encoder
        yield f"language_model of {model.name}", model.language_model


def _model_faults(found: list[Document], config: AppConfig) -> Iterator[str]:
    """Models that no volume holds, and keys that no Secret gives."""
    service = rayservice(found)
    fetched = {
        name.rpartition("/")[2]
        for job in found
        if job["kind"] == "Job"
        for name in job["spec"]["template"]["spec"]["containers"][0]["args"]
    }
    for model in config.models:
        path = model.engine.model
        if path.startswith("/models/") and path.removeprefix("/models/") not in fetched:
            yield f"nothing puts {path} onto the volume"
        gpus = model.language_model.num_gpus
        if gpus and max(gpus, 1) * model.language_model.hosts != model.engine.tensor_parallel_size:
            yield f"{model.name}: num_gpus isn't tensor_parallel_size"
        hosts = model.language_model.hosts
        sizes = {g.get("numOfHosts", 1) for g in groups(service) if fits(model.language_model, g)}
        if hosts > 1 and hosts not in sizes:
            yield f"{model.name}: spread over {hosts} hosts, but no group counts its pods by {hosts}"
    (name, template), *_ = [(n, t) for n, t in pods(service) if n != "head"]
    for key in config.ingress.keys:
        if key.env is not None and key.env not in environment(found, template):
            yield f"{name} has no variable {key.env} for the API key {key.name!r}"


def _stage_faults(found: list[Document], name: str, stage: StageConfig) -> Iterator[str]:
    service = rayservice(found)
    if stage.num_cpus <= 0:
        yield f"{name}: reserves no CPU, so it may be placed on the head"
    for _, template in pods(service):
        drain = float(environment(found, template).get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    if stage.graceful_shutdown_timeout_s >= drain:
        yield f"{name}: takes longer to stop than a pod drains"
    streams = name == "ingress" or name.startswith("language_model")
    if streams and stage.graceful_shutdown_timeout_s < 600:
        yield f"{name}: streams pass through it, and it stops after {stage.graceful_shutdown_timeout_s:.0f} s"
    if not any(fits(stage, group) for group in groups(service)):
        yield f"{name}: no group has a pod that can hold a replica"


def fits(stage: StageConfig, group: Document) -> bool:
    """Return whether one pod of ``group`` can hold a replica."""
    labels = group.get("labels") or {}
    return (
        stage.label_selector.items() <= labels.items()
        and stage.num_cpus <= reservable(group, "cpu")
        and stage.num_gpus <= reservable(group, "nvidia.com/gpu")
    )


def _capacity_faults(service: Document, config: AppConfig) -> Iterator[str]:
    """Groups whose most pods can't hold the most replicas, with one stage being replaced by surge."""
    need: dict[str, list[tuple[float, float, float, float]]] = {}
    for _, stage in stages(config):
        for group in groups(service):
            if fits(stage, group):
                most = (stage.autoscaling or {}).get("max_replicas", stage.num_replicas)
                most *= getattr(stage, "hosts", 1)
                surge = math.ceil(most * stage.surge / 100)
                need.setdefault(group["groupName"], []).append((most, surge, stage.num_cpus, stage.num_gpus))
                break
    for group in groups(service):
        replicas = need.get(group["groupName"], [])
        for kind, column in (("cpu", 2), ("nvidia.com/gpu", 3)):
            have = reservable(group, kind) * group["maxReplicas"] * group.get("numOfHosts", 1)
            steady = sum(row[0] * row[column] for row in replicas)
            # Replacements wait for room, but one replica must find some, or the update never ends.
            update = max((min(row[1], 1) * row[column] for row in replicas), default=0)
            if steady + update > have + 1e-9:
                yield f"{group['groupName']}: {steady:g} + {update:g} of {kind} reserved at most, of {have:g}"


def same_application(service: Document, args: dict[str, Any]) -> bool:
    """Return whether the RayService serves ``args``, apart from how long its stages may take to stop."""

    def plain(config: AppConfig) -> dict[str, Any]:
        dumped = config.model_dump()
        for stage in [dumped["ingress"], *(model["language_model"] for model in dumped["models"])]:
            del stage["graceful_shutdown_timeout_s"]
        return dumped

    return plain(app_config(service)) == plain(AppConfig.model_validate(args))
