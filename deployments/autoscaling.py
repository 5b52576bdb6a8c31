"""Numbers of replicas from what the stages have to do. Knows nothing of Ray.

Every stage scales by its own work, so that images grow preprocessors and encoders, and texts the language
model. A replica reports signals; a target is how much of a signal a replica should have, which is a bit less
than what it has in work when it is busy all the time. The signal that asks for the most replicas decides:

| stage | signal | unit | default target |
|---|---|---|---|
| all | ``requests`` | running and waiting requests; open streams at the ingress | ingress: 200 |
| preprocessor | ``megapixels`` | of images and frames that wait or are being prepared | 6 |
| encoder | ``visual_tokens`` | embedding rows of items that wait or are encoded | 2048 |
| language model | ``kv_usage`` | share of the KV blocks that running requests have | 0.7 |
| language model | ``waiting_tokens`` | known tokens of requests that wait for a slot | 4096 |
"""

import math
from collections.abc import Mapping
from typing import Any

#: Signals of each stage, with their default targets; None: counts only where a target is configured.
SIGNALS: dict[str, dict[str, float | None]] = {
    "ingress": {"requests": 200.0},
    "preprocessor": {"megapixels": 6.0, "requests": None},
    "encoder": {"visual_tokens": 2048.0, "requests": None},
    "language_model": {"kv_usage": 0.7, "waiting_tokens": 4096.0, "requests": None},
}

#: Requests that no replica has taken yet count like those that run, but not more than this many times over:
#: early in a burst the few that run say little about the rest.
_MOST_QUEUED = 3.0


def targets_of(stage: str, given: Mapping[str, float]) -> dict[str, float]:
    """The targets of a stage: the defaults, or ``given`` in their place; 0 turns a signal off.

    Raises:
        ValueError: the stage has no such signal, or a target is negative or no number.
    """
    known = SIGNALS[stage]
    for name, target in given.items():
        if name not in known:
            raise ValueError(f"the {stage} has no signal {name!r}; it has {', '.join(known)}")
        if not (isinstance(target, int | float) and 0 <= target < math.inf):
            raise ValueError(f"the target of {name} must be a number from 0 on, not {target!r}")
    chosen = {**known, **given}
    return {name: float(target) for name, target in chosen.items() if target}


def wanted(
    targets: Mapping[str, float], totals: Mapping[str, float], *, running: float = 0.0, queued: float = 0.0
) -> float:
    """Replicas that a stage should have, as a number that is yet to be rounded up.

    Args:
        targets: of each signal, per replica.
        totals: each signal, summed over all replicas.
        running: requests at replicas.
        queued: requests that no replica has taken.
    """
    requests = running + queued
    grown = min(1 + queued / max(running, 1.0), _MOST_QUEUED)
    signals = {name: total * grown for name, total in totals.items()} | {"requests": requests}
    most = max((signals.get(name, 0.0) / target for name, target in targets.items()), default=0.0)
    # A stage with work is never idle, however little its signals show between two reports.
    return max(most, 0.01) if requests > 0 else most


def autoscaling_config(stage: str, given: Mapping[str, Any], gang_size: int = 1) -> dict[str, Any]:
    """Ray Serve's ``autoscaling_config`` for a stage.

    Args:
        given: its fields, and ``targets``. ``target_ongoing_requests`` is the target of ``requests``. With a
            ``policy``, the fields stay as they are.
        gang_size: see :class:`StagePolicy`.

    Raises:
        ValueError: as :func:`targets_of`, ``targets`` are no mapping, or both ``targets`` and ``policy`` are
            given.
    """
    fields = dict(given)
    targets = fields.pop("targets", None) or {}
    if not isinstance(targets, Mapping):
        raise ValueError(
            f"targets must name signals and how much of each a replica should have, not {targets!r}"
        )
    targets = dict(targets)
    if "policy" in fields:
        if targets:
            raise ValueError("targets belong to this server's policy; leave out either them or policy")
        return fields
    if "target_ongoing_requests" in fields:
        targets.setdefault("requests", fields["target_ongoing_requests"])
    kwargs = {"targets": targets_of(stage, targets), "gang_size": gang_size}
    policy = {"policy_function": "deployments.autoscaling:StagePolicy", "policy_kwargs": kwargs}
    return {**fields, "policy": policy}


class StagePolicy:
    """Ray Serve's form of :func:`wanted`: a policy of ``autoscaling_config``.

    Serve applies the bounds, the delays and the factors of the configuration afterwards.

    Args:
        targets: per replica, or per gang.
        gang_size: replicas that stand for one: of a language model over several hosts, the first one of each
            gang has the requests and reports for all of it.
    """

    def __init__(self, targets: Mapping[str, float], gang_size: int = 1) -> None:
        self._targets = dict(targets)
        self._gang_size = gang_size

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """Return the replicas, and no state. ``ctx`` is a ``ray.serve.config.AutoscalingContext``."""
        reported: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
        totals = {name: sum(reported.get(name, {}).values()) for name in self._targets}
        queued = float(ctx.total_queued_requests or 0.0)
        running = max(float(ctx.total_num_requests) - queued, 0.0)
        return self._gang_size * wanted(self._targets, totals, running=running, queued=queued), {}
