"""Requests whose stages die are carried on: their clients see what they see without a death."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from deployments.access import KeyConfig
from deployments.api import create_api
from deployments.config import AppConfig, ReplayConfig
from deployments.pipeline import Pipeline
from deployments.replay import DeadlineExceeded, Patience, carried_on
from deployments.stages import Generation, Rows, StageLost
from engine.errors import Overloaded, Unavailable
from engine.outputs import EngineTimes, OutputDelta, StreamUpdate, Usage
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from tests import serving
from tests.deployments.asgi import AppTransport
from tests.deployments.dying import Deaths, dying_client
from tests.deployments.pictures import ask, circle, square

pytestmark = pytest.mark.usefixtures("idle_afterwards")

IMAGES = ask("What color is the circle?", circle("red")) + ask("What shape is this?", square("blue"))
HELLO = [{"role": "user", "content": "Hello!"}]

REPLAY = ReplayConfig(pause_s=0.001)

#: Bodies of requests with images. All other kinds, cut after each token: ``test_cut_answers.py``.
BODIES = {
    "images": {"messages": IMAGES, "max_tokens": 24, "temperature": 0},
    "log-probabilities": {
        "messages": IMAGES,
        "max_tokens": 16,
        "temperature": 1.0,
        "seed": 6,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["e"],
        "include_stop_str_in_output": True,
    },
}
#: Deaths, each with those that follow it.
POINTS: dict[str, list[tuple[str, int]]] = {
    "before the images are prepared": [("prepare", 0)],
    "after the images were prepared": [("prepare", 1)],
    "while images are encoded": [("encode", 0)],
    "after an image was encoded": [("encode", 1)],
    "before the context's length is known": [("max_model_len", 0)],
    "when the embeddings are handed over": [("rows", 0)],
    "after the last update": [("end", 0)],
    "again and again": [("update", 1), ("update", 2), ("update", 0), ("update", 1), ("rows", 0)],
    "everywhere": [
        *(("prepare", 0), ("encode", 1), ("max_model_len", 1), ("rows", 0), ("prepare", 1)),
        *(("encode", 0), ("update", 2), ("end", 0)),
    ],
}


@pytest.fixture(scope="module")
def config(running) -> AppConfig:
    return AppConfig.model_validate(serving.tested_args(running.site))


@pytest_asyncio.fixture(loop_scope="session")
async def dying(running, config):
    """A client of ``pocket`` whose stages die, and the deaths to plant."""
    deaths = Deaths()
    async with dying_client("pocket", config, running.pocket.stages, deaths, REPLAY) as client:
        yield client, deaths


async def answer(client, body: dict, *, stream: bool) -> list[dict]:
    """The client's answer, choice by choice, without the fields that differ between two requests anyway."""
    response = await client.post(
        "/v1/chat/completions",
        json={"model": "pocket", "return_token_ids": True, **body}
        | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
    )
    assert response.status_code == 200, response.text
    if not stream:
        made = response.json()
        messages = [choice["message"] for choice in made["choices"]]
        found = [
            {
                "content": choice["message"]["content"],
                "calls": [call["function"] for call in message.get("tool_calls", ())],
                "logprobs": choice["logprobs"] and choice["logprobs"]["content"],
                "ids": choice["token_ids"],
                "reason": (choice["finish_reason"], choice["stop_reason"]),
            }
            for choice, message in zip(made["choices"], messages, strict=True)
        ]
        return [*found, {"completion_tokens": made["usage"]["completion_tokens"]}]
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert response.text.endswith("data: [DONE]\n\n") and not any("error" in event for event in events)
    choices: dict[int, dict] = {}
    for event in events:
        for choice in event["choices"]:
            found = choices.setdefault(
                choice["index"], {"content": "", "calls": [], "logprobs": None, "ids": [], "reason": None}
            )
            delta = choice["delta"]
            found["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                if call.get("id"):
                    found["calls"].append({"name": call["function"]["name"], "arguments": ""})
                found["calls"][-1]["arguments"] += call["function"]["arguments"]
            if choice.get("logprobs"):
                found["logprobs"] = [*(found["logprobs"] or ()), *choice["logprobs"]["content"]]
            found["ids"] += choice.get("token_ids") or ()
            if choice["finish_reason"]:
                assert found["reason"] is None
                found["reason"] = choice["finish_reason"], choice.get("stop_reason")
    for found in choices.values():
        if found["calls"]:
            found["content"] = found["content"] or None
    usage = {"completion_tokens": events[-1]["usage"]["completion_tokens"]}
    return [*(found for _, found in sorted(choices.items())), usage]


def rounded(answer: list[dict]) -> list[dict]:
    """An answer with log-probabilities to three digits: their last bits depend on the batch."""
    return json.loads(json.dumps(answer), parse_float=lambda text: round(float(text), 3))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("body", BODIES)
async def test_a_death_at_any_point_goes_unseen(dying, body, stream, wide):
    """Without ``wide`` streamed answers meet deaths at half of the points, and whole ones at the others."""
    client, deaths = dying
    asked = BODIES[body]
    wanted = rounded(await answer(client, asked, stream=False))
    assert wanted == rounded(await answer(client, asked, stream=True))
    for number, (name, points) in enumerate(POINTS.items()):
        if not wide and number % 2 != stream:
            continue
        # The context's length is asked for once.
        points = [point for point in points if point[0] != "max_model_len"]
        if not points:
            continue
        deaths.planted, deaths.happened = list(points), []
        assert rounded(await answer(client, asked, stream=stream)) == wanted, name
        # A short answer may end before the update after which it would have been lost.
        late = [point for point in points if point[0] == "update" and point[1] > 1]
        assert late or deaths.happened == points, name


async def test_a_death_before_the_context_s_length_is_known(running, config):
    deaths = Deaths([("max_model_len", 0), ("max_model_len", 1)])
    async with dying_client("pocket", config, running.pocket.stages, deaths, REPLAY) as client:
        found = await answer(client, BODIES["images"], stream=False)
    assert "red" in found[0]["content"] or "square" in found[0]["content"]
    assert len(deaths.happened) == 2


async def test_a_request_without_a_seed_gets_one_for_all_its_tries(dying):
    client, deaths = dying
    asked = {"messages": HELLO, "max_tokens": 12, "temperature": 1.5}
    deaths.planted = [("update", 1), ("update", 0), ("update", 1)]
    await answer(client, asked, stream=False)
    assert len(deaths.seeds) == 4 and len({*deaths.seeds}) == 1 and None not in deaths.seeds
    await answer(client, asked, stream=False)
    assert len({*deaths.seeds}) == 2


async def test_embeddings_are_carried_on(running, config):
    stages = running.app.models["tests/vectors"].stages
    body = {"model": "tests/vectors", "messages": ask("What is this?", circle("red"))}
    deaths = Deaths()
    async with dying_client("tests/vectors", config, stages, deaths, REPLAY) as client:
        wanted = (await client.post("/v1/embeddings", json=body)).json()["data"]
        deaths.planted = [("prepare", 1), ("encode", 0), ("rows", 0), ("embed", 0), ("embed", 1)]
        found = (await client.post("/v1/embeddings", json=body)).json()["data"]
    assert not deaths.planted
    assert found[0]["embedding"] == pytest.approx(wanted[0]["embedding"], abs=1e-5)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_that_kills_every_replica_fails_with_one_error(running, config, stream):
    deaths = Deaths([("update", 1)] * 20)
    replay = ReplayConfig(max_losses=2, pause_s=0.001)
    async with dying_client("pocket", config, running.pocket.stages, deaths, replay) as client:
        body = {"model": "pocket", "messages": HELLO, "max_tokens": 50, "stream": stream}
        response = await client.post("/v1/chat/completions", json=body | {"ignore_eos": True})
    assert len(deaths.happened) == 3
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        errors = [event["error"] for event in events if "error" in event]
        assert [error["code"] for error in errors] == ["unavailable"] and "error" in events[-1]
    else:
        assert response.status_code == 503 and response.headers["retry-after"]


async def test_a_stage_that_does_not_come_back_is_not_waited_for_for_ever():
    patience = Patience(ReplayConfig(patience_s=0.05))
    calls = 0

    async def lost_then_silent():
        nonlocal calls
        calls += 1
        if calls == 1:
            raise StageLost("gone")
        await asyncio.Future()

    with pytest.raises(Unavailable) as caught:
        await patience.call(lost_then_silent)
    assert not isinstance(caught.value, StageLost) and "0.05 seconds" in caught.value.message


async def test_a_timer_that_is_early_ends_a_request_by_its_time():
    """uvloop's timers may be half a millisecond early: the clock has not come to the limit then."""

    class EarlyLoop(asyncio.SelectorEventLoop):
        def call_at(self, when, *args, **kwargs):
            return super().call_at(when - 0.005, *args, **kwargs)

    async def waits(patience_s, seconds):
        now = asyncio.get_running_loop().time()
        patience = Patience(ReplayConfig(pause_s=0.001, patience_s=patience_s), deadline=now + seconds)
        await patience.bear(StageLost("gone"))
        await patience.wait(asyncio.Event().wait())

    def run(*limits):
        with asyncio.Runner(loop_factory=EarlyLoop) as runner:
            runner.run(waits(*limits))

    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(run, 60, 0.05)
    with pytest.raises(Unavailable):
        await asyncio.to_thread(run, 0.05, 60)


async def test_a_full_queue_is_borne_after_a_loss_only():
    results: list[Exception | str] = [Overloaded("full"), StageLost("gone"), Overloaded("full"), "done"]

    async def work():
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    with pytest.raises(Overloaded):
        await Patience(REPLAY).call(work)
    assert await Patience(ReplayConfig(max_losses=1, pause_s=0.001)).call(work) == "done"


class LostOnce:
    """A language model whose first stream is lost after ``given`` tokens of two."""

    def __init__(self, given: int) -> None:
        self._given: int | None = given

    async def generate(
        self, request: Generation, media: Sequence[Rows], _: Any
    ) -> AsyncIterator[StreamUpdate]:
        had = 0 if request.progress is None else request.progress.num_tokens
        given, self._given = self._given, None
        for number in range(had, 2):
            if number == given:
                raise StageLost("gone")
            delta = OutputDelta(0, "a", [7], finish_reason="stop" if number else None)
            times = EngineTimes(0.0, 1.0) if number == had else None
            yield StreamUpdate(request.request_id, [delta], Usage(1, number + 1), None, number == 1, times)


@pytest.mark.parametrize("given", [0, 1])
async def test_the_first_token_s_time_is_told_once(given):
    """Of the engine that gave it. Another one's first token is the client's second."""
    request = Generation("one", EngineInput([1]), SamplingParams(temperature=0.0))

    async def nothing() -> Sequence[Rows]:
        return ()

    stage: Any = LostOnce(given)
    updates = [update async for update in carried_on(stage, request, (), nothing, Patience(REPLAY))]
    assert [update.times is not None for update in updates] == [True, False]
    assert [update.request_id for update in updates] == ["one", "one"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_whose_time_is_up_ends_with_an_error(running, config, stream):
    """Everything that it held is free at once: see ``idle_afterwards``."""
    (spec,) = [spec for spec in config.models if spec.name == "pocket"]
    pipeline = Pipeline(spec, running.pocket.stages, ThreadPoolExecutor(1), timeout_s=0.3)
    api = create_api(config.ingress, {"pocket": pipeline})
    body = {"model": "pocket", "messages": HELLO, "max_tokens": 900, "stream": stream, "ignore_eos": True}
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60) as client:
        response = await client.post("/v1/chat/completions", json=body)
    if response.status_code == 200:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert events[-1]["error"]["code"] == "deadline_exceeded"
    else:
        assert response.status_code == 504 and response.json()["error"]["code"] == "deadline_exceeded"


async def test_a_timeout_of_the_work_itself_is_not_the_patience_s():
    patience = Patience(REPLAY)
    calls = 0

    async def work():
        nonlocal calls
        calls += 1
        raise StageLost("gone") if calls == 1 else TimeoutError

    with pytest.raises(TimeoutError):
        await patience.call(work)


async def test_a_carried_on_request_is_charged_once(running, config):
    deaths = Deaths([("prepare", 1), ("encode", 0), ("encode", 1)])
    key = KeyConfig(name="a", key="k", max_active_tokens=500)
    config = config.model_copy(update={"ingress": config.ingress.model_copy(update={"keys": [key]})})
    async with dying_client("pocket", config, running.pocket.stages, deaths, REPLAY) as client:
        client.headers["Authorization"] = "Bearer k"
        # Charged twice it would ask for more than the limit.
        found = await answer(client, BODIES["images"] | {"max_tokens": 300}, stream=False)
    assert found and not deaths.planted


async def test_pauses_grow_up_to_their_limit_however_many_losses_there_are(monkeypatch):
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    # Other tasks of the event loop, such as a server's, must go on sleeping.
    monkeypatch.setattr("deployments.replay.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    patience = Patience(ReplayConfig(max_losses=2000, pause_s=0.3))
    for _ in range(1100):
        await patience.bear(StageLost("gone"))
    # A full queue is not asked more often for that.
    await patience.bear(Overloaded("full"))
    assert pauses[:4] == [0.3, 0.6, 1.2, 2.0] and {*pauses[3:]} == {2.0}


async def test_a_request_that_is_cancelled_in_its_pause_has_lost_nothing(caplog):
    """Ray Serve cancels a request's calls before the request itself, when its client leaves."""
    losses: list[int] = []

    def bear(pause_s: float) -> asyncio.Task[None]:
        patience = Patience(ReplayConfig(pause_s=pause_s), on_loss=lambda: losses.append(1))
        return asyncio.ensure_future(patience.bear(StageLost("gone")))

    paused = bear(600)
    await asyncio.sleep(0)
    paused.cancel()
    with pytest.raises(asyncio.CancelledError):
        await paused
    assert not losses and "carried on" not in caplog.text
    await bear(0.001)
    assert losses == [1] and "a request is carried on after it lost a part of the server: gone" in caplog.text
