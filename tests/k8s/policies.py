"""Connections that the network policies must allow, or forbid, by Kubernetes's rules for policies."""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from tests.k8s.checks import Document, cluster, container, groups, operators_labels, pods, selects
from tests.k8s.serving_checks import app_config, fits
from tests.k8s.tools import rayservice

#: Labels of namespaces.
_OURS = {"kubernetes.io/metadata.name": "sightline"}
_CLIENTS = {"kubernetes.io/metadata.name": "web", "sightline/clients": "allowed"}
_STRANGERS = {"kubernetes.io/metadata.name": "web"}

#: A port of Ray, of gRPC or of a rank: chosen when its process starts.
_CHOSEN = 41234


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection.

    Attributes:
        name: for messages.
        labels: of the pod; None outside of the cluster.
        namespace: labels of its namespace.
        address: outside of the cluster.
    """

    name: str
    labels: dict[str, str] | None = None
    namespace: dict[str, str] | None = None
    address: str = ""


_DNS = Peer("the DNS", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
_OPERATOR = Peer(
    "the operator",
    {"app.kubernetes.io/name": "kuberay-operator"},
    {"kubernetes.io/metadata.name": "kuberay-system"},
)
_MONITOR = Peer("Prometheus", {}, {"kubernetes.io/metadata.name": "monitoring"})
_WEB = Peer("a public address", address="93.184.216.34")
_INSIDE = Peer("the cluster's inside", address="10.1.2.3")
_METADATA = Peer("the cloud's metadata", address="169.254.169.254")


def policy_faults(found: list[Document]) -> list[str]:
    """Connections that the policies of ``found`` wrongly forbid or allow; none without policies."""
    policies = [document["spec"] for document in found if document["kind"] == "NetworkPolicy"]
    if not policies:
        return []
    faults = []
    for allowed, source, target, port in _connections(found):
        if _passes(policies, source, target, port) != allowed:
            verb = "can't" if allowed else "can"
            faults.append(f"network policies: {source.name} {verb} reach port {port} of {target.name}")
    return faults


def _connections(found: list[Document]) -> Iterator[tuple[bool, Peer, Peer, int]]:
    """Whether a connection must pass, its source, its target and the port."""
    service = rayservice(found)
    ours = {
        name: Peer(name, template["metadata"]["labels"] | operators_labels(name), _OURS)
        for name, template in pods(service)
    }
    head, workers = ours["head"], [pod for name, pod in ours.items() if name != "head"]
    for source in ours.values():
        yield from ((True, source, target, _CHOSEN) for target in ours.values())
        yield True, source, _DNS, 53
        yield False, source, _INSIDE, 80
        yield False, source, _METADATA, 80
    for target in workers:
        yield True, Peer("a client", {}, _CLIENTS), target, 8000
        yield False, Peer("a stranger", {}, _STRANGERS), target, 8000
        yield False, Peer("a client", {}, _CLIENTS), target, _CHOSEN
    yield True, _OPERATOR, head, 8265
    yield False, Peer("a client", {}, _CLIENTS), head, 8265
    fetching = {
        group["groupName"]
        for model in app_config(service).models
        for group in groups(service)
        if fits(model.preprocessor, group)
    }
    for name, pod in ours.items():
        if name != "head":
            yield name in fetching, pod, _WEB, 443
    yield from _monitored(found, ours)
    if options := cluster(service).get("gcsFaultToleranceOptions"):
        (redis,) = (document for document in found if document["kind"] == "StatefulSet")
        store = Peer("Redis", redis["spec"]["template"]["metadata"]["labels"], _OURS)
        yield True, head, store, int(options["redisAddress"].partition(":")[2])
        yield False, Peer("a client", {}, _CLIENTS), store, 6379


def _monitored(found: list[Document], ours: dict[str, Peer]) -> Iterator[tuple[bool, Peer, Peer, int]]:
    """Scrapes of the pods' own ports, and of the service's."""
    templates = dict(pods(rayservice(found)))
    for document in found:
        if document["kind"] == "PodMonitor":
            scraped = {endpoint["port"] for endpoint in document["spec"]["podMetricsEndpoints"]}
            for name, template in templates.items():
                for port in container(template)["ports"]:
                    if port["name"] in scraped:
                        yield True, _MONITOR, ours[name], port["containerPort"]
        if document["kind"] == "ScrapeConfig":
            yield from ((True, _MONITOR, pod, 8000) for name, pod in ours.items() if name != "head")


def _passes(policies: list[Document], source: Peer, target: Peer, port: int) -> bool:
    """Return whether the policies of both ends let a TCP connection pass; the DNS is asked by TCP too."""
    return _side(policies, "Egress", source, target, port) and _side(
        policies, "Ingress", target, source, port
    )


def _side(policies: list[Document], side: str, own: Peer, other: Peer, port: int) -> bool:
    if own.labels is None or own.namespace != _OURS:
        return True
    chosen = [
        p for p in policies if side in p["policyTypes"] and selects(p.get("podSelector", {}), own.labels)
    ]
    rules = [rule for policy in chosen for rule in policy.get(side.lower(), ())]
    return not chosen or any(_allows(rule, side, other, port) for rule in rules)


def _allows(rule: Document, side: str, other: Peer, port: int) -> bool:
    ports = [p["port"] for p in rule.get("ports", ()) if p.get("protocol", "TCP") == "TCP"]
    if "ports" in rule and port not in ports:
        return False
    peers = rule.get("from" if side == "Ingress" else "to")
    return peers is None or any(_is(peer, other) for peer in peers)


def _is(peer: Document, other: Peer) -> bool:
    """Return whether ``other`` is one of a rule's peers."""
    if block := peer.get("ipBlock"):
        if not other.address:
            return False
        address = ip_address(other.address)
        return address in ip_network(block["cidr"]) and not any(
            address in ip_network(each) for each in block.get("except", ())
        )
    if other.labels is None or other.namespace is None:
        return False
    if "namespaceSelector" in peer:
        inside = selects(peer["namespaceSelector"], other.namespace)
    else:
        inside = other.namespace == _OURS
    return inside and selects(peer.get("podSelector", {}), other.labels)
