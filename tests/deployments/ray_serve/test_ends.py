"""A request's end reaches every stage at work on it, through Ray Serve's own proxy and through HAProxy.

Images and embeddings travel by Ray's actor calls, tokens by gRPC. A stage counts the requests that are
cancelled in it, so that no test depends on time.
"""

import asyncio
import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from tests.deployments.pictures import ask, circle, looking_at, silent_image
from tests.metrics import Values, all_answer, is_idle, scraped
from tests.serving import Served, wait_for

pytestmark = pytest.mark.ray

HELLO = [{"role": "user", "content": "Hello!"}]
#: Far more tokens than are computed while a client leaves.
LONG = {
    "model": "pocket",
    "messages": HELLO,
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 1,
    "n": 16,
}
#: Far more than are computed in the two seconds of ``hurried``: two idle cores need just those for ``LONG``.
SLOW = {**LONG, "n": 64}

#: Deploys the configuration that it reads, in the cluster that it is told.
DEPLOY = """
import json, sys, ray
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
ray.init(sys.argv[1], log_to_driver=False)
config = ServeDeploySchema.model_validate(json.load(sys.stdin))
_get_global_client().deploy_apps(config, _blocking=True)
"""


@pytest.fixture(params=["served", "served_under_load"], ids=["proxy", "haproxy"])
def server(request, shared_applications) -> Iterator[Served]:
    """The application; idle before and after the test."""
    served = shared_applications[request.param].get()
    wait_for(lambda: is_idle(scraped(served.root)))
    yield served
    wait_for(lambda: is_idle(scraped(served.root)))


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.root, timeout=300) as client:
        yield client


def seen(served: Served) -> Values:
    """What all stages say now."""
    return wait_for(lambda: values if all_answer(values := scraped(served.root)) else None)


def cancelled(served: Served, stage: str) -> float:
    return seen(served)("stage_requests_total", model="pocket", stage=stage, outcome="cancelled")


def at_work(served: Served, stage: str) -> bool:
    return seen(served)("stage_running_requests", model="pocket", stage=stage) > 0


async def until(condition: Callable[[], bool], asked: asyncio.Future[httpx.Response] | None = None) -> None:
    """Wait for ``condition``. Meanwhile the request ``asked`` must not be answered."""

    def holds() -> bool:
        assert asked is None or not asked.done(), asked.result().text
        return condition()

    await asyncio.to_thread(wait_for, holds)


@pytest.mark.parametrize(
    ("messages", "stages"),
    [
        (HELLO, ["language_model"]),
        (ask("What shape is this?", circle("red")), ["preprocessor", "encoder", "language_model"]),
    ],
    ids=["text", "image"],
)
async def test_the_way_of_a_request(server, request, messages, stages):
    """What shows the way is private to Ray Serve: requests would go by calls again without an error."""
    wanted = "line" if "haproxy" in request.node.callspec.id else "call"
    async with client_of(server) as client:

        async def counts() -> list[float]:
            body = {"model": "pocket", "messages": messages, "max_tokens": 1}
            assert (await client.post("/v1/chat/completions", json=body)).is_success
            values = seen(server)
            return [values(f"{stage}_requests_total", model="pocket", way=wanted) for stage in stages]

        # The first requests of each ingress open its lines.
        async with asyncio.timeout(60):
            before = await counts()
            while not all(now > then for now, then in zip(await counts(), before, strict=True)):
                continue


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_leaves_while_an_image_is_fetched(server, stream):
    before = cancelled(server, "preprocessor")
    with silent_image(server) as url:
        async with client_of(server) as client:
            body = {"model": "pocket", "messages": looking_at(url), "stream": stream}
            asked = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            await until(lambda: at_work(server, "preprocessor"), asked)
            asked.cancel()
        await until(lambda: cancelled(server, "preprocessor") == before + 1)
        assert not at_work(server, "preprocessor")


async def test_an_image_that_fails_ends_the_work_on_the_others(server):
    with silent_image(server) as url:
        async with client_of(server) as client:
            body = {"model": "pocket", "messages": looking_at(url, f"{server.site}/missing.png")}
            answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and "content[1]" in answer.text, answer.text
        assert not at_work(server, "preprocessor")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "messages", [HELLO, ask("What shape is this?", circle("red"))], ids=["text", "image"]
)
async def test_a_client_leaves_while_tokens_are_made(server, stream, messages):
    """All of the request's choices end."""
    before = cancelled(server, "language_model")
    async with client_of(server) as client:
        body = {**LONG, "messages": messages, "stream": stream}
        if stream:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                assert (await anext(response.aiter_lines())).startswith("data: ")
        else:
            asked = asyncio.ensure_future(client.post("/v1/chat/completions", json=body))
            await until(lambda: at_work(server, "language_model"), asked)
            asked.cancel()
        await until(lambda: cancelled(server, "language_model") == before + 1)
    await until(lambda: is_idle(scraped(server.root)))


async def test_a_stop_string_ends_the_work(server):
    asked = {**LONG, "n": 1, "temperature": 0}
    async with client_of(server) as client:
        made = await client.post("/v1/chat/completions", json={**asked, "max_tokens": 40})
        text = made.json()["choices"][0]["message"]["content"]
        before = seen(server)("engine_output_tokens_total", model="pocket")
        made = await client.post("/v1/chat/completions", json={**asked, "stop": [text[10:20]]})
    assert made.json()["choices"][0]["finish_reason"] == "stop"
    await until(lambda: is_idle(scraped(server.root)))
    # The device may be some steps ahead of the text.
    assert seen(server)("engine_output_tokens_total", model="pocket") - before < 400


async def test_a_choice_that_has_ended_ends_before_the_others(server):
    """A stop string ends the first of two choices early; the second one never has it."""
    asked = {**LONG, "n": 2, "seed": 5, "max_tokens": 200}
    async with client_of(server) as client:
        made = (await client.post("/v1/chat/completions", json=asked)).json()
        first, second = (choice["message"]["content"] for choice in made["choices"])
        stops = [first[at : at + 6] for at in range(60) if first[at : at + 6] not in second]
        before = seen(server)("engine_output_tokens_total", model="pocket")
        made = (await client.post("/v1/chat/completions", json={**asked, "stop": stops[:1]})).json()
    assert [choice["finish_reason"] for choice in made["choices"]] == ["stop", "length"]
    await until(lambda: is_idle(scraped(server.root)))
    made_tokens = seen(server)("engine_output_tokens_total", model="pocket") - before
    assert 200 <= made_tokens < 350


def deployed(served: Served, **ingress: float) -> None:
    """Have the replicas of the ingress take these values over. Another process does it: this one is not
    connected to the cluster."""
    config = yaml.safe_load((served.pictures.parent / "serve.yaml").read_text())
    if ingress:
        config["applications"][0]["deployments"] = [{"name": "Ingress", "user_config": ingress}]
    subprocess.run(
        [sys.executable, "-c", DEPLOY, served.cluster], input=json.dumps(config), text=True, check=True
    )


@pytest.fixture
def hurried(served_under_load) -> Iterator[Served]:
    """The application behind HAProxy with two seconds for each request."""
    deployed(served_under_load, request_timeout_s=2)
    yield served_under_load
    deployed(served_under_load)
    url = f"{served_under_load.base_url}/chat/completions"
    with silent_image(served_under_load) as image:
        asked = {"model": "pocket", "messages": looking_at(image)}

        def goes_on() -> bool:
            try:
                httpx.post(url, json=asked, timeout=4)
            except httpx.TimeoutException:
                return True
            return False

        # Each replica of the ingress has taken the usual time over again.
        wait_for(lambda: all(goes_on() for _ in range(4)))


async def test_the_end_of_a_request_s_time_ends_the_work(hurried):
    """While an image is fetched, by actor calls; and while tokens are made, by gRPC. Ray Serve's own proxy:
    ``test_redeploy.py``."""

    async def timed_out(messages: list[dict], stage: str) -> None:
        body = {**SLOW, "messages": messages}

        async def ends() -> bool:
            try:
                answer = await client.post("/v1/chat/completions", json=body, timeout=30)
            except httpx.TimeoutException:
                # The change has not come to this replica yet.
                return False
            return answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"

        # Each replica of the ingress has taken the change over.
        deadline, in_a_row = time.monotonic() + 300, 0
        while in_a_row < 4:
            assert time.monotonic() < deadline
            in_a_row = in_a_row + 1 if await ends() else 0
        await until(lambda: is_idle(scraped(hurried.root)))
        before = cancelled(hurried, stage)
        assert await ends()
        await until(lambda: cancelled(hurried, stage) > before)
        await until(lambda: is_idle(scraped(hurried.root)))

    async with client_of(hurried) as client:
        with silent_image(hurried) as url:
            await timed_out(looking_at(url), "preprocessor")
        await timed_out(HELLO, "language_model")


@pytest.mark.parametrize("megabytes", [1, 24])
async def test_a_large_image_comes_whole(server, megabytes):
    side = int((megabytes * (1 << 20) / 4) ** 0.5)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    png = io.BytesIO()
    noise.save(png, "PNG", compress_level=0)
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    assert len(url) > 0.95 * megabytes * (1 << 20)
    async with client_of(server) as client:
        body = {"model": "pocket", "messages": looking_at(url), "max_tokens": 1}
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text[:300]


@pytest.mark.parametrize("megabytes", [1, 63])
async def test_a_large_body_comes_whole(server, megabytes):
    note = "x" * (megabytes << 20)
    async with client_of(server) as client:
        body = {"model": "pocket", "user": note, "messages": HELLO, "max_tokens": 1}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text[:300]
        body["user"] += "x" * (2 << 20)
        answer = await client.post("/v1/chat/completions", json=body)
        # The server's limit is 64 MiB, and a client gets to know it.
        assert answer.status_code == (413 if megabytes == 63 else 200), answer.text[:300]


@pytest.mark.parametrize("megabytes", [1, 63])
async def test_a_large_answer_comes_whole(server, megabytes):
    async with client_of(server) as client:

        async def text_of(tokens: list[int]) -> str:
            answer = await client.post("/detokenize", json={"model": "pocket", "tokens": tokens})
            assert answer.status_code == 200, answer.text[:300]
            return answer.json()["prompt"]

        texts = [await text_of([token]) for token in range(8)]
        longest = max(texts, key=len)
        count = megabytes * (1 << 20) // len(longest)
        assert await text_of([texts.index(longest)] * count) == longest * count


async def test_log_probabilities_of_long_prompts_come_whole(server):
    """More than a megabyte, most of which comes from a stage."""
    async with client_of(server) as client:
        body = {"model": "pocket", "prompt": [[7] * 1000] * 3, "max_tokens": 1, "echo": True, "logprobs": 20}
        answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and len(answer.content) > 1 << 20, answer.text[:300]
    assert [len(choice["logprobs"]["tokens"]) for choice in answer.json()["choices"]] == [1001] * 3


async def test_vectors_of_a_long_list_come_whole(server):
    async with client_of(server) as client:
        body = {"model": "tests/vectors", "input": [f"{number}" for number in range(300)]}
        answer = await client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200 and len(answer.content) > 1 << 20, answer.text[:300]
    assert [len(each["embedding"]) for each in answer.json()["data"]] == [256] * 300
