"""The checks of these tests catch mistakes: each is planted into an overlay that is right otherwise."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.k8s import checks
from tests.k8s.policies import policy_faults
from tests.k8s.serving_checks import config_faults
from tests.k8s.tools import SCHEMA, crd_schema, documents, rayservice

Plant = Callable[[list[dict[str, Any]]], None]


def all_faults(found: list[dict[str, Any]]) -> list[str]:
    pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    service = rayservice(found)
    faults = checks.schema_faults(service, crd_schema()) if SCHEMA.exists() else []
    # The other checks may rely on the schema, and the last one on them.
    faults = faults or [
        *checks.builtin_faults(found),
        *checks.operator_faults(service),
        *checks.loss_faults(found),
        *checks.reference_faults(found),
        *config_faults(found),
    ]
    return faults or policy_faults(found)


def at(path: str, value: Any) -> Plant:
    """Sets a field of the RayService; None deletes it. Numbers in the path index lists."""

    def plant(found: list[dict[str, Any]]) -> None:
        place: Any = rayservice(found)
        *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return plant


def serve(path: str, value: Any) -> Plant:
    """Sets a field of the serve config."""

    def plant(found: list[dict[str, Any]]) -> None:
        service = rayservice(found)
        config = yaml.safe_load(service["spec"]["serveConfigV2"]) | {"kind": "RayService"}
        at(path, value)([config])
        del config["kind"]
        service["spec"]["serveConfigV2"] = yaml.safe_dump(config)

    return plant


def other(kind: str, name: str, change: Callable[[dict[str, Any]], Any]) -> Plant:
    """Changes another object."""

    def plant(found: list[dict[str, Any]]) -> None:
        named = [d for d in found if d["kind"] == kind and d["metadata"]["name"].startswith(name)]
        # The shortest: a name may be the beginning of others.
        document = min(named, key=lambda d: len(d["metadata"]["name"]))
        change(document)

    return plant


def both(*plants: Plant) -> Plant:
    def plant(found: list[dict[str, Any]]) -> None:
        for each in plants:
            each(found)

    return plant


def removed(kind: str, name: str) -> Plant:
    def plant(found: list[dict[str, Any]]) -> None:
        found[:] = [d for d in found if (d["kind"], d["metadata"]["name"]) != (kind, name)]

    return plant


RAY = "spec/rayClusterConfig"
CPU = f"{RAY}/workerGroupSpecs/0"
CPU_POD = f"{CPU}/template/spec"
CPU_RAY = f"{CPU_POD}/containers/0"
MODEL = "applications/0/args/models/0"

MISTAKES: dict[str, tuple[Plant, str]] = {
    # Typing errors.
    "a field misspelt": (at("spec/rayClusterDeletionDelaySecond", 900), "rayClusterDeletionDelaySecond"),
    "a probe misspelt": (at(f"{CPU_RAY}/readynessProbe", {}), "readynessProbe"),
    "a serve config that is no string": (
        at("spec/serveConfigV2", {"applications": []}),
        "is not of type 'string'",
    ),
    "a number in words": (at(f"{CPU_RAY}/resources/limits/memory", "plenty"), "plenty"),
    "a number as a string": (
        at(f"{CPU_POD}/terminationGracePeriodSeconds", "660"),
        "is not of type 'integer'",
    ),
    "a kind of Kubernetes with an unknown field": (
        other("StatefulSet", "sightline-redis", lambda d: d["spec"].update(replica=1)),
        "replica",
    ),
    # What the operator refuses while it runs.
    "a name too long": (at("metadata/name", "sightline" * 6), "47"),
    "labels among Ray's parameters": (at(f"{CPU}/rayStartParams/labels", "a=b"), "labels"),
    "resources twice": (
        both(at(f"{CPU}/resources", {"CPU": "4"}), at(f"{CPU}/rayStartParams/num-cpus", "4")),
        "resources in two places",
    ),
    "two groups of one name": (at(f"{CPU}/groupName", "encode"), "one name"),
    "fewer at most than at least": (at(f"{CPU}/maxReplicas", 1), "minReplicas above maxReplicas"),
    "a variable of the operator's": (
        at(f"{CPU_RAY}/env/0", {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}),
        "RAY_REDIS_ADDRESS",
    ),
    "pods that restart under autoscaler v2": (at(f"{CPU_POD}/restartPolicy", "Always"), "restartPolicy"),
    "an incremental upgrade in big steps": (
        at(
            "spec/upgradeStrategy",
            {
                "type": "NewClusterWithIncrementalUpgrade",
                "clusterUpgradeOptions": {
                    "gatewayClassName": "istio",
                    "stepSizePercent": 50,
                    "maxSurgePercent": 25,
                    "intervalSeconds": 60,
                },
            },
        ),
        "stepSizePercent",
    ),
    "an unknown strategy": (at("spec/upgradeStrategy", {"type": "Rolling"}), "Rolling"),
    "a gated field": (at(f"{RAY}/gcsFaultToleranceOptions/backend", "rocksdb"), "rocksdb"),
    "a head without the port serve": (
        at(f"{RAY}/headGroupSpec/template/spec/containers/0/ports/3/name", "http"),
        "no service",
    ),
    # What loses requests.
    "a drain longer than the grace": (
        at(f"{CPU_POD}/terminationGracePeriodSeconds", 600),
        "killed after 600",
    ),
    "the old cluster deleted early": (at("spec/rayClusterDeletionDelaySeconds", None), "old cluster"),
    "a hard stop before the drain": (
        other("ConfigMap", "sightline-env", lambda d: d["data"].pop("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S")),
        "hard stop",
    ),
    "a probe that asks the node and not the proxy": (
        at(f"{CPU_RAY}/readinessProbe/httpGet", {"path": "/api/local_raylet_healthz", "port": 52365}),
        "readiness probe",
    ),
    "an impatient probe": (at(f"{CPU_RAY}/readinessProbe/timeoutSeconds", 1), "slow answer"),
    "streams cut by the ingress's end": (
        serve("applications/0/args/ingress/graceful_shutdown_timeout_s", None),
        "ingress: streams pass",
    ),
    "a stage that outlives its pod": (
        serve(f"{MODEL}/language_model/graceful_shutdown_timeout_s", 3600),
        "longer to stop",
    ),
    "more memory than requested": (at(f"{CPU_RAY}/resources/requests/memory", "1Gi"), "memory requested"),
    "an object store beyond the memory": (
        at(f"{CPU}/rayStartParams/object-store-memory", "8589934592"),
        "half of the memory",
    ),
    "a container that may become root": (at(f"{CPU_RAY}/securityContext", None), "hardened"),
    "GPU nodes not tolerated": (at(f"{RAY}/workerGroupSpecs/1/template/spec/tolerations", None), "tainted"),
    # Names that lead nowhere.
    "a ConfigMap gone": (
        at(f"{CPU_RAY}/envFrom/0/configMapRef/name", "sightline-env"),
        "no ConfigMap sightline-env",
    ),
    "head and workers of different images": (at(f"{CPU_RAY}/image", "sightline:other"), "different images"),
    "an image without a tag": (at(f"{CPU_RAY}/image", "sightline"), "no tag"),
    "a volume not there": (at(f"{CPU_POD}/volumes", None), "no volume models"),
    "a claim not there": (removed("PersistentVolumeClaim", "models"), "no PersistentVolumeClaim models"),
    "a priority not there": (removed("PriorityClass", "sightline"), "no PriorityClass"),
    "a key of a Secret misspelt": (
        at(f"{CPU_RAY}/env/1/valueFrom/secretKeyRef/key", "token"),
        "sightline-keys has no key token",
    ),
    "the head's state at an unknown address": (
        at(f"{RAY}/gcsFaultToleranceOptions/redisAddress", "redis:6379"),
        "no Service redis",
    ),
    "a policy for pods that don't exist": (
        other(
            "NetworkPolicy",
            "sightline-redis",
            lambda d: d["spec"]["podSelector"]["matchLabels"].update(a="b"),
        ),
        "selects no pod",
    ),
    "a policy for some ports between pods": (
        other("NetworkPolicy", "sightline", lambda d: d["spec"]["ingress"][0].update(ports=[{"port": 6379}])),
        "generate can't reach port 41234 of cpu",
    ),
    "a policy that lets preprocessors fetch nothing": (
        other(
            "NetworkPolicy",
            "sightline-pictures",
            lambda d: d["spec"]["podSelector"]["matchExpressions"][0].update(values=["encode"]),
        ),
        "cpu can't reach port 443 of a public address",
    ),
    "a policy that lets all pods go out": (
        other("NetworkPolicy", "sightline-pictures", lambda d: d["spec"].pop("podSelector")),
        "encode can reach port 443 of a public address",
    ),
    "a policy that opens the cluster's inside": (
        other(
            "NetworkPolicy",
            "sightline-pictures",
            lambda d: d["spec"]["egress"][0]["to"][0]["ipBlock"].pop("except"),
        ),
        "cpu can reach port 80 of the cluster's inside",
    ),
    "a policy that lets everybody in": (
        other("NetworkPolicy", "sightline", lambda d: d["spec"]["ingress"][1].pop("from")),
        "a stranger can reach port 8000 of cpu",
    ),
    "a policy that stops the operator": (
        other("NetworkPolicy", "sightline-head", lambda d: d["spec"]["ingress"].clear()),
        "the operator can't reach port 8265 of head",
    ),
    "a policy that stops a scrape": (
        other("NetworkPolicy", "sightline", lambda d: d["spec"]["ingress"][2]["ports"].pop(1)),
        "Prometheus can't reach port 8080 of cpu",
    ),
    "a policy that keeps the head from its state": (
        other("NetworkPolicy", "sightline-redis", lambda d: d["spec"]["ingress"].clear()),
        "head can't reach port 6379 of Redis",
    ),
    "a budget that can't be counted": (
        other("PodDisruptionBudget", "sightline-cpu", lambda d: d["spec"].update(minAvailable="50%")),
        "can be counted",
    ),
    "a budget that forbids every drain": (at(f"{CPU}/minReplicas", 1), "never lets a node be drained"),
    "a scrape of a port that no pod has": (
        other("PodMonitor", "sightline", lambda d: d["spec"]["podMetricsEndpoints"][0].update(port="metric")),
        "no pod has a port metric",
    ),
    "a scrape of a service that isn't there": (
        other(
            "ScrapeConfig",
            "sightline",
            lambda d: d["spec"].update(staticConfigs=[{"targets": ["sightline:8000"]}]),
        ),
        "its target isn't sightline-serve-svc.sightline.svc:8000",
    ),
    # The serve config.
    "a proxy on the head alone": (serve("proxy_location", "HeadOnly"), "proxy_location"),
    "a proxy that no pod reaches": (serve("http_options/host", "127.0.0.1"), "http_options.host"),
    "another port": (serve("http_options/port", 9000), "http_options.port"),
    "a field of ours misspelt": (serve(f"{MODEL}/encoder/num_gpu", 1), "num_gpu"),
    "a field of Serve's misspelt": (serve("applications/0/import", "x"), "import"),
    "a label that no group has": (
        serve(f"{MODEL}/encoder/label_selector", {"sightline/stage": "encoder"}),
        "encoder of Qwen/Qwen2-VL-72B-Instruct: no group",
    ),
    "more GPUs than a pod has": (serve(f"{MODEL}/encoder/num_gpus", 2), "no group has a pod"),
    "more replicas than the pods hold": (
        serve(f"{MODEL}/language_model/autoscaling/max_replicas", 5),
        "reserved at most",
    ),
    "a group of ranks of another size": (
        serve(f"{MODEL}/engine/tensor_parallel_size", 4),
        "tensor_parallel_size",
    ),
    "a model that nothing downloads": (serve(f"{MODEL}/engine/model", "/models/Other"), "/models/Other"),
    "a replica on the head": (serve(f"{MODEL}/preprocessor/num_cpus", 0), "on the head"),
    "an API key that no variable holds": (
        serve("applications/0/args/ingress/keys", [{"name": "default", "env": "KEY"}]),
        "no variable KEY",
    ),
}


#: Mistakes in the overlay multi-node, whose third group has the language models.
GENERATE = f"{RAY}/workerGroupSpecs/2"
OVER_HOSTS: dict[str, tuple[Plant, str]] = {
    "pods counted one by one": (at(f"{GENERATE}/numOfHosts", 1), "no group counts its pods by 2"),
    "more hosts than ranks": (serve(f"{MODEL}/language_model/hosts", 3), "no group counts its pods by 3"),
    "GPUs that no host has": (serve(f"{MODEL}/language_model/gpus_per_host", 8), "no group has a pod"),
    "GPUs said twice": (serve(f"{MODEL}/language_model/num_gpus", 8), "give only one"),
    "ranks said otherwise": (serve(f"{MODEL}/engine/tensor_parallel_size", 4), "but there are 2 x 4 GPUs"),
    "a model more than the pods hold": (serve(f"{MODEL}/language_model/num_replicas", 3), "reserved at most"),
    "a budget that lets two hosts go": (
        other("PodDisruptionBudget", "sightline-generate", lambda d: d["spec"].update(minAvailable=2)),
        "lets two pods go at once",
    ),
}


@pytest.mark.parametrize("mistake", OVER_HOSTS)
def test_a_mistake_over_hosts_is_caught(mistake):
    plant, message = OVER_HOSTS[mistake]
    found = documents("multi-node")
    plant(found)
    faults = all_faults(found)
    assert any(message in fault for fault in faults), faults


def test_over_hosts_there_is_no_fault_without_a_mistake():
    assert all_faults(documents("multi-node")) == []


#: Mistakes that only the operator's schema shows.
NEED_SCHEMA = {
    "a field misspelt",
    "a serve config that is no string",
    "a number in words",
    "a number as a string",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake):
    if mistake in NEED_SCHEMA:
        crd_schema()
    plant, message = MISTAKES[mistake]
    found = documents("cluster")
    plant(found)
    faults = all_faults(found)
    assert any(message in fault for fault in faults), faults


def test_without_a_mistake_there_is_no_fault():
    assert all_faults(documents("cluster")) == []
