"""Metrics as plain data, and their text form for Prometheus."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from prometheus_client import generate_latest
from prometheus_client.core import Metric

from engine.metrics import Histogram

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Family:
    """All values of one metric in one process: plain data, which may cross to another process.

    Attributes:
        name: with the unit, and ``_total`` where it is a counter.
        help: one sentence.
        samples: labels and value; the value of a histogram is what
            :meth:`engine.metrics.Histogram.snapshot` returns.
    """

    name: str
    kind: Kind
    help: str
    samples: list[tuple[dict[str, str], Any]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, kind: Kind, help: str, value: Any) -> Self:
        """A metric with one value and no labels."""
        return cls(name, kind, help, [({}, value)])


class Counter:
    """Counts by the values of fixed labels. Counted on one thread, or under a lock of the caller's.

    Args:
        known: values of the only label that are there from the start, with 0: Prometheus sees an increase
            only where it has seen a value before.
    """

    def __init__(self, name: str, help: str, *labels: str, known: Iterable[str] = ()) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._values: dict[tuple[str, ...], float] = {(value,): 0 for value in known}

    def add(self, *values: str, by: float = 1) -> None:
        """Add ``by``.

        Args:
            values: of the labels, in order. Never a client's text: each new value is kept forever.
        """
        self._values[values] = self._values.get(values, 0) + by

    def family(self) -> Family:
        samples = [
            (dict(zip(self._labels, values, strict=True)), value) for values, value in self._values.items()
        ]
        return Family(self._name, "counter", self._help, samples)


class Timer:
    """Histograms by the values of fixed labels.

    Args:
        known: values of the only label that are there from the start. Prometheus misses the first increase of
            a series that wasn't there before.
    """

    def __init__(
        self, name: str, help: str, *labels: str, bounds: Iterable[float], known: Iterable[str] = ()
    ) -> None:
        self._name, self._help, self._labels, self._bounds = name, help, labels, tuple(bounds)
        self._values: dict[tuple[str, ...], Histogram] = {}
        for value in known:
            self.of(value)

    def of(self, *values: str) -> Histogram:
        """The histogram of these labels' values; they are kept, as :meth:`Counter.add` says."""
        found = self._values.get(values)
        if found is None:
            found = self._values[values] = Histogram(self._bounds)
        return found

    def family(self) -> Family:
        samples: list[tuple[dict[str, str], Any]] = [
            (dict(zip(self._labels, values, strict=True)), histogram.snapshot())
            for values, histogram in self._values.items()
        ]
        return Family(self._name, "histogram", self._help, samples)


@dataclass(frozen=True, slots=True)
class Part:
    """The metrics of one process, with the labels that tell it from others."""

    labels: Mapping[str, str]
    families: list[Family]


def render(parts: Iterable[Part]) -> bytes:
    """The metrics of several processes in Prometheus' text form, each metric once."""
    metrics: dict[str, Metric] = {}
    for part in parts:
        for family in part.families:
            # The client library adds the suffix of counters again.
            name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
            metric = metrics.setdefault(family.name, Metric(name, family.help, family.kind))
            for labels, value in family.samples:
                _add(metric, family, {**part.labels, **labels}, value)
    return generate_latest(_Collected(metrics))  # type: ignore[arg-type]


def _add(metric: Metric, family: Family, labels: dict[str, str], value: Any) -> None:
    if family.kind != "histogram":
        metric.add_sample(family.name, labels, value)
        return
    below = 0
    for bound, count in value["buckets"].items():
        below += count
        metric.add_sample(f"{family.name}_bucket", labels | {"le": str(float(bound))}, below)
    metric.add_sample(f"{family.name}_bucket", labels | {"le": "+Inf"}, value["count"])
    metric.add_sample(f"{family.name}_count", labels, value["count"])
    metric.add_sample(f"{family.name}_sum", labels, value["sum"])


class _Collected:
    """The form in which the client library takes metrics that were collected elsewhere."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics.values()
