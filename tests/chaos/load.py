"""A steady load of all kinds of requests, each of which has one right answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.deployments.pictures import ask, circle, row_of_circles, square

SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["color", "count"],
}
TOOL = {"type": "function", "function": {"name": "report", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
HELLO = [{"role": "user", "content": "Hello!"}]
LONG = {"ignore_eos": True, "max_tokens": 100}

#: Bodies of requests. Greedy or seeded: whatever happens, their answers are the same.
BODIES: dict[str, dict[str, Any]] = {
    "image": {
        "messages": ask("What color is the circle?", circle("red")),
        "temperature": 0,
        "max_tokens": 20,
    },
    "images": {
        "messages": ask("Do both pictures show the same color?", circle("green"), circle("blue")),
        "temperature": 0,
        "max_tokens": 30,
    },
    "long": {"messages": ask("What shape is this?", square("blue")), "temperature": 0, **LONG},
    "seeded": {"messages": HELLO, "temperature": 1.0, "seed": 11, **LONG},
    "several": {
        "messages": ask("How many circles are there?", row_of_circles(2)),
        "temperature": 1.0,
        "seed": 12,
        "n": 3,
        "ignore_eos": True,
        "max_tokens": 60,
    },
    "log-probabilities": {
        "messages": HELLO,
        "temperature": 0.8,
        "seed": 13,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["zzz"],
        "max_tokens": 60,
        "ignore_eos": True,
    },
    "schema": {"messages": HELLO, "temperature": 0, "max_tokens": 80, "response_format": FORMAT},
    "tools": {
        "messages": HELLO,
        "temperature": 0,
        "max_tokens": 90,
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
}

#: Bodies of requests to a model that makes vectors, which is not streamed.
VECTORS: dict[str, dict[str, Any]] = {
    "vector of a text": {"model": "tests/vectors", "input": "a red circle"},
    "vector of an image": {"model": "tests/vectors", "messages": ask("A shape.", circle("red"))},
}


class Vector(list):
    """A vector that equals another one but for how its numbers are rounded."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vector) or len(self) != len(other):
            return False
        return all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(self, other, strict=True))


@dataclass(frozen=True)
class Difference:
    """An answer that is not the one that the request gets alone; both as by :func:`answer`."""

    name: str
    found: list[Any]
    wanted: list[Any]

    def __str__(self) -> str:
        return f"{self.name}: {self.found} instead of {self.wanted}"


@dataclass
class Report:
    """Outcomes of the requests of a load.

    Attributes:
        answered: requests by kind.
        failures, differences: those that failed, and those with another answer than alone.
        asked_again: how often a client has sent its request again.
        longest_s: the longest time that an answer took.
    """

    answered: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    asked_again: int = 0
    longest_s: float = 0.0


class ServerLost(Exception):
    """An answer is a server error, or has no end."""


async def answer(client: httpx.AsyncClient, body: dict[str, Any], *, stream: bool) -> list[Any]:
    """The parts of an answer that are the same each time: texts, calls, tokens, reasons.

    Raises:
        ServerLost: the server or the ingress has failed.
        Exception: anything else but a whole answer.
    """
    if body in VECTORS.values():
        response = await client.post("/v1/embeddings", json=body)
        await _check(response)
        return [Vector(each["embedding"]) for each in response.json()["data"]]
    given = {"model": "pocket", "return_token_ids": True, **body, "stream": stream}
    if not stream:
        response = await client.post("/v1/chat/completions", json=given)
        await _check(response)
        return [_whole(choice) for choice in response.json()["choices"]]
    choices: dict[int, dict[str, Any]] = {}
    ended = False
    async with client.stream("POST", "/v1/chat/completions", json=given) as response:
        await _check(response)
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    _add(choices.setdefault(choice["index"], _empty()), choice)
    if not ended:
        raise ServerLost("the stream broke off")
    return [list(found.values()) for _, found in sorted(choices.items())]


async def margins(root: str, body: dict[str, Any]) -> list[float]:
    """By how much the log-probabilities of the best two tokens differ, at each place of a greedy answer."""
    given = {"model": "pocket", **body, "logprobs": True, "top_logprobs": 2}
    async with httpx.AsyncClient(base_url=root, timeout=1800) as client:
        response = await client.post("/v1/chat/completions", json=given)
        await _check(response)
    places = response.json()["choices"][0]["logprobs"]["content"]
    return [place["top_logprobs"][0]["logprob"] - place["top_logprobs"][1]["logprob"] for place in places]


async def _check(response: httpx.Response) -> None:
    if response.status_code >= 500:
        raise ServerLost(f"{response.status_code}: {(await response.aread())[:300]!r}")
    assert response.status_code == 200, (await response.aread())[:300]


def _empty() -> dict[str, Any]:
    return {"text": "", "calls": "", "ids": [], "logprobs": [], "reason": None}


def _whole(choice: dict[str, Any]) -> list[Any]:
    found = _empty()
    message = choice["message"]
    found["text"] = message["content"] or ""
    found["calls"] = "".join(
        call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls") or ()
    )
    found["ids"], found["reason"] = choice["token_ids"], choice["finish_reason"]
    found["logprobs"] = _texts(choice)
    return list(found.values())


def _add(found: dict[str, Any], choice: dict[str, Any]) -> None:
    delta = choice["delta"]
    found["text"] += delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        found["calls"] += (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
    found["ids"] += choice.get("token_ids") or ()
    found["logprobs"] += _texts(choice)
    found["reason"] = choice["finish_reason"] or found["reason"]


def _texts(choice: dict[str, Any]) -> list[str]:
    """The tokens of a choice's log-probabilities. The numbers' last digits depend on the batch."""
    return [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or ()]


class Load:
    """Sends requests until it is told to stop.

    Args:
        make_client: makes a client of the server.
        clients: requests at a time.
        requests: after this many it stops by itself; None for no limit.
        again_s: seconds for which a client asks again after a server error or a broken connection.
        bodies: of the requests, by kind.
        pause_s: for which each client waits after an answer. Processes that start need the cores, too.

    Attributes:
        wanted: the answer to each kind of request alone.
    """

    def __init__(
        self,
        make_client: Callable[[], httpx.AsyncClient],
        clients: int,
        requests: int | None = None,
        again_s: float = 0.0,
        bodies: Mapping[str, dict[str, Any]] = BODIES,
        pause_s: float = 0.0,
    ) -> None:
        self._bodies, self._pause_s = bodies, pause_s
        self._make_client, self._clients, self._again_s = make_client, clients, again_s
        self._turns = iter(itertools.count() if requests is None else range(requests))
        self.wanted: dict[str, list[Any]] = {}
        self.report = Report()
        self.stopping = False

    async def learn(self) -> None:
        """Ask for each answer alone, before anything dies."""
        async with self._make_client() as client:
            for kind, body in self._bodies.items():
                self.wanted[kind] = await answer(client, body, stream=False)

    async def run(self) -> Report:
        """Send requests until :attr:`stopping` is set, or to the last one."""
        async with self._make_client() as client:
            await asyncio.gather(*(self._ask(client) for _ in range(self._clients)))
        return self.report

    async def _ask(self, client: httpx.AsyncClient) -> None:
        kinds = list(self._bodies)
        for turn in self._turns:
            if self.stopping:
                return
            # Each kind in turn streamed and whole.
            kind, stream = kinds[turn % len(kinds)], bool(turn // len(kinds) % 2)
            name = f"{kind}, {'streamed' if stream else 'whole'}"
            began = time.monotonic()
            try:
                found = await self._answer(client, self._bodies[kind], stream=stream)
            except Exception as error:
                self.report.failures.append(f"{name}: {error!r}")
                continue
            self.report.longest_s = max(self.report.longest_s, time.monotonic() - began)
            self.report.answered[name] += 1
            if found != self.wanted[kind]:
                self.report.differences.append(Difference(name, found, self.wanted[kind]))
            await asyncio.sleep(self._pause_s)

    async def _answer(self, client: httpx.AsyncClient, body: dict[str, Any], *, stream: bool) -> list[Any]:
        deadline = time.monotonic() + self._again_s
        while True:
            try:
                return await answer(client, body, stream=stream)
            except (ServerLost, httpx.TransportError):
                if time.monotonic() >= deadline:
                    raise
            self.report.asked_again += 1
            await asyncio.sleep(0.1)
