"""Faults of rendered manifests: each function returns sentences, none if all is well."""

import copy
import json
import re
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

from tests.k8s.tools import rayservice

Document = dict[str, Any]

#: Secrets that users make, with the key that is read.
SECRETS = {"huggingface": "token", "sightline-keys": "default", "sightline-redis": "password"}

#: Variables that the operator sets from fields of its own.
_OPERATORS_OWN = (
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "REDIS_USERNAME",
    "RAY_enable_autoscaler_v2",
    "RAY_gcs_storage",
)

#: Fields behind feature gates of the operator that are off by default.
_GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")


def cluster(service: Document) -> Document:
    return service["spec"]["rayClusterConfig"]


def groups(service: Document) -> list[Document]:
    return cluster(service).get("workerGroupSpecs") or []


def pods(service: Document) -> Iterator[tuple[str, Document]]:
    """The pod templates of the head and of each group, by name."""
    yield "head", cluster(service)["headGroupSpec"]["template"]
    for group in groups(service):
        yield group["groupName"], group["template"]


def container(template: Document) -> Document:
    """The container that runs Ray: the first."""
    return template["spec"]["containers"][0]


def reservable(group: Document, kind: str) -> float:
    """The amount of a resource that a pod's replicas may reserve: ``rayStartParams``, else the request.

    Args:
        kind: ``cpu`` or ``nvidia.com/gpu``.
    """
    said = (group.get("rayStartParams") or {}).get({"cpu": "num-cpus", "nvidia.com/gpu": "num-gpus"}[kind])
    return number(said or container(group["template"])["resources"]["requests"].get(kind, 0))


def environment(found: list[Document], template: Document) -> dict[str, Any]:
    """The variables of a pod's Ray container. The value of one that a Secret holds is None."""
    maps = {each["metadata"]["name"]: each["data"] for each in found if each["kind"] == "ConfigMap"}
    values: dict[str, Any] = {}
    for source in container(template).get("envFrom", ()):
        values |= maps.get(source["configMapRef"]["name"], {})
    for variable in container(template).get("env", ()):
        values[variable["name"]] = variable.get("value")
    return values


def schema_faults(service: Document, schema: Document) -> list[str]:
    """Fields that the operator's schema doesn't know or allow."""
    import jsonschema

    errors = jsonschema.Draft7Validator(schema).iter_errors(service)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def builtin_faults(found: list[Document]) -> list[str]:
    """Fields that Kubernetes doesn't know or allow, in its own kinds and in the pods of the RayService."""
    faults = []
    for document in [*found, *_as_pods(rayservice(found))]:
        if document["apiVersion"].split("/")[0] not in ("ray.io", "monitoring.coreos.com"):
            faults += _builtin_faults(json.dumps(document))
    return faults


@cache
def _builtin_faults(text: str) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kubernetes_validate

    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, "1.37", strict=True)
    except Exception as error:
        return (f"{document['kind']} {document['metadata']['name']}: {str(error)[:300]}",)
    return ()


def _as_pods(service: Document) -> Iterator[Document]:
    for name, template in pods(service):
        metadata = {"name": name, **template.get("metadata", {})}
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": metadata,
            "spec": copy.deepcopy(template["spec"]),
        }


def operator_faults(service: Document) -> list[str]:
    """Mistakes that KubeRay 1.7 refuses while it runs, though its schema allows it."""
    spec, name = service["spec"], service["metadata"]["name"]
    config = cluster(service)
    autoscaled = config.get("enableInTreeAutoscaling") is True
    second = (config.get("autoscalerOptions") or {}).get("version") == "v2"
    faults = []
    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        faults.append(f"the name {name!r} is no DNS label of at most 47 characters")
    if "upgradeStrategy" in config:
        faults.append("rayClusterConfig.upgradeStrategy: only the RayService has one")
    faults += [f"{field} needs a feature gate that is off by default" for field in _GATED if field in config]
    if (config.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb":
        faults.append("the backend rocksdb needs a feature gate that is off by default")
    authentication = config.get("authOptions") or {}
    if authentication.get("mode") == "token" and not config.get("rayVersion"):
        faults.append("authOptions.mode token needs rayVersion")
    if authentication.get("enableK8sTokenAuth"):
        faults.append("enableK8sTokenAuth is not for a RayService")
    ports = container(config["headGroupSpec"]["template"]).get("ports", ())
    if not any(port.get("name", "").startswith("serve") for port in ports):
        faults.append("the head names no port serve, so there will be no service for requests")
    for group in [config["headGroupSpec"], *groups(service)]:
        faults += _group_faults(group, autoscaled, second)
    names = [group["groupName"] for group in groups(service)]
    if len(set(names)) < len(names):
        faults.append("two groups have one name")
    return [*faults, *_upgrade_faults(spec, autoscaled)]


def _group_faults(group: Document, autoscaled: bool, second: bool) -> Iterator[str]:
    name = group.get("groupName", "head")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield f"{name}: resources in two places"
    if "labels" in parameters:
        yield f"{name}: labels belong into the group's field labels"
    if autoscaled and second and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield f"{name}: autoscaler v2 wants restartPolicy Never"
    if not second and ("idleTimeoutSeconds" in group or group.get("priority")):
        yield f"{name}: idleTimeoutSeconds and priority need autoscaler v2"
    if group.get("minReplicas", 0) > group.get("maxReplicas", 2**31 - 1):
        yield f"{name}: minReplicas above maxReplicas"
    if name != "head" and not group.get("minReplicas", 0) <= group.get("replicas", 1) <= group["maxReplicas"]:
        yield f"{name}: replicas outside of minReplicas and maxReplicas"
    for variable in container(group["template"]).get("env", ()):
        if variable["name"] in _OPERATORS_OWN:
            yield f"{name}: the variable {variable['name']} is the operator's"


def _upgrade_faults(spec: Document, autoscaled: bool) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy.type {strategy['type']!r} is unknown"
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions") or {}
    surge = options.get("maxSurgePercent", 100)
    if not autoscaled:
        yield "an incremental upgrade needs the autoscaler"
    if not 0 < options.get("stepSizePercent", 0) <= surge <= 100 or options.get("intervalSeconds", 0) < 1:
        yield "clusterUpgradeOptions: 0 < stepSizePercent <= maxSurgePercent <= 100, and an interval"


def loss_faults(found: list[Document]) -> list[str]:
    """Settings with which pods lose requests, or are never ready."""
    service = rayservice(found)
    spec, faults = service["spec"], []
    hardened = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    graces = []
    for name, template in pods(service):
        pod, ray, values = template["spec"], container(template), environment(found, template)
        grace = pod.get("terminationGracePeriodSeconds", 30)
        graces.append(grace)
        drain = float(values.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        if drain >= grace:
            faults.append(f"{name}: drains for {drain:.0f} s but is killed after {grace} s")
        if ray["resources"]["limits"].get("memory") != ray["resources"]["requests"].get("memory"):
            faults.append(f"{name}: memory requested isn't its limit")
        if "cpu" in ray["resources"]["limits"]:
            faults.append(f"{name}: a CPU limit throttles event loops")
        store = float(
            number((_group(service, name).get("rayStartParams") or {}).get("object-store-memory", 0))
        )
        if not 0 < store <= number(ray["resources"]["limits"]["memory"]) / 2:
            faults.append(f"{name}: the object store must be set, and fit into half of the memory")
        if ray.get("securityContext") != hardened or not pod.get("securityContext", {}).get("runAsNonRoot"):
            faults.append(f"{name}: not hardened")
    if float(values.get("RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", 120)) < max(graces):
        faults.append("HAProxy's hard stop cuts streams that a pod's termination would let end")
    if spec.get("rayClusterDeletionDelaySeconds", 60) < max(graces):
        faults.append("the old cluster is deleted before its longest stream may have ended")
    for group in groups(service):
        name, ray = group["groupName"], container(group["template"])
        probe = ray.get("readinessProbe", {})
        if probe.get("httpGet", {}).get("path") != "/-/healthz":
            faults.append(f"{name}: the readiness probe must ask Serve's proxy")
        if probe.get("timeoutSeconds", 1) < 5 or probe.get("failureThreshold", 3) < 2:
            faults.append(f"{name}: one slow answer of the proxy takes the pod out of the service")
        if "maxReplicas" not in group:
            faults.append(f"{name}: maxReplicas without a bound")
        if ray["resources"]["limits"].get("nvidia.com/gpu") and not group["template"]["spec"].get(
            "tolerations"
        ):
            faults.append(f"{name}: GPU nodes are tainted, and nothing is tolerated")
    return faults


def _group(service: Document, name: str) -> Document:
    named = {group["groupName"]: group for group in groups(service)}
    return named.get(name) or cluster(service)["headGroupSpec"]


def number(quantity: str | int) -> float:
    """A quantity of Kubernetes, such as ``200m`` or ``6Gi``."""
    match = re.fullmatch(r"([0-9.]+)(m|[KMGT]i?)?", str(quantity))
    assert match, quantity
    scale = {None: 1.0, "m": 1e-3} | {f"{c}i": 2.0 ** (10 * i) for i, c in enumerate("KMGT", 1)}
    scale |= {c: 10.0 ** (3 * i) for i, c in enumerate("KMGT", 1)}
    return float(match[1]) * scale[match[2]]


def reference_faults(found: list[Document]) -> list[str]:
    """Names that lead nowhere."""
    service = rayservice(found)
    named: dict[str, set[str]] = {}
    for document in found:
        named.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    named["Secret"] = set(SECRETS)
    faults = []
    templates = [*pods(service)]
    templates += [
        (f"{d['kind']} {d['metadata']['name']}", d["spec"]["template"])
        for d in found
        if "template" in d.get("spec", {})
    ]
    for name, template in templates:
        for kind, reference in _references(template["spec"]):
            if reference not in named.get(kind, ()):
                faults.append(f"{name}: there is no {kind} {reference}")
        for each in template["spec"]["containers"]:
            for variable in each.get("env", ()):
                secret = variable.get("valueFrom", {}).get("secretKeyRef")
                if secret and SECRETS.get(secret["name"]) != secret["key"]:
                    faults.append(f"{name}: the Secret {secret['name']} has no key {secret['key']}")
            if ":" not in each["image"]:
                faults.append(f"{name}: the image {each['image']} has no tag")
            volumes = {volume["name"] for volume in template["spec"].get("volumes", ())} | {
                claim["metadata"]["name"]
                for d in found
                if d["kind"] == "StatefulSet" and d["spec"]["template"] is template
                for claim in d["spec"].get("volumeClaimTemplates", ())
            }
            if missing := {mount["name"] for mount in each.get("volumeMounts", ())} - volumes:
                faults.append(f"{name}: there is no volume {missing.pop()}")
    if len({container(template)["image"] for _, template in pods(service)}) > 1:
        faults.append("head and workers run different images")
    if len({str(container(template).get("envFrom")) for _, template in pods(service)}) > 1:
        faults.append("head and workers have different environments")
    faults += [
        f"{document['kind']} {document['metadata']['name']} has no namespace"
        for document in found
        if document["kind"] not in ("Namespace", "PriorityClass") and "namespace" not in document["metadata"]
    ]
    address = (
        (cluster(service).get("gcsFaultToleranceOptions") or {}).get("redisAddress", "").partition(":")[0]
    )
    if address and address not in named.get("Service", ()):
        faults.append(f"there is no Service {address} for the head's state")
    return [*faults, *_selector_faults(found), *_scrape_faults(found)]


def _scrape_faults(found: list[Document]) -> Iterator[str]:
    """Scrapes of ports, services and keys that don't exist."""
    service = rayservice(found)
    ports = {
        port["name"]: port["containerPort"] for _, pod in pods(service) for port in container(pod)["ports"]
    }
    for document in found:
        spec, name = document.get("spec", {}), f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "PodMonitor":
            for endpoint in spec["podMetricsEndpoints"]:
                if endpoint["port"] not in ports:
                    yield f"{name}: no pod has a port {endpoint['port']}"
        if document["kind"] == "ScrapeConfig":
            # The operator names the service after the RayService.
            metadata = service["metadata"]
            target = f"{metadata['name']}-serve-svc.{metadata['namespace']}.svc:{ports['serve']}"
            if spec["staticConfigs"] != [{"targets": [target]}]:
                yield f"{name}: its target isn't {target}"
            key = spec["authorization"]["credentials"]
            if SECRETS.get(key["name"]) != key["key"]:
                yield f"{name}: the Secret {key['name']} has no key {key['key']}"


def _references(pod: Document) -> Iterator[tuple[str, str]]:
    if "priorityClassName" in pod:
        yield "PriorityClass", pod["priorityClassName"]
    for volume in pod.get("volumes", ()):
        if claim := volume.get("persistentVolumeClaim"):
            yield "PersistentVolumeClaim", claim["claimName"]
    for each in pod["containers"]:
        for source in each.get("envFrom", ()):
            yield "ConfigMap", source["configMapRef"]["name"]
        for variable in each.get("env", ()):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                yield "Secret", secret["name"]


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Return whether a selector of Kubernetes takes an object with these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", expression
        wanted = wanted and labels.get(expression["key"]) in expression["values"]
    return wanted


def operators_labels(name: str) -> dict[str, str]:
    """The labels that the operator adds to pods of the head or a group."""
    kind = ("headgroup", "head") if name == "head" else (name, "worker")
    return {"ray.io/is-ray-node": "yes", "ray.io/group": kind[0], "ray.io/node-type": kind[1]}


def _selector_faults(found: list[Document]) -> Iterator[str]:
    """Selectors that no pod of these manifests matches, and budgets that forbid every drain."""
    service = rayservice(found)
    labels = [template["metadata"]["labels"] | operators_labels(name) for name, template in pods(service)]
    labels += [d["spec"]["template"]["metadata"]["labels"] for d in found if "template" in d.get("spec", {})]
    for document in found:
        spec, name = document.get("spec", {}), f"{document['kind']} {document['metadata']['name']}"
        wanted = {
            "PodDisruptionBudget": spec.get("selector"),
            "NetworkPolicy": spec.get("podSelector"),
            "PodMonitor": spec.get("selector"),
            "Service": {"matchLabels": spec.get("selector")},
        }.get(document["kind"])
        if wanted and not any(wanted["matchLabels"].items() <= each.items() for each in labels):
            yield f"{name} selects no pod"
        if document["kind"] == "PodDisruptionBudget":
            group = spec["selector"]["matchLabels"].get("ray.io/group")
            hosts = {each["groupName"]: each.get("numOfHosts", 1) for each in groups(service)}.get(group, 1)
            fewest = hosts * {each["groupName"]: each.get("minReplicas", 0) for each in groups(service)}.get(
                group, 0
            )
            if not isinstance(spec.get("minAvailable"), int):
                yield f"{name}: RayCluster can't be scaled, so only a number in minAvailable can be counted"
            elif spec["minAvailable"] >= fewest:
                yield f"{name} never lets a node be drained"
            elif hosts > 1 and spec["minAvailable"] < fewest - 1:
                yield f"{name} lets two pods go at once: of two models, each of which needs all of its hosts"
