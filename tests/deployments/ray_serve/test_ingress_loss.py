"""One of two ingress replicas behind HAProxy dies: requests are sent on, and streams are taken up again."""

import asyncio
import json
import os
import signal
from typing import Any

import httpx
import openai
import pytest

from tests.chaos.victims import INGRESS, processes_of
from tests.metrics import is_idle, scraped
from tests.serving import Served, wait_for, wait_until

pytestmark = pytest.mark.ray

CHAT = {
    "model": "pocket",
    "messages": [{"role": "user", "content": "Hello!"}],
    "temperature": 1,
    "seed": 3,
    "max_tokens": 700,
    "ignore_eos": True,
}
BROKEN = (httpx.TransportError, openai.APIConnectionError, openai.InternalServerError)


@pytest.fixture
def server(served_under_load) -> Served:
    """The application with both replicas of its ingress, idle."""
    wait_for(lambda: len(processes_of(served_under_load, INGRESS)) == 2)
    wait_for(lambda: is_idle(scraped(served_under_load.root)))
    return served_under_load


def at_work(served: Served) -> float:
    return scraped(served.root)("engine_running_requests", model="pocket")


async def kill_one(served: Served, number: int) -> None:
    """Kill an ingress as soon as this many requests are at work."""
    await asyncio.to_thread(wait_for, lambda: at_work(served) >= number)
    os.kill(processes_of(served, INGRESS)[0], signal.SIGKILL)


async def test_requests_without_an_answer_yet_are_sent_on(server):
    async with httpx.AsyncClient(base_url=server.root, timeout=600) as client:

        async def ask() -> tuple[int, str]:
            answer = await client.post("/v1/chat/completions", json=CHAT)
            return answer.status_code, answer.json()["choices"][0]["message"]["content"]

        wanted = await ask()
        asked = [asyncio.ensure_future(ask()) for _ in range(6)]
        await kill_one(server, 6)
        assert [await each for each in asked] == [wanted] * 6


async def streamed(client: httpx.AsyncClient) -> tuple[str, int]:
    """A streamed chat's text, and how often it was taken up again."""
    body = {**CHAT, "stream": True, "stream_options": {"event_ids": True}}
    text, last, breaks = "", "", 0
    while True:
        try:
            headers = {"Last-Event-ID": last} if last else {}
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
                assert response.status_code in (200, 500, 503)
                name = ""
                async for line in response.aiter_lines():
                    if line == "data: [DONE]":
                        return text, breaks
                    if line.startswith("id: "):
                        name = line.removeprefix("id: ")
                    elif line.startswith("data: "):
                        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                        text += event["choices"][0]["delta"].get("content") or ""
                        last = name
        except BROKEN:
            pass
        breaks += 1
        await asyncio.sleep(0.2)


async def in_background(client: openai.AsyncOpenAI, seed_text: str) -> tuple[str, str, int]:
    """A background response's text by its stream, as it is kept, and how often its stream broke off."""
    text, last, name, breaks = "", -1, "", 0
    stream = await client.responses.create(
        model="pocket",
        input=seed_text,
        background=True,
        stream=True,
        max_output_tokens=700,
        extra_body={"ignore_eos": True, "seed": 4},
    )
    while True:
        try:
            async for event in stream:
                assert event.sequence_number == last + 1
                last = event.sequence_number
                if event.type == "response.created":
                    name = event.response.id
                if event.type == "response.output_text.delta":
                    text += event.delta
                if event.type == "response.incomplete":
                    return text, event.response.output_text, breaks
        except BROKEN:
            pass
        breaks += 1
        stream = await client.responses.retrieve(name, stream=True, starting_after=last)


async def test_streams_are_taken_up_again(server):
    async with httpx.AsyncClient(base_url=server.root, timeout=600) as client:
        responses = openai.AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=20, timeout=600)
        wanted, _ = await streamed(client)
        chats = [asyncio.ensure_future(streamed(client)) for _ in range(6)]
        others = [asyncio.ensure_future(in_background(responses, "Hello!")) for _ in range(4)]
        await kill_one(server, 10)
        found = [await each for each in chats]
        kept = [await each for each in others]
    assert [text for text, _ in found] == [wanted] * 6
    assert all(text == whole for text, whole, _ in kept) and len({text for text, _, _ in kept}) == 1
    # The requests are shared between the two replicas.
    assert sum(breaks for *_, breaks in [*found, *kept]) >= 1
    await wait_until(lambda: is_idle(scraped(server.root)))
