"""CPU time of a streamed answer in the ingress: of the request, and of each token, from the tuple that a
replica sends to the bytes of its event.

    python -m benchmarks.ingress [--rounds 20] [--streams 40] [--together 1] [--tokens 500] [--completions]

No Ray, no engine and no socket takes part: a handle of this process yields the updates of a step when those
of the last one were read. API keys, metrics and the log of requests are on; the log goes to a file. The
smallest of the rounds counts: the others were disturbed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployments.api import create_api
from deployments.config import IngressConfig, ModelSpec
from deployments.pipeline import Pipeline
from deployments.ray_serve.channel import Elsewhere, Here
from deployments.ray_serve.handles import remote_stages
from deployments.ray_serve.packing import pack
from deployments.stages import Generation
from engine.outputs import OutputDelta, StreamUpdate, Usage

#: Tokens of streams that tell what a request costs.
SHORT = 2

MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"


class Replica:
    """A handle of a language model with one replica, whose answers have ``tokens`` tokens.

    A step gives each running answer a token; all updates of a step are a message of the channel.
    """

    def __init__(self, tokens: int) -> None:
        updates = [
            StreamUpdate("", [OutputDelta(0, " word", [300])], Usage(20, count + 1))
            for count in range(tokens)
        ]
        updates[-1].finished = True
        updates[-1].deltas[0].finish_reason = "length"
        self._fields = [pack(update)[1:] for update in updates]
        self._running: dict[str, Iterator[tuple[Any, ...]]] = {}
        self._changed = asyncio.Event()
        self._open = False
        self.max_model_len = _Method(self._max_model_len)
        self.generate = _Method(lambda *args: _Items(self._generate(*args)))
        self.updates = _Method(lambda *_: _Items(self._updates()))

    def options(self, **_: Any) -> Replica:
        return self

    async def _max_model_len(self) -> int:
        return 1 << 20

    async def _generate(self, given: Generation, *_: Any) -> AsyncIterator[Any]:
        if not self._open:
            yield Here("one")
            for fields in self._fields:
                yield (given.request_id, *fields)
                await _read()
            return
        yield Elsewhere()
        self._running[given.request_id] = iter(self._fields)
        self._changed.set()
        while given.request_id in self._running:
            await self._ended.wait()

    async def _updates(self) -> AsyncIterator[Any]:
        self._open, self._ended = True, asyncio.Event()
        while True:
            await self._changed.wait()
            self._changed.clear()
            while self._running:
                message = []
                for name, left in list(self._running.items()):
                    if (fields := next(left, None)) is not None:
                        message.append((name, *fields))
                    else:
                        del self._running[name]
                yield message
                await _read()
            self._ended.set()
            self._ended = asyncio.Event()


class _Method:
    def __init__(self, remote: Callable[..., Any]) -> None:
        self.remote = remote


class _Items:
    """The response of a stream."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        pass


async def _read() -> None:
    """Let the readers take what was sent, so that it isn't merged with the next step's."""
    for _ in range(4):
        await asyncio.sleep(0)


def application(tokens: int) -> Any:
    spec = ModelSpec.model_validate({"name": "pocket", "engine": {"model": str(MODEL)}})
    pipeline = Pipeline(spec, remote_stages(Replica(tokens)), ThreadPoolExecutor(1))  # type: ignore[arg-type]
    config = IngressConfig.model_validate({"keys": [{"name": "one", "key": "secret"}]})
    return create_api(config, {"pocket": pipeline})


#: Paths, what asks for an answer there, and what an event with a token holds.
ENDPOINTS = {
    "chat": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello!"}]},
        b'"content":" word"',
    ),
    "text": ("/v1/completions", {"prompt": "Hello!"}, b'"text":" word"'),
}


async def stream(api: Any, tokens: int, endpoint: str) -> None:
    """Read one streamed answer."""
    path, asked, mark = ENDPOINTS[endpoint]
    body = json.dumps({"model": "pocket", "stream": True, "max_tokens": tokens} | asked).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer secret")],
    }
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    events = 0

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else await asyncio.Future()

    async def send(message: Any) -> None:
        nonlocal events
        events += message.get("body", b"").count(mark)

    await api(scope, receive, send)
    assert events == tokens, f"{events} events for {tokens} tokens"


def measure(streams: int, tokens: int, rounds: int, together: int, endpoint: str) -> list[float]:
    """CPU microseconds of a stream, for each round."""
    found = []
    with tempfile.NamedTemporaryFile("w") as file:
        # Alone: Ray Serve's own handler would write each line once more, to the terminal.
        logger = logging.getLogger("ray.serve")
        logger.handlers = [logging.StreamHandler(file)]
        logger.setLevel(logging.INFO)

        async def run() -> None:
            api = application(tokens)
            await stream(api, tokens, endpoint)
            for _ in range(rounds):
                gc.collect()
                began = time.process_time()
                for _ in range(streams // together):
                    await asyncio.gather(*(stream(api, tokens, endpoint) for _ in range(together)))
                made = streams // together * together
                found.append((time.process_time() - began) / made * 1e6)

        asyncio.run(run())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=40, help="in a round")
    parser.add_argument("--together", type=int, default=1, help="streams that run at the same time")
    parser.add_argument("--tokens", type=int, default=500, help="of each stream")
    parser.add_argument("--completions", action="store_true", help="by /v1/completions")
    options = parser.parse_args()
    endpoint = "text" if options.completions else "chat"
    short, long = (
        min(measure(options.streams, tokens, options.rounds, options.together, endpoint))
        for tokens in (SHORT, options.tokens)
    )
    each = (long - short) / (options.tokens - SHORT)
    print(f"CPU time: {short - SHORT * each:.0f} us a request, {each:.2f} us a token besides")
    print(f"{SHORT} tokens {short:.0f} us, {options.tokens} tokens {long:.0f} us")


if __name__ == "__main__":
    main()
