"""CPU time of a streamed event in each process of a server without a model, behind HAProxy.

    python -m benchmarks.streams [--streams 64] [--tokens 400] [--step-ms 2] [--rounds 8] [--rate 0]

A stand-in for the language model gives each running answer a token in every step. Requests of a round come at
once, or at random times. Nothing else may run Ray on this machine: its processes would be counted.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from benchmarks.channel import Replica
from benchmarks.clients import Clients, arrivals
from benchmarks.processes import cpu_seconds
from benchmarks.serve import running
from deployments.config import AppConfig
from deployments.metrics.families import Part
from deployments.ray_serve.ingress import Ingress
from deployments.ray_serve.routing import LanguageModelRouter

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"

#: The README's environment for load; and an ingress that ends does not wait.
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}


class StandIn(Replica):
    async def max_model_len(self) -> int:
        return 1 << 15

    async def measured(self) -> Part:
        return Part({}, [])


def build(args: dict[str, Any]) -> Application:
    """The application; ``args`` are those of ``deployments.app:build`` and of the stand-in."""
    tokens, step_ms = args.pop("tokens"), args.pop("step_ms")
    config = AppConfig.model_validate(args)
    options: dict[str, Any] = {"max_ongoing_requests": 4096, "ray_actor_options": {"num_cpus": 0}}
    router = RequestRouterConfig(
        request_router_class=LanguageModelRouter,  # type: ignore[arg-type]
    )
    model = serve.deployment(name="LanguageModel", request_router_config=router, **options)(StandIn)
    ingress = serve.deployment(name="Ingress", **options)(Ingress)
    return ingress.bind(config, {"language_model": model.bind(tokens, step_ms / 1e3)})


def measure(
    clients: Clients, base_url: str, options: argparse.Namespace, seed: int
) -> tuple[int, Counter[str]]:
    """Events of a round, and the CPU seconds of each process."""
    clients.make(options, "pocket", options.streams, seed, 1.0)
    due = arrivals(options.streams, options.rate, seed) if options.rate else [0.0] * options.streams
    before = cpu_seconds()
    traces, _ = clients.send(base_url, due)
    used = cpu_seconds() - before
    assert not any(trace.error for trace in traces), next(trace.error for trace in traces if trace.error)
    return sum(len(trace.tokens) for trace in traces), used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="requests of a round")
    parser.add_argument("--tokens", type=int, default=400, help="of an answer")
    parser.add_argument("--step-ms", type=float, default=2.0, help="between two tokens of an answer")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: all at once")
    options = parser.parse_args()
    options.words, options.images, options.side = 20, 0, 0
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    args = {
        "models": [{"name": "pocket", "engine": {"model": str(MODEL)}}],
        "tokens": options.tokens,
        "step_ms": options.step_ms,
    }
    application = {
        "name": "bench",
        "route_prefix": "/",
        "import_path": "benchmarks.streams:build",
        "args": args,
    }
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    with (
        running({"logging_config": quiet, "applications": [application]}, 120.0) as base_url,
        Clients(1) as clients,
    ):
        measure(clients, base_url, options, 0)
        for number in range(1, options.rounds + 1):
            events, used = measure(clients, base_url, options, number)
            shares = [f"{name} {1e6 * seconds / events:.1f}" for name, seconds in sorted(used.items())]
            print(f"{events} events, us an event: {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
