"""A day of traffic against the autoscaling policy: GPU-hours and missed SLOs beside fixed replicas.

    python -m benchmarks.autoscaling_sim [--trace bursts,tenants,nightly] [--json FILE]

The policy is that of :mod:`deployments.autoscaling`, with Ray Serve's own delays. The stages are a fluid
model: each has a rate per replica, a queue, and a time that a new replica takes to start. A request misses
its SLO if its waits in all stages add up to more than ``--slo`` seconds.

Traces: ``bursts`` has steady texts and bursts of images; ``tenants`` has three customers in different time
zones, one of them with images only; ``nightly`` is idle for most of the day, with scale to zero.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ray.serve.autoscaling_policy import _apply_delay_logic, _apply_scaling_factors
from ray.serve.config import AutoscalingConfig

from deployments.autoscaling import StagePolicy, targets_of

#: Seconds of a step, and between two decisions.
STEP, DECIDE = 2, 10
DAY = 24 * 3600

#: An image, and a request: megapixels, embedding rows, tokens of the text and of the answer.
MEGAPIXELS, ROWS, TEXT, ANSWER = 2.0, 1200, 300, 250

#: Tokens a second of one answer, and tokens that the KV blocks of a replica hold.
ANSWER_RATE, KV_TOKENS = 40.0, 120_000


@dataclass(frozen=True)
class Kind:
    """A stage: work per second of a replica, seconds of one item alone and of a replica's start, GPUs."""

    name: str
    rate: float
    alone: float
    start: float
    gpus: float
    most: int


PREPROCESSOR = Kind("preprocessor", 40.0, 0.2, 6.0, 0.0, 32)
ENCODER = Kind("encoder", 40_000.0, 0.03, 30.0, 0.25, 16)
LANGUAGE_MODEL = Kind("language_model", 0.0, ANSWER / ANSWER_RATE, 60.0, 1.0, 16)
KINDS = (PREPROCESSOR, ENCODER, LANGUAGE_MODEL)


@dataclass
class Replicas:
    """The replicas of a stage, scaled by the policy or fixed."""

    kind: Kind
    fixed: int | None
    least: int
    config: AutoscalingConfig = field(init=False)
    ready: int = 0
    starting: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.config = AutoscalingConfig(
            min_replicas=self.least, max_replicas=self.kind.most, upscale_delay_s=5, downscale_delay_s=180
        )
        self.policy = StagePolicy(targets_of(self.kind.name, {}))
        self.state: dict = {}
        self.ready = self.least if self.fixed is None else self.fixed
        self.history: deque[tuple[float, dict[str, float]]] = deque()

    def advance(self, now: float) -> None:
        self.ready += sum(due <= now for due in self.starting)
        self.starting = [due for due in self.starting if due > now]
        self.seconds += (self.ready + len(self.starting)) * STEP

    def decide(self, now: float, signals: Mapping[str, float], requests: float) -> None:
        """Take in the signals, summed over all replicas, and scale."""
        self.history.append((now, {**signals, "requests": requests}))
        while self.history[0][0] < now - self.config.look_back_period_s:
            self.history.popleft()
        if self.fixed is not None:
            return
        names = self.history[-1][1].keys()
        mean = {name: sum(h[1][name] for h in self.history) / len(self.history) for name in names}
        current = self.ready + len(self.starting)
        running = mean.pop("requests")
        # Requests that wait for the first replica are in Serve's handles.
        queued = requests if not self.ready else 0.0
        ctx = SimpleNamespace(
            aggregated_metrics={name: {0: value} for name, value in mean.items()},
            total_num_requests=running + queued,
            total_queued_requests=queued,
        )
        desired = _apply_scaling_factors(self.policy(ctx)[0], current, self.config)
        if current:
            desired, self.state = _apply_delay_logic(desired, current, self.config, self.state, _now=now)
        desired = min(max(desired, self.least), self.kind.most)
        while desired > self.ready + len(self.starting):
            self.starting.append(now + self.kind.start)
        while desired < self.ready + len(self.starting):
            if self.starting:
                self.starting.pop()
            else:
                self.ready -= 1


def trace(name: str, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Requests with text and with an image that arrive in each step."""
    rng = np.random.default_rng(seed)
    t = np.arange(0, DAY, STEP)
    day = 0.5 - 0.5 * np.cos(2 * np.pi * t / DAY)
    texts, images = np.zeros(len(t)), np.zeros(len(t))
    if name == "bursts":
        texts += 8 + 0 * t
        images += 1.0
        for start in rng.choice(DAY - 3600, 8, replace=False):
            during = (t >= start) & (t < start + rng.integers(300, 1800))
            images[during] += rng.uniform(20, 60)
    elif name == "tenants":
        for shift, text, image in ((0, 40, 2), (DAY // 3, 25, 5), (DAY // 2, 0, 30)):
            load = np.roll(day, shift // STEP) ** 2
            texts += text * load
            images += image * load
    else:
        busy = (t >= 2 * 3600) & (t < 5 * 3600)
        texts[busy] += 10
        images[busy] += 15
    return rng.poisson(texts * STEP), rng.poisson(images * STEP)


def simulate(
    arrivals: tuple[np.ndarray, np.ndarray], fixed: Mapping[str, int] | None, least: int, slo: float
) -> dict[str, float]:
    """A day with ``fixed`` replicas of each stage, or with the policy and at least ``least``."""
    stages = {kind.name: Replicas(kind, fixed[kind.name] if fixed else None, least) for kind in KINDS}
    pre, enc, lm = (stages[kind.name] for kind in KINDS)
    pixels = rows = waiting = running = missed = total = 0.0
    answer_s = LANGUAGE_MODEL.alone
    for step, (text, image) in enumerate(zip(*(each.tolist() for each in arrivals), strict=True)):
        now = float(step * STEP)
        for stage in stages.values():
            stage.advance(now)
        # Each stage takes what the one before has finished.
        pixels += image * MEGAPIXELS
        done = min(pixels, PREPROCESSOR.rate * pre.ready * STEP)
        pixels -= done
        rows += done / MEGAPIXELS * ROWS
        encoded = min(rows, ENCODER.rate * enc.ready * STEP)
        rows -= encoded
        waiting += text + encoded / ROWS
        # Tokens of a request, images included: the share of images is that of what arrives now.
        tokens = TEXT + ANSWER + ROWS * (encoded / ROWS) / max(text + encoded / ROWS, 1)
        room = max(0.0, KV_TOKENS * lm.ready / tokens - running)
        entered = min(waiting, room)
        waiting -= entered
        running += entered
        ended = running * min(1.0, STEP / answer_s)
        running -= ended
        wait_pre = pixels / max(PREPROCESSOR.rate * pre.ready, 1e-9)
        wait_enc = rows / max(ENCODER.rate * enc.ready, 1e-9)
        wait_lm = waiting / max(KV_TOKENS * lm.ready / tokens / answer_s, 1e-9)
        total += text + image
        missed += text * (wait_lm > slo) + image * (wait_pre + wait_enc + wait_lm > slo)
        if now % DECIDE == 0:
            in_pre = pixels + done / STEP * PREPROCESSOR.alone
            in_enc = rows + encoded / STEP * ENCODER.alone
            pre.decide(now, {"megapixels": in_pre}, in_pre / MEGAPIXELS)
            enc.decide(now, {"visual_tokens": in_enc}, in_enc / ROWS)
            usage = running * tokens / KV_TOKENS
            signals = {"kv_usage": usage, "waiting_tokens": waiting * (tokens - ANSWER)}
            lm.decide(now, signals, running + waiting)
    return {
        **{f"{name} replicas": stage.seconds / DAY for name, stage in stages.items()},
        "GPU hours": sum(stage.seconds * stage.kind.gpus for stage in stages.values()) / 3600,
        "missed %": 100 * missed / max(total, 1),
    }


def compare(name: str, slo: float) -> dict[str, dict[str, float]]:
    """The policy, fixed replicas of the same mean, and the fewest fixed replicas that miss no more."""
    arrivals = trace(name)
    scaled = simulate(arrivals, None, 0 if name == "nightly" else 1, slo)
    mean = {kind.name: max(1, math.ceil(scaled[f"{kind.name} replicas"])) for kind in KINDS}
    rows = {"policy": scaled, "fixed, same mean": simulate(arrivals, mean, 1, slo)}
    least = {kind.name: kind.most for kind in KINDS}
    # The dearest stage first: the others have to make up for it.
    for kind in sorted(KINDS, key=lambda kind: -kind.gpus):
        low, high = 1, kind.most
        while low < high:
            middle = (low + high) // 2
            found = simulate(arrivals, least | {kind.name: middle}, 1, slo)
            low, high = (low, middle) if found["missed %"] <= scaled["missed %"] else (middle + 1, high)
        least[kind.name] = high
    rows["fixed, as few misses"] = simulate(arrivals, least, 1, slo)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", default="bursts,tenants,nightly")
    parser.add_argument("--slo", type=float, default=3.0, help="seconds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {name: compare(name, options.slo) for name in options.trace.split(",")}
    columns = [*next(iter(found.values()))["policy"]]
    print(f"{'':30}" + "".join(f"{column:>24}" for column in columns))
    for name, rows in found.items():
        for way, row in rows.items():
            print(f"{name + ', ' + way:30}" + "".join(f"{row[column]:24.2f}" for column in columns))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
