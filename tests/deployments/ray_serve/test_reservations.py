"""Reservations that no host can give are refused before anything is deployed."""

import pytest

from deployments.ray_serve.reservations import Host, check_reservation, known_hosts
from deployments.stage_config import LanguageModelConfig
from engine.errors import ConfigError

HOSTS = [
    Host({"CPU": 2.0, "GPU": 4.0, "memory": 1e9}, {"kind": "large", "zone": "a"}),
    Host({"CPU": 32.0, "disk": 1.0}, {"kind": "small", "zone": "b"}),
]


def check(fields: dict, hosts: list[Host] = HOSTS) -> None:
    check_reservation("LanguageModel of pocket", LanguageModelConfig(**fields), hosts)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_gpus": 4, "num_cpus": 2},
        {"num_gpus": 0.5},
        {"num_cpus": 32, "resources": {"disk": 0.5}},
        {"hosts": 2, "num_gpus": 4},
        {"num_gpus": 1, "label_selector": {"kind": "in(large, huge)", "zone": "!b"}},
        {"num_cpus": 8, "label_selector": {"kind": "!in(large,huge)"}},
        {"label_selector": {"other": "!a"}},
    ],
)
def test_what_one_host_can_give_is_accepted(fields):
    check(fields)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_gpus": 8}, "num_gpus", "is 8, but no host of the cluster has more than 4"),
        ({"num_cpus": 33}, "num_cpus", "no host of the cluster has more than 32"),
        ({"resources": {"tape": 1}}, "resources.tape", "has more than 0"),
        (
            {"num_cpus": 8, "num_gpus": 1},
            None,
            "reserves 8 CPU, 1 GPU, but no host of the cluster has all of that",
        ),
        ({"label_selector": {"kind": "medium"}}, "label_selector", "no host of the cluster has such labels"),
        (
            {"label_selector": {"kind": "!in(large,small)"}},
            "label_selector",
            "no host of the cluster has such",
        ),
        (
            {"num_gpus": 1, "label_selector": {"zone": "b"}},
            "num_gpus",
            "no host of those with such labels has more than 0",
        ),
    ],
)
def test_what_no_host_can_give_is_refused_by_its_name(fields, param, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check(fields)
    assert caught.value.param == param and "LanguageModel of pocket: " in str(caught.value)


def test_nothing_is_refused_where_hosts_may_come_later(monkeypatch):
    check({"num_gpus": 8}, [])
    nodes = [{"Alive": True, "Resources": {"CPU": 1.0}, "Labels": {}}]
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {}, "Labels": {}}])
    assert known_hosts() == [Host({"CPU": 1.0}, {})]
    nodes.append({"Alive": True, "Resources": {}, "Labels": {"ray.io/node-group": "gpu"}})
    assert known_hosts() == []
