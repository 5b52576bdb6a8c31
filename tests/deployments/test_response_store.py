"""Responses that several ingresses share."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import ANY

import httpx
import openai
import pytest

from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.protocol.responses import ResponsesRequest
from deployments.response_store import Asked, Found, KeptResponses, ResponseStore, StoredResponse
from engine.errors import Unavailable
from tests.deployments.asgi import AppTransport
from tests.serving import wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")


class LostKeeper:
    """A keeper whose process is gone."""

    def __getattr__(self, name):
        async def lost(*args):
            raise Unavailable("gone")

        return lost


def ingress(running, keeper, config: IngressConfig = IngressConfig()) -> openai.AsyncOpenAI:
    """A client of a further ingress of the application."""
    api = create_api(config, running.app.api.state.pipelines, keeper=keeper)
    http = httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


@pytest.fixture
def two(running) -> list[openai.AsyncOpenAI]:
    """Clients of two ingresses that share their responses."""
    keeper = KeptResponses(16, 1 << 20, 60.0)
    return [ingress(running, keeper) for _ in range(2)]


async def ask(client, **options):
    given = {"model": "pocket", "input": "Hello!", "temperature": 0, "max_output_tokens": 20}
    return await client.responses.create(**given | options)


async def until(condition: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again until the answer is true; returns it."""
    deadline = time.monotonic() + 120
    while not (found := await condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)
    return found


async def ended(client, name: str):
    """A response of which no more comes."""

    async def response():
        found = await client.responses.retrieve(name)
        return found if found.status != "in_progress" else None

    return await until(response)


async def endless(client):
    """A response that runs in the background until it is stopped, or a long while."""
    options = {"background": True, "max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
    return await ask(client, **options)


async def test_each_ingress_knows_the_responses_of_the_other(two):
    one, other = two
    made = await ask(one, instructions="Be brief.")
    assert await other.responses.retrieve(made.id) == made
    items = (await other.responses.input_items.list(made.id)).data
    assert [item.content[0].text for item in items] == ["Hello!"]
    later = [await ask(each, input="Hello again!", previous_response_id=made.id) for each in two]
    assert later[0].output_text == later[1].output_text
    assert later[0].usage.input_tokens == later[1].usage.input_tokens > made.usage.input_tokens
    await other.responses.delete(made.id)
    for each in two:
        with pytest.raises(openai.NotFoundError, match="send the conversation again"):
            await each.responses.retrieve(made.id)


async def test_a_stream_is_kept_before_its_last_event(two):
    one, other = two
    async for event in await ask(one, stream=True):
        if event.type == "response.created":
            assert (await other.responses.retrieve(event.response.id)).status == "in_progress"
        if event.type == "response.completed":
            found = await other.responses.retrieve(event.response.id)
            assert found.status == "completed" and found.output_text == event.response.output_text
            await ask(other, input="Hello again!", previous_response_id=found.id)


async def test_a_client_that_leaves_its_stream(two):
    one, other = two
    options = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
    stream = await ask(one, stream=True, **options)
    name = (await anext(aiter(stream))).response.id
    await stream.close()

    assert (await ended(other, name)).status == "cancelled"


class FullKeeper(KeptResponses):
    """A keeper that never says that it has taken a new response."""

    def __init__(self) -> None:
        super().__init__(16, 1 << 20, 60.0)
        self.asked = asyncio.Event()

    async def put(self, name, owner, data):
        self.asked.set()
        await asyncio.Future()


async def test_a_client_that_leaves_while_its_response_is_put_away(running):
    keeper = FullKeeper()
    asking = ask(ingress(running, keeper), stream=True, extra_body={"ignore_eos": True})
    asked = asyncio.ensure_future(_kinds(await asyncio.wait_for(asking, 60)))
    await asyncio.wait_for(keeper.asked.wait(), 60)
    assert not running.pocket.language_model.is_idle()
    asked.cancel()
    await running.wait_until_idle()


async def test_a_background_response_is_stopped_by_way_of_the_other_ingress(two, running):
    one, other = two
    started = await endless(one)
    assert (await other.responses.retrieve(started.id)).status == "in_progress"
    assert (await other.responses.cancel(started.id)).status == "cancelled"
    await running.wait_until_idle()
    assert (await one.responses.retrieve(started.id)).status == "cancelled"
    # Cancelling it once more changes nothing.
    assert (await one.responses.cancel(started.id)).status == "cancelled"


@pytest.mark.parametrize("limit", ["ingress", "key"])
async def test_background_responses_have_places_and_can_be_looked_at_and_ended(running, limit):
    limits = {"max_active_requests": 2}
    if limit == "key":
        limits = {"keys": [{"name": "one", "key": "none", "max_active_requests": 2}]}
    client = ingress(running, KeptResponses(16, 1 << 20, 60.0), IngressConfig.model_validate(limits))
    first, second = await endless(client), await endless(client)
    with pytest.raises(openai.RateLimitError):
        await ask(client)
    assert (await client.responses.retrieve(first.id)).status == "in_progress"
    await client.responses.cancel(first.id)

    async def let_in():
        with contextlib.suppress(openai.RateLimitError):
            return await ask(client)

    await until(let_in)
    # So have streams of their events.
    stream = await client.responses.retrieve(first.id, stream=True)
    with pytest.raises(openai.RateLimitError):
        await client.responses.retrieve(first.id, stream=True)
    await stream.close()
    await client.responses.cancel(second.id)
    await running.wait_until_idle()


async def test_a_background_response_that_is_deleted_stops(two, running):
    one, other = two
    started = await endless(one)
    await other.responses.delete(started.id)
    await running.wait_until_idle()
    with pytest.raises(openai.NotFoundError):
        await one.responses.retrieve(started.id)


async def test_a_response_whose_maker_has_died_has_failed(running, monkeypatch):
    now = 0.0
    monkeypatch.setattr("deployments.response_store.WATCH_S", 0.01)
    keeper = KeptResponses(16, 1 << 20, 3600.0, clock=lambda: now)
    client = ingress(running, keeper)
    alive = await endless(client)
    # Nobody makes this one.
    await ResponseStore(keeper).put(StoredResponse(alive.to_dict() | {"id": "resp_dead"}, [], []))
    assert (await client.responses.retrieve("resp_dead")).status == "in_progress"
    now = 31.0
    dead = await client.responses.retrieve("resp_dead")
    assert dead.status == "failed" and "was lost; ask again" in dead.error.message
    # Nothing of it is still made: its events are those of a failure, and a conversation may go on from it.
    assert (await _kinds(await client.responses.retrieve("resp_dead", stream=True)))[-1] == "response.failed"
    assert (await client.responses.cancel("resp_dead")).status == "failed"
    assert (await ask(client, previous_response_id="resp_dead")).status == "completed"

    # The maker of the other one says every now and then that it lives.
    async def lives():
        return (await client.responses.retrieve(alive.id)).status == "in_progress"

    await until(lives)
    await client.responses.cancel(alive.id)
    await running.wait_until_idle()


async def test_a_streamed_response_whose_maker_has_died_is_made_again_when_it_is_read(running):
    now = 0.0
    keeper = KeptResponses(16, 1 << 20, 3600.0, clock=lambda: now)
    client = ingress(running, keeper)
    whole = await ask(client)
    body = ResponsesRequest(model="pocket", input="Hello!", temperature=0, max_output_tokens=20)
    begun = {"id": "resp_dead", "status": "in_progress", "background": True, "output": [], "usage": None}
    messages = [{"role": "user", "content": "Hello!"}]
    dead = StoredResponse(whole.to_dict() | begun, [], messages, asked=Asked(body, 0, 0))
    await ResponseStore(keeper).put(dead)
    now = 31.0
    found = await client.responses.retrieve("resp_dead")
    assert found.status == "failed" and "was lost; read it with stream=true" in found.error.message
    assert (await ask(client, previous_response_id="resp_dead")).status == "completed"
    assert await _text(await client.responses.retrieve("resp_dead", stream=True)) == whole.output_text
    found = await client.responses.retrieve("resp_dead")
    assert found.status == whole.status and found.output_text == whole.output_text


async def test_a_background_response_ends(two):
    one, other = two
    started = await ask(one, background=True)
    whole = await ask(one)
    found = await ended(other, started.id)
    assert found.status == "completed" and found.output_text == whole.output_text


async def test_a_lost_store_costs_no_answer(running, caplog):
    client = ingress(running, LostKeeper())
    with caplog.at_level(logging.WARNING):
        made = await ask(client)
    assert made.status == "completed" and made.id in caplog.text
    kinds = [event.type async for event in await ask(client, stream=True)]
    assert kinds[-1] == "response.completed"
    await ask(client, background=True)
    kinds = [event.type async for event in await ask(client, background=True, stream=True)]
    assert kinds[-1] == "response.completed"
    with pytest.raises(openai.InternalServerError) as refused:
        await client.responses.retrieve(made.id)
    assert refused.value.status_code == 503


async def test_a_response_that_is_dropped_while_it_is_made_goes_on(running):
    """Because it is too large here. It is streamed to its end all the same."""
    client = ingress(running, KeptResponses(16, 100, 60.0))
    kinds = [event.type async for event in await ask(client, background=True, stream=True)]
    assert kinds[-1] == "response.completed"


async def test_a_server_that_keeps_nothing_makes_nothing_in_the_background(running):
    client = ingress(running, KeptResponses(0, 100, 60.0), IngressConfig(stored_responses=0))
    with pytest.raises(openai.BadRequestError, match="keeps no responses") as refused:
        await ask(client, background=True)
    assert refused.value.param == "background"
    assert (await ask(client)).status == "completed"


class SlowKeeper(KeptResponses):
    """A keeper that takes no end of a response until it ``goes_on``."""

    def __init__(self) -> None:
        super().__init__(16, 1 << 20, 60.0)
        self.hangs, self.goes_on = asyncio.Event(), asyncio.Event()

    async def update(self, name, data):
        self.hangs.set()
        await self.goes_on.wait()
        await super().update(name, data)


async def test_readers_of_a_response_that_is_cancelled_as_it_ends_are_not_left_waiting(running):
    keeper = SlowKeeper()
    one, other = ingress(running, keeper), ingress(running, keeper)
    stream = await ask(one, background=True, stream=True)
    name = (await anext(aiter(stream))).response.id
    await asyncio.wait_for(keeper.hangs.wait(), 60)
    await other.responses.cancel(name)
    kinds = await asyncio.wait_for(_kinds(stream), 60)
    assert kinds and not {"response.completed", "response.incomplete"} & {*kinds}
    assert (await other.responses.retrieve(name)).status == "cancelled"


async def _kinds(stream) -> list[str]:
    return [event.type async for event in stream]


async def test_clients_that_read_a_response_elsewhere_share_one_run(running):
    keeper = SlowKeeper()
    one, other = ingress(running, keeper), ingress(running, keeper)

    def answers() -> float:
        families = running.app.api.state.pipelines["pocket"].meter.families()
        (found,) = (each for each in families if each.name == "sightline_answers_total")
        return sum(count for _, count in found.samples)

    await running.wait_until_idle()
    before = answers()
    # Too long to become a prompt on the event loop, so that the readers come between each other.
    asked = {"input": "Hello! " * 100, "max_output_tokens": 60}
    stream = await ask(one, background=True, stream=True, **asked)
    name = (await anext(aiter(stream))).response.id
    readers = await asyncio.gather(*(other.responses.retrieve(name, stream=True) for _ in range(3)))
    # No run has ended before the last reader came.
    keeper.goes_on.set()
    texts = await asyncio.gather(*map(_text, [stream, *readers]))
    assert len({*texts}) == 1 and texts[0]
    assert answers() == before + 2


async def _text(stream) -> str:
    return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])


async def test_what_is_too_much_or_too_old_is_dropped():
    now = 0.0
    kept = KeptResponses(3, 100, 60.0, clock=lambda: now)
    for name in "abcd":
        await kept.put(name, "", b"x" * 10)
    assert [await kept.get(name, "") is not None for name in "abcd"] == [False, True, True, True]
    await kept.update("b", b"x" * 85)
    assert [await kept.get(name, "") is not None for name in "bcd"] == [True, False, True]
    assert kept.num_bytes == 95
    now = 50.0
    await kept.put("e", "", b"x" * 5)
    now = 60.5
    assert [await kept.get(name, "") is not None for name in "bde"] == [False, False, True]
    await kept.put("f", "", b"x" * 101)
    assert await kept.get("f", "") is None and len(kept) == 0 and kept.num_bytes == 0
    await kept.update("f", b"x")
    assert len(kept) == 0


async def test_a_maker_that_waits_for_a_store_that_stood_still_lives():
    now = 0.0
    kept = KeptResponses(3, 100, 3600.0, clock=lambda: now)

    async def silent_s() -> float:
        found = await kept.get("a", "")
        assert found is not None
        return found.silent_s

    await kept.put("a", "", b"x")
    makers = [asyncio.ensure_future(kept.stopped("a")) for _ in range(2)]
    await asyncio.sleep(0)
    now = 50.0
    assert await silent_s() == 0
    for number, maker in enumerate(makers):
        maker.cancel()
        await asyncio.wait({maker})
        now += 7
        assert await silent_s() == 7 * number


class BrokenKeeper(KeptResponses):
    """A keeper that fails once when it is asked whether a response is cancelled."""

    def __init__(self) -> None:
        super().__init__(16, 1 << 20, 60.0)
        self.failed = False

    async def stopped(self, name):
        if not self.failed:
            self.failed = True
            raise ZeroDivisionError
        return await super().stopped(name)


async def test_no_error_of_a_store_stops_the_work(monkeypatch, caplog):
    monkeypatch.setattr("deployments.response_store.WATCH_S", 0.01)
    keeper = BrokenKeeper()
    await keeper.put("a", "", b"x")
    work = asyncio.ensure_future(asyncio.sleep(3600))
    waiting = asyncio.ensure_future(ResponseStore(keeper).unless_stopped("a", work))
    await wait_until(lambda: "can't be learnt" in caplog.text, 60)
    assert not waiting.done() and not work.done()
    await keeper.cancel("a", "")
    await asyncio.wait_for(waiting, 60)
    assert work.cancelled()


async def test_responses_belong_to_keys():
    kept = KeptResponses(3, 100, 60.0)
    await kept.put("a", "one", b"x")
    assert await kept.get("a", "two") is None and not await kept.delete("a", "two")
    await kept.cancel("a", "two")
    assert await kept.get("a", "one") == Found(b"x", silent_s=ANY)
    waiting = asyncio.ensure_future(kept.stopped("a"))
    await kept.cancel("a", "one")
    await asyncio.wait_for(waiting, 60)
    assert await kept.get("a", "one") == Found(b"x", True, ANY)
