"""A client's end reaches the engine, wherever the request is at that time.

The tests keep a reference to each stream of the stages below: a stream ends only if it is closed, not by
garbage collection.
"""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI

from deployments.api import create_api
from deployments.config import AppConfig, IngressConfig
from deployments.language_model import LanguageModel
from deployments.leaving import ends_with_client
from deployments.metrics.families import Part
from deployments.pipeline import Pipeline
from deployments.stages import Generation, Stages
from engine.errors import RequestFailed
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from tests.deployments.asgi import AppTransport
from tests.serving import app_args, wait_until


class Endless:
    """An engine, and a language model stage, whose streams give ``count`` updates and then wait for ever."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.streams = []
        self.closed = 0
        self.given = 0

    async def max_model_len(self) -> int:
        return 64

    async def collect(self) -> list[Part]:
        return []

    def generate(self, *args, **options):
        self.streams.append(self._updates())
        return self.streams[-1]

    async def _updates(self):
        try:
            for _ in range(self.count):
                self.given += 1
                yield StreamUpdate("one", [OutputDelta(0, "token", [1])], Usage(1, 1))
            await asyncio.Future()
        finally:
            self.closed += 1


class Failing(Endless):
    """Streams that fail behind their last update."""

    async def _updates(self):
        yield StreamUpdate("one", [OutputDelta(0, "first", [1])], Usage(1, 1))
        yield StreamUpdate("one", [OutputDelta(0, "last", [1], None, "stop")], Usage(1, 2), finished=True)
        raise RequestFailed("too late")


@pytest.fixture(scope="module")
def spec():
    return AppConfig.model_validate(app_args()).models[0]


def api(spec, stage, **config) -> FastAPI:
    pipeline = Pipeline(spec, Stages(stage), ThreadPoolExecutor(1))
    return create_api(IngressConfig(**config), {"pocket": pipeline})


def client(spec, stage) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AppTransport(api(spec, stage)), base_url="http://test")


def body(stream: bool) -> dict:
    return {"model": "pocket", "messages": [{"role": "user", "content": "a"}], "stream": stream}


@pytest.mark.parametrize("count", [1, 1000], ids=["waits for a token", "waits for the client"])
async def test_a_client_leaves_its_stream(spec, count):
    stage = Endless(count)
    async with client(spec, stage) as http:
        async with http.stream("POST", "/v1/chat/completions", json=body(True)) as response:
            assert (await anext(response.aiter_lines())).startswith("data: ")
            await asyncio.sleep(0)
        await wait_until(lambda: stage.closed == 1)
    # The client that read one event has not been sent all of them.
    assert stage.given < 100


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_says_that_the_client_has_left(spec, stream):
    """Servers without Ray cancel nothing. What is read after the body says that nobody waits."""
    stage, left, sent = Endless(3), asyncio.Event(), []
    parts = [{"type": "http.request", "body": json.dumps(body(stream)).encode()}]

    async def receive():
        if parts:
            return parts.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message["type"])

    app = ends_with_client(api(spec, stage))
    asked = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    answer = asyncio.ensure_future(app({**asked, "query_string": b""}, receive, send))
    await wait_until(lambda: stage.given == 3)
    left.set()
    await asyncio.wait_for(answer, 30)
    assert stage.closed == 1
    assert sent.count("http.response.start") == stream


@pytest.mark.parametrize("chat", [True, False])
async def test_a_failure_behind_the_last_update_takes_none_back(spec, chat):
    asked = body(True) if chat else {"model": "pocket", "prompt": "a", "stream": True}
    async with client(spec, Failing(0)) as http:
        answer = await http.post(f"/v1/{'chat/' * chat}completions", json=asked)
    *events, failure, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert "first" in "".join(events[:-1]) and "last" in events[-1]
    assert "too late" in failure and done == "data: [DONE]"


async def test_a_client_leaves_before_its_whole_answer(spec):
    stage = Endless(3)
    async with client(spec, stage) as http:
        request = asyncio.ensure_future(http.post("/v1/chat/completions", json=body(False)))
        await wait_until(lambda: stage.given == 3)
        request.cancel()
        await wait_until(lambda: stage.closed == 1)


@pytest.mark.parametrize("count", [1, 1000], ids=["waits for a token", "waits for the reader"])
async def test_a_stage_s_stream_that_is_closed_closes_the_engine_s(count):
    engine = Endless(count)
    updates = LanguageModel(engine).generate(Generation("one", EngineInput([1]), SamplingParams()), [])
    await anext(updates)
    await updates.aclose()
    assert engine.closed == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_client_that_stops_reading_gives_its_place_back(spec, path, caplog):
    stage = Endless(100)
    made = api(spec, stage, send_timeout_s=0.05)
    given = body(True) | {"prompt": "a", "input": "a", "max_tokens": 9}
    fields = {"/v1/completions": "prompt", "/v1/responses": "input"}
    for name in {"prompt", "input", "messages", "max_tokens"} - {fields.get(path, "messages"), "max_tokens"}:
        del given[name]
    if path == "/v1/responses":
        del given["max_tokens"]
    with caplog.at_level("INFO"):
        async with (
            httpx.AsyncClient(transport=AppTransport(made), base_url="http://test") as http,
            http.stream("POST", path, json=given) as response,
        ):
            assert response.status_code == 200
            await wait_until(lambda: stage.closed == 1 and made.state.admission.active == 0)
            metrics = (await http.get("/metrics")).text
    assert stage.given < 100
    assert re.search(r"^sightline_http_stalled_total\{[^}]*\} 1\b", metrics, re.MULTILINE)
    assert "the client did not read it to its end" in caplog.text
    # It did not leave by itself.
    assert [each.client_left for each in caplog.records if getattr(each, "path", "") == path] == [False]
