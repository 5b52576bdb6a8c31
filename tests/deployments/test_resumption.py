"""Streams that break off and are taken up again at another ingress."""

import asyncio
import json
import zlib
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx
import openai
import pytest

from deployments.answers import ChoiceDelta
from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.response_store import KeptResponses
from deployments.resumption import AnswerChanged, EvenCuts, Had, Resumption
from engine.errors import Unavailable
from engine.parsers.events import CallArguments, CallStart, Reasoning, Text
from tests.chaos.load import BODIES, SCHEMA
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle
from tests.serving import wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]
UNSEEDED = {"messages": HELLO, "temperature": 1.5, "max_tokens": 40, "ignore_eos": True}


def ingress(running) -> httpx.AsyncClient:
    """A client of a further ingress of the application."""
    api = create_api(IngressConfig(), running.app.api.state.pipelines)
    return httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)


@dataclass
class Stream:
    """The events of a stream: their ids and data."""

    events: list[tuple[str, dict]] = field(default_factory=list)
    ended: bool = False

    async def read(
        self, client: httpx.AsyncClient, body: dict, last: str = "", most: int = 10**9
    ) -> "Stream":
        """Read a stream until its end, or leave it after ``most`` events."""
        headers = {"Last-Event-ID": last} if last else {}
        name, count = "", 0
        async with (
            client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response,
            aclosing(response.aiter_lines()) as lines,
        ):
            if response.status_code != 200:
                raise AssertionError((await response.aread()).decode())
            async for line in lines:
                if line.startswith("id: "):
                    name = line.removeprefix("id: ")
                elif line == "data: [DONE]":
                    self.ended = True
                elif line.startswith("data: "):
                    self.events.append((name, json.loads(line.removeprefix("data: "))))
                    count += 1
                    if count == most:
                        return self
        return self

    def joined(self) -> dict:
        """The whole answer that the events build up."""
        answer: dict = {"ids": {event["id"] for _, event in self.events}}
        answer["created"] = {event["created"] for _, event in self.events}
        for _, event in self.events:
            for choice in event["choices"]:
                found = answer.setdefault(
                    choice["index"],
                    {"roles": 0, "text": "", "calls": [], "tokens": [], "logprobs": [], "reasons": []},
                )
                delta = choice["delta"]
                found["roles"] += "role" in delta
                found["text"] += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    if call.get("id"):
                        found["calls"].append([call["id"], call["function"]["name"], ""])
                    found["calls"][-1][2] += call["function"].get("arguments") or ""
                found["tokens"] += choice.get("token_ids") or ()
                tops = (choice.get("logprobs") or {}).get("content") or ()
                found["logprobs"] += [entry["token"] for entry in tops]
                found["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        return answer


def streamed(body: dict, **more) -> dict:
    return {"model": "pocket", "stream": True, "stream_options": {"event_ids": True}, **body, **more}


@pytest.mark.parametrize("kind", [*BODIES, "unseeded"])
async def test_a_stream_goes_on_at_another_ingress_as_if_it_had_not_broken_off(running, kind, wide):
    body = streamed(BODIES.get(kind, UNSEEDED), return_token_ids=kind != "image")
    # Each stream computes the whole answer.
    body["max_tokens"] = min(body["max_tokens"], 50)
    one, other = ingress(running), ingress(running)
    whole = await Stream().read(one, body)
    wanted, count = whole.joined(), len(whole.events)
    assert whole.ended and count > 1 and len({*wanted["ids"]}) == 1
    # Tokens that a grammar forces come in one event, so an answer may have few.
    cuts = {1, count // 2, count - 1} | ({2, count // 3, count - 2} if wide else set())
    for cut in cuts & {*range(1, count)}:
        begun = Stream(whole.events[:cut])
        found = await begun.read(other, body, begun.events[-1][0])
        assert found.ended and found.joined() == wanted, cut


async def test_a_stream_may_break_off_again_and_again(running):
    body = streamed(BODIES["several"], return_token_ids=True)
    clients = [ingress(running) for _ in range(3)]
    wanted = (await Stream().read(clients[0], body)).joined()
    stream, turns = Stream(), 0
    while not stream.ended:
        last = stream.events[-1][0] if stream.events else ""
        await stream.read(clients[turns % 3], body, last, most=25)
        turns += 1
        assert turns < 60
    found = stream.joined()
    assert turns > 3 and [found[index] for index in range(3)] == [wanted[index] for index in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: "7", "not the id of an event"),
        (lambda name: name.replace("chatcmpl-", "chatcmpl-x"), "not the id of an event"),
        (lambda name: name.rsplit(".", 1)[0] + ".1-2", "not the id of an event"),
    ],
)
async def test_an_id_that_no_stream_has_is_refused(running, change, message):
    client, body = ingress(running), streamed(UNSEEDED)
    begun = await Stream().read(client, body, most=3)
    headers = {"Last-Event-ID": change(begun.events[-1][0])}
    answer = await client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


async def test_an_id_of_another_request_is_refused(running):
    client = ingress(running)
    begun = await Stream().read(client, streamed(UNSEEDED), most=3)
    headers = {"Last-Event-ID": begun.events[-1][0]}
    answer = await client.post("/v1/chat/completions", json=streamed(UNSEEDED, top_p=0.5), headers=headers)
    assert answer.status_code == 400 and "another request" in answer.json()["error"]["message"]


async def test_an_answer_that_begins_in_another_way_is_no_continuation(running):
    client, body = ingress(running), streamed(UNSEEDED)
    begun = await Stream().read(client, body, most=12)
    *head, checksum, finished = begun.events[-1][0].split("-")
    name = "-".join([*head, str(int(checksum) ^ 1), finished])
    found = await Stream().read(client, body, name)
    ((_, event),) = found.events
    assert event["error"]["code"] == "answer_changed"


async def test_events_without_ids_are_as_before(running):
    client, body = ingress(running), streamed(BODIES["schema"])
    with_ids = await Stream().read(client, body)
    plain = await Stream().read(client, {**body, "stream_options": {}})
    assert {name for name, _ in plain.events} == {""}
    assert plain.joined()[0] == with_ids.joined()[0]


class MortalKeeper:
    """A keeper that its ingress, once that is dead, no longer reaches."""

    def __init__(self, keeper) -> None:
        self._keeper, self.dead = keeper, False

    def __getattr__(self, name):
        if self.dead:
            raise Unavailable("this ingress is dead")
        return getattr(self._keeper, name)


@dataclass
class Ingresses:
    """Two ingresses that share their responses, and the applications and keepers of them."""

    clients: list[httpx.AsyncClient]
    apis: list
    keepers: list[MortalKeeper]

    async def kill(self, number: int) -> None:
        """End the work of one without a word to the keeper."""
        self.keepers[number].dead = True
        for task in {*self.apis[number].state.background}:
            task.cancel()


@pytest.fixture
def two(running) -> Ingresses:
    keepers = [MortalKeeper(kept) for kept in [KeptResponses(16, 1 << 20, 60.0)] * 2]
    pipelines = running.app.api.state.pipelines
    apis = [create_api(IngressConfig(), pipelines, keeper=keeper) for keeper in keepers]
    clients = [
        httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60) for api in apis
    ]
    return Ingresses(clients, apis, keepers)


async def events_of(client, *, most: int = 10**9, method: str = "GET", path: str, **options) -> list[dict]:
    """The events of a streamed response, or the first ones."""
    found = []
    async with client.stream(method, path, **options) as response, aclosing(response.aiter_lines()) as lines:
        if response.status_code != 200:
            raise AssertionError((await response.aread()).decode())
        async for line in lines:
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == most:
                    break
    return found


async def begin(client, most: int = 10**9, **more) -> list[dict]:
    body = {"model": "pocket", "input": "Hello!", "background": True, "stream": True, **more}
    return await events_of(client, most=most, method="POST", path="/v1/responses", json=body)


async def rest(client, events: list[dict], *, most: int = 10**9) -> list[dict]:
    name, last = events[0]["response"]["id"], events[-1]["sequence_number"]
    query = {"stream": "true", "starting_after": last}
    return await events_of(client, most=most, path=f"/v1/responses/{name}", params=query)


def without_cached_tokens(events: list[dict]) -> list[dict]:
    for event in events:
        if usage := event.get("response", {}).get("usage"):
            usage["input_tokens_details"] = None
    return events


LONG = {"temperature": 1.2, "max_output_tokens": 300, "ignore_eos": True}
TOOLS = [{"type": "function", "name": "report", "parameters": SCHEMA}]


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1.0, "max_output_tokens": 60},
        {"temperature": 0, "max_output_tokens": 90, "tools": TOOLS, "tool_choice": "required"},
        {"input": ask("What shape is this?", circle("red")), "max_output_tokens": 16},
    ],
    ids=["text", "tools", "image"],
)
async def test_a_response_that_has_ended_is_streamed_again_by_each_ingress(two, more):
    if isinstance(more.get("input"), list):
        (message,) = more["input"]
        image, text = message["content"]
        parts = [
            {"type": "input_image", "image_url": image["image_url"]["url"]},
            {"type": "input_text", "text": text["text"]},
        ]
        more = {**more, "input": [{"role": "user", "content": parts}]}
    whole = await begin(two.clients[0], **more)
    assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
    assert whole[-1]["type"] in ("response.completed", "response.incomplete")
    for client in two.clients:
        for cut in (1, len(whole) // 2, len(whole) - 1):
            assert whole[:cut] + await rest(client, whole[:cut]) == whole


async def test_a_client_that_leaves_reads_on_while_the_response_is_made(two):
    begun = await begin(two.clients[0], most=12, **LONG)
    name = begun[0]["response"]["id"]
    assert two.apis[0].state.logs.keys() == {name}
    # Two clients read the rest at the same time: no work is done twice.
    first, second = await asyncio.gather(*(rest(two.clients[0], begun) for _ in range(2)))
    assert first == second and first[-1]["type"] == "response.incomplete"
    assert [event["sequence_number"] for event in begun + first] == list(range(12 + len(first)))
    kept = (await two.clients[1].get(f"/v1/responses/{name}")).json()
    assert kept == first[-1]["response"]
    assert not two.apis[0].state.logs


@pytest.mark.parametrize("dies", [False, True], ids=["alive", "dead"])
async def test_a_stream_of_an_ingress_is_taken_up_by_another(two, dies):
    begun = await begin(two.clients[0], most=30, **LONG)
    if dies:
        await two.kill(0)
        await wait_until(lambda: not two.apis[0].state.background)
        assert (await two.clients[1].get(f"/v1/responses/{begun[0]['response']['id']}")).json()[
            "status"
        ] == "in_progress"
    found = begun + await rest(two.clients[1], begun)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == text
    assert found[-1]["response"]["usage"]["output_tokens"] == 300
    if not dies:
        # The first one has made the same answer.
        await wait_until(lambda: not two.apis[0].state.logs)
        again = begun + await rest(two.clients[0], begun)
        assert without_cached_tokens(again) == without_cached_tokens(found)


@pytest.mark.parametrize(
    ("query", "param"),
    [({"stream": "true", "starting_after": "x"}, "starting_after"), ({"stream": "true"}, "stream")],
)
async def test_streams_that_there_are_not(two, query, param):
    body = {"model": "pocket", "input": "Hello!", "background": True, **LONG}
    name = (await two.clients[0].post("/v1/responses", json=body)).json()["id"]
    answer = await two.clients[1].get(f"/v1/responses/{name}", params=query)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    await two.clients[1].post(f"/v1/responses/{name}/cancel")
    await wait_until(lambda: not two.apis[0].state.background)
    again = await events_of(two.clients[1], path=f"/v1/responses/{name}", params={"stream": "true"})
    assert [event["type"] for event in again] == ["response.created", "response.in_progress"]


@pytest.mark.parametrize("fields", [{"stream": True}, {"background": True}, {}], ids=str)
async def test_events_whose_numbers_do_not_stay_are_not_taken_up(two, fields):
    """Text comes in other pieces each time, so that a number would be another event's."""
    body = {"model": "pocket", "input": "Hello!", "temperature": 0, **fields}
    if fields.get("stream"):
        events = await events_of(two.clients[0], method="POST", path="/v1/responses", json=body)
        name = events[-1]["response"]["id"]
    else:
        name = (await two.clients[0].post("/v1/responses", json=body)).json()["id"]
    await wait_until(lambda: not two.apis[0].state.background)
    path, query = f"/v1/responses/{name}", {"stream": "true"}
    assert (await events_of(two.clients[1], path=path, params=query))[-1]["type"] == "response.completed"
    refused = await two.clients[1].get(path, params={**query, "starting_after": 2})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "starting_after"


async def test_openai_s_client_takes_up_a_stream(two):
    one, other = (
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client)
        for client in two.clients
    )
    name, last, text = "", -1, ""
    stream = await one.responses.create(model="pocket", input="Hello!", background=True, stream=True)
    async for event in stream:
        last = event.sequence_number
        if event.type == "response.created":
            name = event.response.id
        if event.type == "response.output_text.delta":
            text += event.delta
            break
    await stream.close()
    async for event in await other.responses.retrieve(name, stream=True, starting_after=last):
        assert event.sequence_number == last + 1
        last = event.sequence_number
        if event.type == "response.output_text.delta":
            text += event.delta
    assert event.type == "response.completed" and event.response.output_text == text


async def test_a_stream_of_a_response_that_is_cancelled_ends(two):
    begun = await begin(two.clients[0], most=5, **LONG)
    name = begun[0]["response"]["id"]
    reading = asyncio.ensure_future(rest(two.clients[0], begun))
    await two.clients[1].post(f"/v1/responses/{name}/cancel")
    await reading
    await wait_until(lambda: not two.apis[0].state.background)
    assert (await two.clients[1].get(f"/v1/responses/{name}")).json()["status"] == "cancelled"


def test_a_call_of_which_the_client_has_a_part_belongs_to_another_answer():
    """Its name is sent whole or not at all."""
    had = {0: Had(tokens=1, characters=1, checksum=zlib.crc32(b"\0"))}
    again = Resumption("chatcmpl-0", 1, 7, "0", had)
    with pytest.raises(AnswerChanged):
        list(again.unseen(ChoiceDelta(0, [CallStart(0, "f")], [1])))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_cut_alike_however_the_text_came(size):
    text = "Once upon a time, there was a\nvery-long-word-without-any-space here " + "x" * 40
    events = [Reasoning("so be it"), Text(text), CallStart(0, "f"), CallArguments(0, '{"a": "b c"}')]
    pieces = []
    for event in events:
        if isinstance(event, CallStart):
            pieces.append(event)
        else:
            parts = [event.text[i : i + size] for i in range(0, len(event.text), size)]
            pieces += [
                type(event)(part) if not isinstance(event, CallArguments) else CallArguments(0, part)
                for part in parts
            ]
    cuts = EvenCuts()
    found = [
        event
        for number, piece in enumerate(pieces)
        for event in cuts.cut(
            ChoiceDelta(0, [piece], [], finish_reason="stop" if number == len(pieces) - 1 else None)
        ).events
    ]
    whole = EvenCuts().cut(ChoiceDelta(0, events, [], finish_reason="stop")).events
    assert found == whole
    assert "".join(event.text for event in whole if isinstance(event, Text)) == text
    assert all(len(event.text) <= 16 for event in whole if not isinstance(event, CallStart))
    assert len(whole) > 12
