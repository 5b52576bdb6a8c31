"""Streams that break off and are taken up again at another ingress."""

import json
from contextlib import aclosing
from dataclasses import dataclass, field

import httpx
import pytest

from deployments.answers import ChoiceDelta
from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.resumption import EvenCuts
from engine.parsers.events import CallArguments, CallStart, Reasoning, Text
from tests.chaos.load import BODIES
from tests.deployments.asgi import AppTransport

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
async def test_a_stream_goes_on_at_another_ingress_as_if_it_had_not_broken_off(running, kind):
    body = streamed(BODIES.get(kind, UNSEEDED), return_token_ids=kind != "image")
    one, other = ingress(running), ingress(running)
    whole = await Stream().read(one, body)
    wanted, count = whole.joined(), len(whole.events)
    assert whole.ended and count > 4 and len({*wanted["ids"]}) == 1
    for cut in {1, 2, count // 3, count // 2, count - 2, count - 1}:
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
