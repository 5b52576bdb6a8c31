"""Metrics of several processes in Prometheus' text form."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics.families import Counter, Family, Part, Timer, render
from deployments.metrics.stage import StageMeter, outcome
from engine.errors import InvalidRequest, Unavailable
from engine.metrics import COUNT_BUCKETS, Histogram


def samples(parts: list[Part]) -> dict[tuple, float]:
    """Values by the sample's name and labels, as Prometheus' own parser reads them."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(render(parts).decode())
        for sample in family.samples
    }


def test_processes_keep_apart_and_a_metric_is_described_once():
    counters = [Counter("sightline_things_total", "Things.", "kind") for _ in range(2)]
    counters[0].add('a"b\\\n')
    counters[1].add("c", by=2.5)
    parts = [Part({"replica": str(i)}, [counter.family()]) for i, counter in enumerate(counters)]
    assert samples(parts) == {
        ("sightline_things_total", ("kind", 'a"b\\\n'), ("replica", "0")): 1,
        ("sightline_things_total", ("kind", "c"), ("replica", "1")): 2.5,
    }
    text = render(parts).decode()
    assert text.count("# TYPE sightline_things_total counter") == text.count("# HELP") == 1


def test_buckets_of_a_histogram_hold_those_below():
    timer = Timer("sightline_wait_seconds", "Waits.", "stage", bounds=(1, 2.5))
    for value in (0.5, 1.0, 2.0, 9.0):
        timer.of("x").observe(value)
    found = samples([Part({}, [timer.family()])])
    stage = ("stage", "x")
    name = "sightline_wait_seconds"
    buckets = {bound: found[(f"{name}_bucket", ("le", bound), stage)] for bound in ("1.0", "2.5", "+Inf")}
    assert buckets == {"1.0": 2, "2.5": 3, "+Inf": 4}
    assert found[(f"{name}_count", stage)] == 4 and found[(f"{name}_sum", stage)] == 12.5


def test_a_metric_without_samples_is_described():
    assert render([Part({}, [Counter("sightline_none_total", "None.", "kind").family()])]).decode() == (
        "# HELP sightline_none_total None.\n# TYPE sightline_none_total counter\n"
    )
    known = Counter("sightline_none_total", "None.", "kind", known=("a",)).family()
    assert samples([Part({}, [known])]) == {("sightline_none_total", ("kind", "a")): 0}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, "ok"),
        (InvalidRequest("no"), "refused"),
        (Unavailable("gone"), "failed"),
        (ZeroDivisionError(), "failed"),
        (asyncio.CancelledError(), "cancelled"),
        (GeneratorExit(), "cancelled"),
    ],
)
def test_the_outcome_of_a_request(error, expected):
    assert outcome(error) == expected


def test_a_stage_counts_a_request_while_it_runs_and_when_it_fails():
    meter = StageMeter("stage", lambda: 7, Histogram(COUNT_BUCKETS).snapshot)

    def value(name: str, **labels: str) -> float:
        return samples([Part({}, meter.families())])[(f"sightline_stage_{name}", *labels.items())]

    with pytest.raises(InvalidRequest), meter.request():
        assert value("running_requests") == 1
        raise InvalidRequest("no")
    meter.count_bytes(3, 4)
    assert value("running_requests") == 0
    assert value("requests_total", outcome="refused") == 1 and value("requests_total", outcome="ok") == 0
    assert value("request_duration_seconds_count") == 1
    assert value("queue_length") == 7
    assert (value("received_bytes_total"), value("sent_bytes_total")) == (3, 4)


def test_help_and_type_of_a_family_are_those_of_its_kind():
    text = render([Part({}, [Family.of("sightline_size_bytes", "gauge", "A size.", 3)])]).decode()
    assert text.splitlines() == [
        "# HELP sightline_size_bytes A size.",
        "# TYPE sightline_size_bytes gauge",
        "sightline_size_bytes 3.0",
    ]
