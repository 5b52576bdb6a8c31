"""CPU time of an update of an answer between a language model's replica and its reader, with Ray Serve.

    python -m benchmarks.channel [--answers 1,8,32] [--tokens 200] [--step-ms 4]

A replica without a model gives each running answer a token in every step. Its reader is this process: by each
answer's own call, by a channel to another host, and by a line.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.processes import cpu_seconds
from deployments.ray_serve.channel import Inbox, Outboxes
from deployments.ray_serve.handles import RemoteLanguageModel
from deployments.ray_serve.held_requests import HeldRequests
from deployments.ray_serve.process import prepare_process
from deployments.ray_serve.replicas import LanguageModelReplica
from deployments.ray_serve.routing import LanguageModelRouter
from deployments.ray_serve.served_model import ServedModel
from deployments.stages import Generation
from engine.mailbox import Mailbox, Relay
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams


class Steps:
    """A stage whose answers get a token each at the same times, as those of an engine.

    Args:
        tokens: of an answer; None: as many as its request asks for.
        step_s: seconds between two tokens.
    """

    def __init__(self, tokens: int | None, step_s: float) -> None:
        self._tokens, self._step_s = tokens, step_s
        # The request, the tokens that it has, and those that it gets.
        self._running: dict[Mailbox, tuple[str, int, int]] = {}

    async def generate(
        self, request: Generation, media: Any, relay: Relay
    ) -> AsyncGenerator[StreamUpdate, None]:
        mailbox = Mailbox(relay)
        if not self._running:
            asyncio.get_running_loop().call_later(self._step_s, self._step)
        self._running[mailbox] = request.request_id, 0, self._tokens or request.params.max_tokens or 1
        finished = False
        while not finished:
            update = await mailbox.get()
            assert isinstance(update, StreamUpdate)
            finished = update.finished
            yield update

    def _step(self) -> None:
        for mailbox, (name, count, most) in list(self._running.items()):
            count += 1
            last = count == most
            delta = OutputDelta(0, " word", [300], finish_reason="length" if last else None)
            mailbox.put(StreamUpdate(name, [delta], Usage(1, count), finished=last))
            if last:
                del self._running[mailbox]
            else:
                self._running[mailbox] = name, count, most
        if self._running:
            asyncio.get_running_loop().call_later(self._step_s, self._step)


class Replica(LanguageModelReplica):
    """A replica without a model.

    Args:
        steps: in place of the model.
        encoder: in place of a :class:`deployments.encoder.VisionEncoder`; None if there is none.
    """

    def __init__(self, steps: Steps, encoder: Any = None) -> None:
        prepare_process()
        self._held, self._outboxes = HeldRequests(), Outboxes()
        self._stage = ServedModel(steps, self._outboxes, encoder)

    async def reconfigure(self, user_config: dict[str, Any] | None) -> None:
        """Nothing can change."""

    async def check_health(self) -> None:
        """Nothing can fail."""

    async def record_routing_stats(self) -> dict[str, float]:
        return {}

    async def __del__(self) -> None:
        """Nothing was loaded."""


class _NoChannels(Inbox):
    def read(self, replica: str, line: str = "") -> None:
        """Leave all updates to the answers' own calls."""


class _NoLines(Inbox):
    def read(self, replica: str, line: str = "") -> None:
        """Open the channel that goes to other hosts."""
        super().read(replica)


def _reader(handle: DeploymentHandle, inbox: type[Inbox]) -> RemoteLanguageModel:
    model = RemoteLanguageModel(handle)
    model._inbox = inbox(model._inbox._open_stream, model._inbox._follow_line)
    return model


async def _answer(model: RemoteLanguageModel, name: str) -> int:
    items = 0
    request = Generation(name, EngineInput([1]), SamplingParams())
    async with aclosing(model.generate(request, ())) as updates:
        async for _ in updates:
            items += 1
    return items


async def measure(model: RemoteLanguageModel, way: str, answers: int, tokens: int) -> None:
    """Read answers that run at the same time, and print a row of the table."""
    await _answer(model, f"first-{way}-{answers}")
    used, own = cpu_seconds()["LanguageModel"], time.process_time()
    items = sum(await asyncio.gather(*(_answer(model, f"{way}-{answers}-{n}") for n in range(answers))))
    own, used = time.process_time() - own, cpu_seconds()["LanguageModel"] - used
    count = answers * tokens
    print(
        f"{way:>8} {answers:8d} {used / count * 1e6:9.0f} {own / count * 1e6:9.0f} {items / count:9.2f}",
        flush=True,
    )


async def run(options: argparse.Namespace) -> None:
    """Deploy the replica, and measure both ways in turn."""
    deployment = serve.deployment(
        name="LanguageModel",
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        request_router_config={"request_router_class": LanguageModelRouter},
    )(Replica)
    handle = serve.run(
        deployment.bind(Steps(options.tokens, options.step_ms / 1e3)), name="bench", route_prefix=None
    )
    ways = {"own call": _NoChannels, "channel": _NoLines, "line": Inbox}
    readers = {way: _reader(handle, inbox) for way, inbox in ways.items()}
    print(f"{'updates':>8} {'answers':>8} {'replica us':>9} {'reader us':>9} {'items':>9}")
    for answers in map(int, options.answers.split(",")):
        for way, model in readers.items():
            await measure(model, way, answers, options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", default="1,8,32", help="numbers of answers that run at the same time")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--step-ms", type=float, default=4.0)
    options = parser.parse_args()
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    try:
        asyncio.run(run(options))
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()
