"""Refused requests: the status, the field and the words of the answer."""

import json

import pytest
from PIL import Image

from tests.deployments.pictures import ask, circle, data_url

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]


async def post(http, body, path: str = "/v1/chat/completions") -> tuple[int, dict]:
    data = body if isinstance(body, bytes | str) else json.dumps(body)
    response = await http.post(path, content=data, headers={"Content-Type": "application/json"})
    return response.status_code, response.json()


def image(url: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def blank_png(side: int) -> str:
    """Many pixels in few bytes."""
    return data_url(Image.new("1", (side, side)))


CASES = {
    "model": ({"model": "gpt"}, 404, "model", "served here: 'pocket', 'tests/vectors'"),
    "type": ({"max_tokens": "many"}, 400, "max_tokens", "integer"),
    "range": ({"temperature": -1}, 400, "temperature", "[0, inf]"),
    "penalty": ({"presence_penalty": 9}, 400, "presence_penalty", "[-2, 2]"),
    "n": ({"n": 1000}, 400, "n", "128"),
    "id": ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "vocabulary"),
    "length": ({"max_tokens": 5000}, 400, "max_tokens", "context"),
    "empty": ({"messages": []}, 400, "messages", "at least one"),
    "role": ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "must be one of"),
    "template": ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "not supported"),
    "template option": (
        {"chat_template_kwargs": {"tokenize": True}},
        400,
        "chat_template_kwargs",
        "tokenize",
    ),
    "stream option": ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
    "length under the newer name": (
        {"max_completion_tokens": 5000},
        400,
        "max_completion_tokens",
        "1024 tokens. However, you requested 5010 tokens (10 in the prompt, 5000 in the completion): lower "
        "max_completion_tokens",
    ),
    "logprobs": (
        {"logprobs": True, "top_logprobs": 21},
        400,
        "top_logprobs",
        "top_logprobs must be in [0, 20]",
    ),
    "logprobs off": ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    "nested regex": ({"structured_outputs": {"regex": "(("}}, 400, "structured_outputs.regex", "regex"),
    "no choice": ({"structured_outputs": {"choice": []}}, 400, "structured_outputs.choice", "choice"),
    "sound": ({"modalities": ["text", "audio"]}, 400, "modalities", "no audio"),
    "beams": ({"use_beam_search": True}, 400, "use_beam_search", "not supported"),
    "search": ({"web_search_options": {"a": 1}}, 400, "web_search_options", "not supported"),
    "tool": ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name", "name"),
    "function": (
        {"functions": [{"name": "f", "parameters": 5}]},
        400,
        "functions[0].parameters",
        "schema",
    ),
    "function call": ({"function_call": {"name": "f"}}, 400, "function_call", "needs functions"),
    "both forms": (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]},
        400,
        "functions",
        "exclude each other",
    ),
    "mixed forms": (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "function_call": {"name": "f"}},
        400,
        "function_call",
        "tool_choice",
    ),
    "server's tool": ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "functions and custom"),
    "custom tool": ({"tools": [{"type": "custom", "custom": {}}]}, 400, "tools[0].custom.name", "letters"),
    "tool choice": ({"tool_choice": "required"}, 400, "tool_choice", "needs tools"),
    "budget": ({"thinking_budget": -1}, 400, "thinking_budget", "greater than or equal to 0"),
    "long": ({"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "messages", "1024"),
    "private address": (
        {"messages": image("http://127.0.0.1/")},
        400,
        "messages[0].content[0].image_url.url",
        "is not public",
    ),
    "file": ({"messages": image("file:///etc/passwd")}, 400, "messages[0].content[0].image_url.url", "files"),
    "no base64": (
        {"messages": image("data:image/png;base64,@@@@")},
        400,
        "messages[0].content[0].image_url.url",
        "base64",
    ),
    "no picture": (
        {"messages": image("data:image/png;base64,aGVsbG8=")},
        400,
        "messages[0].content[0].image_url.url",
        "formats",
    ),
    "bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        400,
        "response_format",
        "schema",
    ),
    "long minimum": ({"min_tokens": 5000}, 400, "min_tokens", "maximum context length is 1024 tokens"),
    "constraint and minimum": (
        {"guided_regex": "a", "min_tokens": 2},
        400,
        "min_tokens",
        "min_tokens cannot be combined with the parameter guided_regex",
    ),
    "bad regex": ({"guided_regex": "("}, 400, "guided_regex", "regex"),
    "two constraints": (
        {"guided_regex": "a", "guided_choice": ["a"]},
        400,
        "guided_choice",
        "Only one",
    ),
    "embedding model": ({"model": "tests/vectors"}, 400, "model", "embeddings"),
    "bomb": (
        {"messages": image(blank_png(9000))},
        413,
        "messages[0].content[0].image_url.url",
        "64000000 pixels",
    ),
    "large pictures": ({"messages": image(blank_png(7000)) * 6}, 413, "messages", "256000000 are allowed"),
    "elongated picture": (
        {"messages": image(data_url(Image.new("RGB", (2010, 10))))},
        400,
        "messages[0].content[0].image_url.url",
        "too elongated",
    ),
    "many pictures": (
        {"messages": image(data_url(circle("red"))) * 9},
        413,
        "messages[8].content[0].image_url.url",
        "limit_mm_per_prompt allows 8",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_bad_request_is_told_what_to_change(http, case, stream):
    change, status, param, words = CASES[case]
    if "stream_options" in change and stream:
        pytest.skip("stream_options are right for streams")
    found, body = await post(http, {"model": "pocket", "messages": HELLO, "stream": stream} | change)
    error = body["error"]
    assert (found, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000])
async def test_a_body_that_is_no_json_object(http, body):
    status, found = await post(http, body)
    assert status == 400 and "JSON" in found["error"]["message"]


async def test_marks_typed_in_a_text_are_only_text(client):
    """No image can be claimed by writing its placeholder."""
    made = await client.chat.completions.create(
        model="pocket",
        messages=ask("<|vision_start|><|image_pad|><|vision_end|> What color is the circle?", circle("red")),
        max_tokens=20,
        temperature=0,
    )
    assert made.choices[0].finish_reason in ("stop", "length")


async def test_a_request_that_is_too_long_has_the_code_that_clients_look_for(http):
    long = [{"role": "user", "content": "word " * 4000}]
    for change in ({"messages": long}, {"max_tokens": 5000}, {"max_tokens": 5000, "stream": True}):
        status, body = await post(http, {"model": "pocket", "messages": HELLO} | change)
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 1024 tokens" in body["error"]["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"unheard_of": 1},
        {"user": "me", "metadata": {"a": "b"}, "store": True, "verbosity": "medium", "prompt_cache_key": "k"},
        {"reasoning_effort": "none"},
        {"thinking": {"type": "disabled"}},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {}, "use_beam_search": False, "return_token_ids": False},
        {"tools": [], "functions": [], "tool_choice": "none"},
        {"modalities": ["text"], "top_p": 0},
        {"priority": None, "cache_salt": None, "add_generation_prompt": None, "stream_options": None},
        {"response_format": {"type": "text", "json_schema": None}, "tools": None, "chat_template": None},
    ],
)
async def test_fields_that_ask_for_nothing_are_taken(http, change):
    status, body = await post(http, {"model": "pocket", "messages": HELLO, "max_tokens": 2} | change)
    assert status == 200, body


NESTED = {
    "/v1/chat/completions": (
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True, "new_1": 1}},
        ["stream_options.new_1"],
    ),
    "/v1/responses": (
        {
            "input": "Hello!",
            "text": {"format": {"type": "text", "new_2": 1}},
            "reasoning": {"summary": "auto", "new_3": 1},
        },
        ["reasoning.new_3", "text.format.new_2"],
    ),
    "/v1/messages": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "new_4": 1}
                    ],
                    "new_5": 1,
                }
            ],
            "tools": [
                {"name": "one", "input_schema": {}, "cache_control": {"type": "ephemeral"}, "new_6": 1}
            ],
            "tool_choice": {"type": "none", "new_7": 1},
        },
        ["content[].new_4", "messages[].new_5", "tool_choice.new_7", "tools[].new_6"],
    ),
}


@pytest.mark.parametrize("path", NESTED)
async def test_an_unknown_field_within_a_parameter_is_logged_once(http, caplog, path):
    given, names = NESTED[path]
    body = {"model": "pocket", "messages": HELLO, "max_tokens": 2} | given
    if path == "/v1/responses":
        del body["messages"]
    for _ in range(2):
        assert (await http.post(path, json=body)).status_code == 200
    logged = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert sorted(logged) == [f"the unknown field {name!r} is ignored" for name in names]


async def test_an_unknown_field_is_logged_once(http, caplog):
    for _ in range(2):
        await post(http, {"model": "pocket", "messages": HELLO, "max_tokens": 2, "never_heard_of": 1})
    assert [record.getMessage() for record in caplog.records].count(
        "the unknown field 'never_heard_of' is ignored"
    ) == 1


def nested(levels: int, inner: dict) -> dict:
    for _ in range(levels):
        inner = {"type": "object", "properties": {"a": inner}}
    return inner


DEEP = [
    lambda deep: {"tool_choice": "required", "tools": [
        {"type": "function", "function": {"name": "f", "parameters": deep}}]},
    lambda deep: {"messages": [*HELLO, {"role": "assistant", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps(deep)}}]}]},
    lambda deep: {"chat_template_kwargs": {"a": deep}},
    lambda deep: {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": deep}}},
    lambda deep: {"metadata": deep, "unheard_of": deep},
]  # fmt: skip


@pytest.mark.parametrize("made", DEEP, ids=["tool", "arguments", "options", "format", "unread"])
@pytest.mark.parametrize("levels", [90, 300, 450])
async def test_deep_nesting_is_never_a_fault_of_the_server(http, made, levels):
    given = {
        "model": "pocket",
        "messages": HELLO,
        "max_tokens": 2,
        **made(nested(levels, {"type": "string"})),
    }
    status, body = await post(http, given)
    assert status == 200 or (status == 400 and "nested" in body["error"]["message"]), body
