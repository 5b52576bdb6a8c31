"""Far more requests than the server takes: some are answered, the others are told when to come back."""

import asyncio
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import pytest_asyncio

from deployments.access import KeyConfig
from deployments.admission import AdmissionLimit
from deployments.api import create_api
from deployments.config import AppConfig, IngressConfig
from deployments.pipeline import Pipeline
from deployments.stages import Stages
from engine.errors import Overloaded
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle
from tests.serving import app_args, wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")

LIMIT = 4
HELLO = [{"role": "user", "content": "Hello!"}]
HEADERS = {"Authorization": "Bearer secret"}


@pytest_asyncio.fixture(loop_scope="session")
async def bounded(running):
    """The application with room for a few requests, whose one key has limits, and its client."""
    keys = [{"name": "a", "key": "secret", "max_active_requests": 100, "max_active_tokens": 3000}]
    config = IngressConfig(max_active_requests=LIMIT, keys=[KeyConfig.model_validate(key) for key in keys])
    api = create_api(config, running.app.api.state.pipelines)
    transport = AppTransport(api)
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", timeout=60, headers=HEADERS
    ) as client:
        yield api, client


async def test_ten_times_too_many_requests(running, bounded):
    """Every client comes back until it is answered. Never are more requests open than the limit."""
    api, client = bounded
    statuses: Counter[int] = Counter()
    most = 0

    async def insist(number: int) -> str:
        nonlocal most
        body = {"model": "pocket", "messages": HELLO, "max_tokens": 8, "temperature": 0}
        if number % 4 == 0:
            body["messages"] = ask("What color is the circle?", circle("red"))
        for _ in itertools.count():
            response = await client.post("/v1/chat/completions", json=body)
            most = max(most, api.state.admission.active)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                return response.json()["choices"][0]["message"]["content"]
            assert response.status_code == 429, response.text
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["type"] == "rate_limit_error"
            await asyncio.sleep(0.01)
        raise AssertionError

    answers = await asyncio.gather(*(insist(number) for number in range(10 * LIMIT)))
    assert statuses[200] == 10 * LIMIT and statuses[429] > 0
    assert most <= LIMIT and api.state.admission.active == 0
    assert len(set(answers[::4])) == 1 and len(set(answers[1::4])) == 1


ENDS = [
    "whole",
    "streamed",
    "client leaves a stream",
    "client leaves before an answer",
    "refused",
    "deadline",
]


@pytest.mark.parametrize("end", ENDS)
async def test_what_a_request_took_comes_back_however_it_ends(running, bounded, end):
    """Its place, its tokens of the key's limit, and the engine's slots and blocks."""
    api, client = bounded
    body = {"model": "pocket", "messages": ask("What shape is this?", circle("blue")), "max_tokens": 900}
    long = body | {"ignore_eos": True, "n": 2}
    if end == "whole":
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 4})
        assert response.status_code == 200
    elif end == "streamed":
        response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 4, "stream": True})
        assert response.text.endswith("data: [DONE]\n\n")
    elif end == "client leaves a stream":
        async with client.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as response:
            assert (await anext(response.aiter_lines())).startswith("data: ")
    elif end == "client leaves before an answer":
        request = asyncio.ensure_future(client.post("/v1/chat/completions", json=long))
        await wait_until(lambda: running.pocket.language_model.metrics()["running"] == 2)
        request.cancel()
    elif end == "refused":
        response = await client.post("/v1/chat/completions", json=body | {"logit_bias": {"99999": 1}})
        assert response.status_code == 400
    else:
        pipeline = api.state.pipelines["pocket"]
        pipeline.timeout_s = 0.3
        try:
            response = await client.post("/v1/chat/completions", json=long)
        finally:
            pipeline.timeout_s = None
        assert response.status_code == 504
    await wait_until(lambda: api.state.admission.active == 0)
    await running.wait_until_idle()
    # The key has room for one such request at a time, and has it again.
    async with client.stream("POST", "/v1/chat/completions", json=long | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        refused = await client.post("/v1/chat/completions", json=long)
        assert refused.status_code == 429 and "limit is 3000" in refused.json()["error"]["message"]


class Full:
    """A language model stage whose queue is full for ``refusals`` requests."""

    def __init__(self, stage, refusals: int) -> None:
        self._stage, self.refusals = stage, refusals

    async def max_model_len(self) -> int:
        return await self._stage.max_model_len()

    async def generate(self, request, media, relay):
        if self.refusals:
            self.refusals -= 1
            raise Overloaded("The language model's queue is full; try again shortly.")
        async for update in self._stage.generate(request, media, relay):
            yield update


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_full_stage_is_named_in_a_429(running, stream):
    spec = AppConfig.model_validate(app_args()).models[0]
    stage = Full(running.pocket.stages.language_model, 1)
    pipeline = Pipeline(spec, Stages(stage), ThreadPoolExecutor(1))
    api = create_api(IngressConfig(), {"pocket": pipeline})
    body = {"model": "pocket", "messages": HELLO, "max_tokens": 4, "stream": stream}
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60) as client:
        refused = await client.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert "language model" in refused.json()["error"]["message"]
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200


async def test_a_request_that_is_refused_is_not_read():
    """Its body takes no memory, however large it is."""
    admission = AdmissionLimit(0)
    sent = []

    async def read():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await admission.around(None)(scope, read, send)
    assert sent[0]["status"] == 429 and admission.active == 0
    assert int(dict(sent[0]["headers"])[b"retry-after"]) >= 1
