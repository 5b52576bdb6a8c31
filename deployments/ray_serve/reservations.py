"""Finds reservations that no host of the Ray cluster can give: such replicas would wait forever."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray

from deployments.stage_config import StageConfig
from engine.errors import ConfigError

#: Label of nodes that an autoscaler or KubeRay has started.
_NODE_GROUP = "ray.io/node-group"


@dataclass(frozen=True, slots=True)
class Host:
    """Everything that one host of the cluster has, used or not."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


def known_hosts() -> list[Host]:
    """The hosts of the cluster that this process belongs to; empty where others may still be started.

    That is so without Ray, and in clusters that KubeRay or an autoscaler manages: hosts come later there.
    """
    if not ray.is_initialized():
        return []
    nodes = [node for node in ray.nodes() if node["Alive"]]
    hosts = [Host(node["Resources"], node["Labels"]) for node in nodes]
    return [] if any(_NODE_GROUP in host.labels for host in hosts) else hosts


def check_reservation(name: str, stage: StageConfig, hosts: Sequence[Host]) -> None:
    """Check that some host is large enough for one replica of a stage. What is in use doesn't matter.

    Args:
        name: the stage's, for messages.
        hosts: all hosts there will be; none if they aren't known.

    Raises:
        ConfigError: no host can give what a replica reserves.
    """
    if not hosts:
        return
    chosen = [host for host in hosts if _matches(host.labels, stage.label_selector)]
    if not chosen:
        raise ConfigError(
            f"{name}: label_selector is {stage.label_selector}, but no host of the cluster has such labels",
            param="label_selector",
        )
    wanted = {"num_cpus": ("CPU", stage.num_cpus), "num_gpus": ("GPU", stage.num_gpus)}
    wanted |= {f"resources.{kind}": (kind, amount) for kind, amount in stage.resources.items()}
    which = "of those with such labels" if stage.label_selector else "of the cluster"
    for field, (kind, amount) in wanted.items():
        most = max(host.resources.get(kind, 0) for host in chosen)
        if amount > most:
            raise ConfigError(
                f"{name}: {field} is {amount:g}, but no host {which} has more than {most:g}", param=field
            )
    if not any(all(host.resources.get(kind, 0) >= n for kind, n in wanted.values()) for host in chosen):
        amounts = ", ".join(f"{amount:g} {kind}" for kind, amount in wanted.values() if amount)
        raise ConfigError(f"{name}: a replica reserves {amounts}, but no host {which} has all of that")


def _matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Return whether labels fit a selector, whose values are ``a``, ``!a``, ``in(a,b)`` or ``!in(a,b)``."""
    for key, value in selector.items():
        listed = re.fullmatch(r"(!?)(?:in\((.*)\)|(.*))", value)
        assert listed is not None
        named = [listed[3]] if listed[2] is None else [each.strip() for each in listed[2].split(",")]
        if (labels.get(key) in named) == bool(listed[1]):
            return False
    return True
