"""Answers of every kind, each cut after each of its tokens: a client sees what it sees without a loss."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import math
import re
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch
from safetensors.torch import save

from deployments.api import create_api
from deployments.config import AppConfig, ReplayConfig
from deployments.pipeline import Pipeline
from deployments.stages import Generation, LanguageModelStage, RowsLost, StageLost, Stages
from engine.loading import LoadedEngine, load_engine
from engine.mailbox import Taker
from engine.media.source import MediaSource
from engine.outputs import StreamUpdate
from engine.prompt import EmbeddedMedia
from tests import serving
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle, data_url, row_of_circles, square
from tests.engine.media.clips import filmed
from tests.engine.media.pdfs import page, pdf

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]
CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "messages")
)
GREEDY: dict[str, Any] = {"temperature": 0}
#: The model is sure of its words; among these tokens it is not, so another draw gives another answer.
FREE: dict[str, Any] = {"temperature": 2, "seed": 1, "allowed_token_ids": [2, *range(20, 90)]}
SEEDED = FREE | {"ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
#: A thought and an answer, written by a grammar.
THINKING = """start: "<think>" /[a-f]{8}/ "</think>" /[a-f]{8}/"""
THOUGHT = {"temperature": 2, "seed": 3, "structured_outputs": {"grammar": THINKING}, "max_tokens": 45}
FUNCTION = {"type": "function", **TOOL["function"]}
ANTHROPIC_TOOL = {"name": "f", "input_schema": SCHEMA}


def url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def about(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "What color is it?"}]}]


RED_PAGE = url(pdf([page("red", (0.9, 0.1, 0.1))]), "application/pdf")
PDF = {"type": "file", "file": {"file_data": RED_PAGE, "filename": "a.pdf", "dpi": 40}}
VIDEO = {"type": "video_url", "video_url": {"url": url(filmed(circle("red"), 4, 2), "video/mp4")}}
#: A part that the fixture ``rows`` makes.
ROWS: dict[str, Any] = {"type": "image_embeds"}

#: Paths and bodies of requests, each with what must survive a cut.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, {"messages": HELLO, **GREEDY}),
    "image": (CHAT, {"messages": ask("What shape is this?", square("blue")), **GREEDY}),
    "images and choices": (
        CHAT,
        {"messages": ask("How many?", row_of_circles(2), circle("red")), "n": 2, **SEEDED},
    ),
    "video": (
        CHAT,
        {"messages": about(VIDEO), **GREEDY, "max_tokens": 5},
    ),
    "document": (CHAT, {"messages": about(PDF), **GREEDY, "max_tokens": 5}),
    "embedding rows": (CHAT, {"messages": about(ROWS), **GREEDY, "max_tokens": 5}),
    "choices": (CHAT, {"messages": HELLO, "n": 3, **SEEDED}),
    "choices of different lengths": (
        CHAT,
        {"messages": HELLO, "n": 3, **FREE, "logit_bias": {"2": 1}, "max_tokens": 12},
    ),
    "log-probabilities": (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "n": 2, **SEEDED}),
    "scored prompt": (CHAT, {"messages": HELLO, "prompt_logprobs": 1, "logprobs": True, **SEEDED}),
    "penalties": (
        CHAT,
        {
            "messages": HELLO,
            **SEEDED,
            "repetition_penalty": 1.3,
            "frequency_penalty": 0.7,
            "presence_penalty": 0.4,
        },
    ),
    "truncated": (CHAT, {"messages": HELLO, **SEEDED, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
    "biased": (CHAT, {"messages": HELLO, **SEEDED, "logit_bias": {"40": 3, "41": -50}}),
    "bad words": (CHAT, {"messages": HELLO, **SEEDED, "bad_words": ["the", "a"]}),
    "least length": (CHAT, {"messages": HELLO, "temperature": 1, "seed": 4, "min_tokens": 8}),
    "stop string": (CHAT, {"messages": HELLO, **GREEDY, "stop": ["help", "zz"], "logprobs": True}),
    "stop string, included": (
        CHAT,
        {"messages": HELLO, **GREEDY, "stop": ["help"], "include_stop_str_in_output": True},
    ),
    "schema": (CHAT, {"messages": HELLO, **GREEDY, "response_format": FORMAT, "max_tokens": 45}),
    "schema, choices": (
        CHAT,
        {
            "messages": HELLO,
            "n": 2,
            "temperature": 1,
            "seed": 8,
            "response_format": FORMAT,
            "max_tokens": 45,
        },
    ),
    "any object": (
        CHAT,
        {"messages": HELLO, "temperature": 1, "seed": 8, "response_format": {"type": "json_object"}},
    ),
    "regex": (
        CHAT,
        {"messages": HELLO, "temperature": 1, "seed": 8, "structured_outputs": {"regex": "[a-f]{6,12}"}},
    ),
    "choice": (
        CHAT,
        {"messages": HELLO, **GREEDY, "structured_outputs": {"choice": ["alpha beta gamma", "omega psi"]}},
    ),
    "required call": (
        CHAT,
        {
            "messages": HELLO,
            **GREEDY,
            "tools": [TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": False,
            "max_tokens": 80,
        },
    ),
    "calls": (
        CHAT,
        {
            "messages": HELLO,
            "temperature": 1,
            "seed": 2,
            "tools": [TOOL],
            "tool_choice": "required",
            "max_tokens": 80,
        },
    ),
    "named call, choices": (
        CHAT,
        {
            "messages": HELLO,
            "temperature": 1,
            "seed": 2,
            "n": 2,
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "max_tokens": 80,
        },
    ),
    "thought": (CHAT, {"messages": HELLO, **THOUGHT, "n": 2}),
    "schema behind a thought": (
        CHAT,
        {"messages": HELLO, **GREEDY, "response_format": FORMAT, "max_tokens": 45},
    ),
    "token ids": (CHAT, {"messages": HELLO, **SEEDED, "return_token_ids": True, "n": 2}),
    "scored prompts with echo": (
        COMPLETIONS,
        {"prompt": ["Hello there", "The circle is"], "echo": True, "logprobs": 2, "n": 2, **SEEDED},
    ),
    "prompts with echo": (
        COMPLETIONS,
        {"prompt": ["Hello there", "The circle is"], "echo": True, **SEEDED},
    ),
    "prompts of token ids": (COMPLETIONS, {"prompt": [[5, 6, 7, 8], [9, 10]], **SEEDED}),
    "response": (RESPONSES, {"input": "Hello!", **SEEDED}),
    "response, call": (
        RESPONSES,
        {"input": "Hello!", **GREEDY, "tools": [FUNCTION], "tool_choice": "required", "max_tokens": 80},
    ),
    "response, schema": (
        RESPONSES,
        {
            "input": "Hello!",
            **GREEDY,
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
            "max_tokens": 45,
        },
    ),
    "response, thought": (RESPONSES, {"input": "Hello!", **THOUGHT, "top_logprobs": 1}),
    # Many tokens are parts of a character, and the stop string comes behind what might begin it.
    "response, log-probabilities": (
        RESPONSES,
        {
            "input": "Hello!",
            **SEEDED,
            "allowed_token_ids": [*range(85, 280)],
            "top_logprobs": 1,
            "stop": "zz",
        },
    ),
    "response, stop string": (RESPONSES, {"input": "Hello!", **GREEDY, "top_logprobs": 0, "stop": "help"}),
    "response, call cut by a stop string": (
        RESPONSES,
        {
            "input": "Hello!",
            **GREEDY,
            "tools": [FUNCTION],
            "tool_choice": "required",
            "stop": ['"a"'],
            "max_tokens": 80,
        },
    ),
    "message": (MESSAGES, {"messages": HELLO, **GREEDY}),
    "message, call": (
        MESSAGES,
        {
            "messages": HELLO,
            **GREEDY,
            "tools": [ANTHROPIC_TOOL],
            "tool_choice": {"type": "any"},
            "max_tokens": 80,
        },
    ),
    "message, thought": (MESSAGES, {"messages": HELLO, **THOUGHT}),
}

NOT_STREAMED = ("scored prompt", "scored prompts with echo")
#: Cuts of an answer, with ``wide`` and without.
MOST_CUTS = {True: 12, False: 4}

#: Updates of an answer's first try before it is lost; None: nothing is lost. Negative: every try is lost
#: after this many.
cut_at: ContextVar[int | None] = ContextVar("cut_at", default=None)


@dataclass
class CutStage:
    """A language model stage that is lost where :data:`cut_at` says.

    Args:
        stage: gives answers that are not cut, and the rests of others.
        engine: gives the beginnings: an update for each token, however busy the machine is.

    Attributes:
        loss: what is raised.
        begun: the updates of each answer, by its prompt.
        losses: how many tries were lost.
    """

    stage: LanguageModelStage
    engine: LoadedEngine
    loss: type[StageLost] = StageLost
    begun: dict[tuple[int, ...], list[StreamUpdate]] = field(default_factory=dict)
    losses: int = 0

    async def max_model_len(self) -> int:
        return await self.stage.max_model_len()

    async def generate(
        self, request: Generation, media: Sequence[EmbeddedMedia], relay: Taker | None
    ) -> AsyncIterator[StreamUpdate]:
        key, at = tuple(request.inputs.token_ids), cut_at.get()
        if at is None:
            self.begun[key] = self._token_by_token(request, media)
        elif at >= 0 and request.progress is None:
            for update in self.begun[key][:at]:
                update = replace(copy.deepcopy(update), request_id=request.request_id)
                if relay is None or not relay.takes(update):
                    yield update
            self.losses += 1
            raise self.loss("cut")
        count = 0
        async with aclosing(self.stage.generate(request, media)) as updates:
            async for update in updates:
                if relay is None or not relay.takes(update):
                    yield update
                count += 1
                if at is not None and count == -at and not update.finished:
                    self.losses += 1
                    raise self.loss("cut")

    def _token_by_token(self, request: Generation, media: Sequence[EmbeddedMedia]) -> list[StreamUpdate]:
        core, outputs = self.engine.core, self.engine.outputs
        params = copy.deepcopy(request.params)
        group = self.engine.requests.generation(request.request_id, request.inputs, params, media)
        outputs.add(group)
        for sequence in group.requests:
            core.add(sequence)
        found: list[StreamUpdate] = []
        while core.has_work:
            updates, stopped = outputs.process(core.step())
            for sequence in stopped:
                core.abort(sequence)
            # The usage is the group's own, and changes.
            found += [copy.deepcopy(update) for _, update in updates]
        return found


#: Fields that differ between any two requests, or say where a prompt's blocks were found.
_OWN = {
    *("id", "created", "created_at", "completed_at", "item_id", "call_id", "sequence_number", "obfuscation"),
    *("cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "system_fingerprint"),
}
_TEXTS = {
    *("content", "reasoning_content", "reasoning", "thinking"),
    *("text", "arguments", "delta", "partial_json"),
}
_PLACES = ("output_index", "content_index", "summary_index", "index")


def folded(events: list[dict[str, Any]]) -> tuple[dict[tuple[Any, ...], Any], list[Any]]:
    """What a stream says, however its text is cut into events: each field's content by its path, and in which
    order the parts of each choice, or the kinds of events, came."""
    content: dict[tuple[Any, ...], Any] = {}
    order: list[Any] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                if name not in _OWN:
                    walk(each, (*path, name))
        elif isinstance(value, list) and ("logprobs" in path or path[-1] == "token_ids"):
            content[path] = content.get(path, []) + value
        elif isinstance(value, list):
            for number, each in enumerate(value):
                walk(each, (*path, each.get("index", number) if isinstance(each, dict) else number))
        elif isinstance(value, str) and path[-1] in _TEXTS and path[0] in ("", *_DELTAS):
            content[path] = content.get(path, "") + value
            if value and path not in order and path[0] == "":
                order.append(path)
        elif value is not None:
            content[path] = value

    for event in events:
        kind = event.get("type", "")
        place = tuple(event[name] for name in _PLACES if name in event)
        walk(event, (kind, *place))
        if kind and order[-1:] != [(kind, *place)]:
            order.append((kind, *place))
    if "choices" in events[0]:
        # Choices run side by side.
        order.sort(key=lambda path: path[:3])
    return content, order


_DELTAS = (
    "response.output_text.delta",
    "response.function_call_arguments.delta",
    "response.reasoning_text.delta",
    "response.reasoning_summary_text.delta",
    "content_block_delta",
)


def same(found: Any, wanted: Any) -> bool:
    """Return whether both are equal. The last digits of log-probabilities depend on the batch."""
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, abs_tol=1e-3)
    if type(found) is not type(wanted):
        return False
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in found)
    if isinstance(found, list | tuple):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


def without_index(choice: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in choice.items() if name != "index"}


def without_own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_own(each) for name, each in value.items() if name not in _OWN}
    return [without_own(each) for each in value] if isinstance(value, list) else value


def with_cached(fields: dict[str, Any]) -> dict[str, Any]:
    """Count all input tokens: Anthropic's are those that no cache had."""
    if "cache_read_input_tokens" in fields:
        fields["input_tokens"] += fields["cache_read_input_tokens"]
    return fields


async def ask_for(client: httpx.AsyncClient, path: str, body: dict[str, Any], *, stream: bool) -> Any:
    """All that the answer says."""
    response = await client.post(path, json={**body, "stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return without_own(json.loads(response.text, object_hook=with_cached))
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(line, object_hook=with_cached) for line in lines if line != "[DONE]"]
    assert not any("error" in event and event["error"] for event in events), events
    return folded(events)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def rows(running) -> dict[str, Any]:
    """The part of a conversation with the embedding rows of a purple circle."""
    (pixels,) = await running.pocket.preprocessor.prepare(
        [MediaSource(0, "image", url=data_url(circle("purple")))]
    )
    embedded = await running.pocket.encoder.encode(pixels, "", 0.0)
    file = save({"rows": torch.from_numpy(embedded.rows.copy())})
    given = {"image_embeds": base64.b64encode(file).decode(), "image_grid_thw": list(pixels.item.grid)}
    return {"type": "image_embeds", "image_embeds": given}


def whole_body(kind: str, rows: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    path, body = KINDS[kind]
    body = {"model": "pocket", "max_tokens": 8, **body}
    if kind == "embedding rows":
        body["messages"] = about(rows)
    if path == RESPONSES:
        body["max_output_tokens"] = body.pop("max_tokens")
    return path, body


@dataclass
class Cut:
    """A stage that is lost, and clients of two applications over it: the second's model thinks."""

    stage: CutStage
    clients: dict[bool, httpx.AsyncClient]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def cut(running) -> AsyncIterator[Cut]:
    config = AppConfig.model_validate(serving.app_args())
    # No step brings more than a token.
    engine = load_engine(
        serving.changed_config(kv_cache_bytes=8 << 20, append_forced_tokens=False).models[0].engine
    )
    stage = CutStage(running.pocket.language_model, engine)
    stages = Stages(stage, running.pocket.preprocessor, running.pocket.encoder)
    clients = {}
    with ThreadPoolExecutor(1) as threads:
        for thinks in (False, True):
            parser = "think" if thinks else "none"
            spec = config.models[0].model_copy(update={"image_embeds": True, "reasoning_parser": parser})
            pipeline = Pipeline(spec, stages, threads, ReplayConfig(max_losses=12, pause_s=0.001))
            transport = AppTransport(create_api(config.ingress, {"pocket": pipeline}))
            clients[thinks] = httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60)
        yield Cut(stage, clients)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cut_after_any_token_goes_unseen(cut, rows, kind, wide):
    path, body = whole_body(kind, rows)
    client, stage = cut.clients["thought" in kind], cut.stage
    # Rows are made again from what the request keeps.
    stage.loss, stage.losses, stage.begun = RowsLost, 0, {}

    async def answered(at: int | None, stream: bool) -> Any:
        token = cut_at.set(at)
        try:
            return await ask_for(client, path, body, stream=stream)
        finally:
            cut_at.reset(token)

    modes = (False,) if kind in NOT_STREAMED else (False, True)
    wanted = {stream: await answered(None, stream) for stream in modes}
    tokens = max(map(len, stage.begun.values()))
    # Of long answers some cuts must do; each kind begins with another one.
    apart = tokens // MOST_CUTS[wide] + 1
    cuts = range(len(kind) % apart, tokens + 1, apart)
    # Each try is lost, too, but not too often: pauses grow with every loss.
    tries = [(at, modes[at % len(modes)]) for at in (*cuts, -(tokens // 5) - 1, -(tokens // 3) - 1)]
    found = await asyncio.gather(*(answered(*each) for each in tries))
    assert len(cuts) > MOST_CUTS[wide] // 2 - 1 and stage.losses >= len(cuts)
    if "choices" in kind and "allowed_token_ids" in body:
        assert len({json.dumps(without_index(each)) for each in wanted[False]["choices"]}) == body["n"]
    if kind == "choices of different lengths":
        assert {each["finish_reason"] for each in wanted[False]["choices"]} == {"stop", "length"}
    if path == RESPONSES and "top_logprobs" in body and "thought" not in kind:
        # All tokens have one, whether or not they ended a character.
        (part,) = wanted[False]["output"][0]["content"]
        assert len(part["logprobs"]) == wanted[False]["usage"]["output_tokens"]
    if kind == "response, call cut by a stop string":
        (call,) = wanted[False]["output"]
        assert (wanted[False]["status"], call["status"]) == ("completed", "incomplete")
    if kind.endswith(" call"):
        assert not re.search(r'"(length|max_tokens|incomplete)"', json.dumps(wanted[False]))
    if body.get("structured_outputs", {}).get("grammar") == THINKING:
        # The thought is a part of its own.
        assert re.search(r'"[a-f]{8}"', json.dumps(wanted[False]))
    for (at, stream), answer in zip(tries, found, strict=True):
        assert same(answer, wanted[stream]), (at, stream, answer, wanted[stream])
