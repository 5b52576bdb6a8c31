"""Anthropic's Messages API, by Anthropic's client."""

import base64
import json
import time

import anthropic
import httpx2
import pytest
from anthropic.types import Message

from tests.deployments.asgi import AppTransport2
from tests.deployments.pictures import ask, circle, data_url

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]
SCHEMA = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
TOOL = {"name": "report", "description": "Reports.", "input_schema": SCHEMA}
COLOR = {"type": "text", "text": "What color is the circle?"}


def encoded(color: str) -> str:
    return data_url(circle(color)).partition(",")[2]


def image(color: str) -> dict:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(color)}}


@pytest.fixture
def claude(running) -> anthropic.AsyncAnthropic:
    http = httpx2.AsyncClient(transport=AppTransport2(running.app.api), timeout=60)
    return anthropic.AsyncAnthropic(base_url="http://test", api_key="none", max_retries=0, http_client=http)


def request(**options):
    return {"model": "pocket", "messages": HELLO, "temperature": 0, "max_tokens": 60} | options


def greedy(**options):
    """Greedy sampling for Anthropic's client, which knows no temperature."""
    given = request(**options)
    more = {"temperature": given.pop("temperature"), **given.pop("extra_body", {})}
    return {**given, "extra_body": more}


async def create(claude, **options) -> Message:
    return await claude.messages.create(**greedy(**options))


async def streamed(claude, **options) -> tuple[list, Message]:
    """All events, and the message that the client puts together from them."""
    async with claude.messages.stream(**greedy(**options)) as stream:
        events = [event async for event in stream]
        return events, await stream.get_final_message()


async def test_an_answer_to_an_image_is_the_chats(claude, client):
    made = await create(claude, messages=[{"role": "user", "content": [image("red"), COLOR]}])
    chat = await client.chat.completions.create(
        model="pocket",
        messages=ask("What color is the circle?", circle("red")),
        temperature=0,
        max_tokens=60,
    )
    assert made.content[0].text == chat.choices[0].message.content and "red" in made.content[0].text
    assert (made.stop_reason, made.role, made.type, made.model) == (
        "end_turn",
        "assistant",
        "message",
        "pocket",
    )
    usage = made.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens


async def test_an_image_by_its_address(claude, running):
    (running.pictures / "messages.png").write_bytes(base64.b64decode(encoded("blue")))
    source = {"type": "url", "url": f"{running.site}/messages.png"}
    made = await create(
        claude, messages=[{"role": "user", "content": [{"type": "image", "source": source}, COLOR]}]
    )
    assert "blue" in made.content[0].text


async def test_a_stream_builds_up_the_whole_message(claude):
    options = {"messages": [{"role": "user", "content": [image("red"), COLOR]}]}
    whole = await create(claude, **options)
    events = [event async for event in await claude.messages.create(**greedy(**options), stream=True)]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"} and len(kinds) > 6
    start = events[0].message
    assert start.content == [] and start.stop_reason is None and start.usage.output_tokens == 0
    assert start.usage.input_tokens + start.usage.cache_read_input_tokens > 0
    _, built = await streamed(claude, **options)
    assert built.content[0].text == whole.content[0].text and built.stop_reason == whole.stop_reason
    assert built.usage.output_tokens == whole.usage.output_tokens


async def test_events_are_named_and_a_ping_follows_the_first(http):
    response = await http.post("/v1/messages", json=request(stream=True))
    events = [part.split("\n") for part in response.text.strip().split("\n\n")]
    for name, data in events:
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert [name for name, _ in events[:2]] == ["event: message_start", "event: ping"]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({"type": "any", "disable_parallel_tool_use": True}, {"report", "stop"}),
        ({"type": "tool", "name": "report", "disable_parallel_tool_use": True}, {"report"}),
    ],
)
async def test_calls(claude, choice, names):
    tools = [TOOL, {"type": "custom", "name": "stop", "input_schema": {"type": "object"}}]
    made = await create(claude, tools=tools, tool_choice=choice, max_tokens=200)
    (call,) = made.content
    assert call.type == "tool_use" and call.id.startswith("toolu_") and call.name in names
    assert made.stop_reason == "tool_use"
    if call.name == "report":
        assert call.input["color"] in ("red", "blue") and len(call.input) == 1
    events, built = await streamed(claude, tools=tools, tool_choice=choice, max_tokens=200)
    assert (built.content[0].name, built.content[0].input) == (call.name, call.input)
    pieces = "".join(event.partial_json for event in events if event.type == "input_json")
    assert json.loads(pieces) == call.input


async def test_tools_that_may_not_be_called_change_nothing(claude):
    plain = await create(claude)
    made = await create(claude, tools=[TOOL], tool_choice={"type": "none"})
    assert made.content == plain.content


async def test_results_of_calls_with_images(claude, http):
    messages = [
        {"role": "user", "content": [image("blue"), {"type": "text", "text": "Show me a circle."}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "report", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [image("red")]},
                {"type": "text", "text": "What color is it?"},
            ],
        },
    ]
    made = await create(claude, messages=messages)
    counted = await claude.messages.count_tokens(model="pocket", messages=messages)
    as_chat = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_url(circle("blue"))}},
                {"type": "text", "text": "Show me a circle."},
            ],
        },
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "report", "arguments": "{}"}}
            ],
        },
        {
            "role": "tool",
            "tool_call_id": "t1",
            "content": [{"type": "image_url", "image_url": {"url": data_url(circle("red"))}}],
        },
        {"role": "user", "content": "What color is it?"},
    ]
    chat = (
        await http.post(
            "/v1/chat/completions",
            json={"model": "pocket", "messages": as_chat, "temperature": 0, "max_tokens": 60},
        )
    ).json()
    assert made.content[0].text == chat["choices"][0]["message"]["content"]
    assert counted.input_tokens == chat["usage"]["prompt_tokens"]


async def test_the_system_prompt_is_a_text_or_blocks(claude):
    counts = [
        (await claude.messages.count_tokens(model="pocket", messages=HELLO, **options)).input_tokens
        for options in (
            {},
            {"system": "Be short."},
            {"system": [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]},
            {"system": "Be short.", "thinking": {"type": "enabled", "budget_tokens": 1024}},
        )
    ]
    assert counts[1] == counts[2] == counts[3] != counts[0]


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_sequences(claude, stream):
    whole = (await create(claude)).content[0].text
    word = whole.split()[2]
    made = (
        (await streamed(claude, stop_sequences=[word, "~~"]))[1]
        if stream
        else await create(claude, stop_sequences=[word, "~~"])
    )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", word)
    assert made.content[0].text == whole.partition(word)[0]


async def test_the_reasons_for_the_end(claude):
    assert (await create(claude, max_tokens=2)).stop_reason == "max_tokens"
    # Clients send one maximum with every request, whatever the context is.
    long = [{"role": "user", "content": "red " * 990}]
    made = await create(claude, messages=long, max_tokens=64000, extra_body={"ignore_eos": True})
    assert made.stop_reason == "model_context_window_exceeded"


async def test_an_answer_goes_on_with_the_assistants_text(claude):
    whole = (await create(claude)).content[0].text
    begun = whole.partition("!")[0] + "!"
    made = await create(claude, messages=[*HELLO, {"role": "assistant", "content": begun}])
    assert begun + made.content[0].text == whole


async def test_a_schema(claude):
    form = {"type": "json_schema", "schema": SCHEMA}
    # The second name is that of the beta.
    for fields in ({"output_config": {"format": form}}, {"extra_body": {"output_format": form}}):
        made = await create(claude, **fields)
        assert json.loads(made.content[0].text)["color"] in ("red", "blue")
    with pytest.raises(anthropic.BadRequestError, match=r"output_format: Give output_config\.format alone"):
        await create(claude, output_config={"format": form}, extra_body={"output_format": form})


def user(*blocks) -> dict:
    return {"messages": [{"role": "user", "content": [COLOR, *blocks]}]}


#: What is refused: fields, status, kind of error, and words of the message.
REFUSED = {
    "no role": ({"messages": [{"content": "x"}]}, 400, "invalid_request_error", "messages[0]"),
    "no messages": ({"messages": []}, 400, "invalid_request_error", "messages"),
    "no maximum": ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens must be in"),
    "unknown block": (user({"type": "audio"}), 400, "invalid_request_error", "messages[0].content[1].type"),
    "block without text": (user({"type": "text"}), 400, "invalid_request_error", "content[1].text"),
    "a document": (
        user({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}),
        400,
        "invalid_request_error",
        "messages[0].content[1].source",
    ),
    "no image": (
        user({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}),
        400,
        "invalid_request_error",
        "messages[0].content[1].source",
    ),
    "forbidden address": (
        user({"type": "image", "source": {"type": "url", "url": "http://10.0.0.1/a.png"}}),
        400,
        "invalid_request_error",
        "messages[0].content[1].source",
    ),
    "server's tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        400,
        "invalid_request_error",
        "tools[0]",
    ),
    "bad schema": (
        {"tools": [{"name": "a", "input_schema": {"type": "array"}}]},
        400,
        "invalid_request_error",
        "tools[0].input_schema",
    ),
    "unknown tool": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}},
        400,
        "invalid_request_error",
        "tool_choice",
    ),
    "place as a tool": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "tools[7]"}},
        400,
        "invalid_request_error",
        "tool_choice names 'tools[7]'",
    ),
    "container": ({"container": "a"}, 400, "invalid_request_error", "container"),
    "prompt_logprobs": ({"prompt_logprobs": 1}, 400, "invalid_request_error", "prompt_logprobs"),
    "token ids": ({"return_token_ids": True}, 400, "invalid_request_error", "/v1/chat/completions or"),
    "stop": ({"stop_sequences": ["a"] * 17}, 400, "invalid_request_error", "stop_sequences has 17"),
    "overflow": (
        {"messages": [{"role": "user", "content": "red " * 2000}]},
        400,
        "invalid_request_error",
        "prompt is too long",
    ),
    "no model": ({"model": "none"}, 404, "not_found_error", "does not exist"),
    "no chat model": ({"model": "tests/vectors"}, 400, "invalid_request_error", ""),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_in_anthropics_form(http, name, stream):
    fields, status, kind, words = REFUSED[name]
    response = await http.post("/v1/messages", json=request(stream=stream, **fields))
    body = response.json()
    assert response.status_code == status, body
    assert body["type"] == "error" and body["error"]["type"] == kind
    assert body.keys() == {"type", "error", "request_id"}
    assert words in body["error"]["message"], body


async def test_errors_around_the_endpoint_have_the_same_form(http):
    wrong = (await http.post("/v1/messages", content=b"{")).json()
    assert wrong["type"] == "error" and wrong["error"]["type"] == "invalid_request_error"
    method = await http.get("/v1/messages/count_tokens")
    assert method.status_code == 405 and method.json()["type"] == "error"


async def test_models_in_anthropics_form(claude):
    models = [model async for model in claude.models.list()]
    assert [(model.type, model.id, model.display_name) for model in models] == [
        ("model", name, name) for name in ("pocket", "tests/vectors")
    ]
    pocket = await claude.models.retrieve("pocket")
    assert pocket == models[0] and pocket.max_input_tokens == 1024 and pocket.lifecycle == "active"
    assert abs(pocket.created_at.timestamp() - time.time()) < 24 * 3600
    with pytest.raises(anthropic.NotFoundError):
        await claude.models.retrieve("none")


async def test_answers_and_errors_have_the_requests_id_where_anthropics_clients_look_for_it(http):
    found = await http.post("/v1/messages", json=request(max_tokens=1), headers={"x-request-id": "mine"})
    assert (found.status_code, found.headers["request-id"]) == (200, "mine")
    refused = await http.post("/v1/messages", json={})
    assert refused.json()["request_id"] == refused.headers["request-id"] == refused.headers["x-request-id"]
    assert "request-id" not in (await http.get("/v1/models")).headers
