"""The Responses API, by OpenAI's client."""

import json
import re

import openai
import pytest
from openai.types.responses import (
    ResponseCustomToolCall,
    ResponseCustomToolCallInputDeltaEvent,
    ResponseCustomToolCallInputDoneEvent,
)

from tests.deployments.pictures import circle, data_url

pytestmark = pytest.mark.usefixtures("idle_afterwards")

RED = {"type": "input_image", "image_url": data_url(circle("red")), "detail": "auto"}
QUESTION = [{"role": "user", "content": [RED, {"type": "input_text", "text": "What color is the circle?"}]}]
PARAMETERS = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
TOOL = {"type": "function", "name": "report", "parameters": PARAMETERS}


async def ask(client, **options):
    given = {"model": "pocket", "input": "Hello!", "temperature": 0, "max_output_tokens": 60}
    return await client.responses.create(**given | options)


async def test_an_answer_to_an_image_is_the_chats(client):
    made = await ask(client, input=QUESTION)
    content = [
        {"type": "image_url", "image_url": {"url": RED["image_url"]}},
        {"type": "text", "text": "What color is the circle?"},
    ]
    chat = await client.chat.completions.create(
        model="pocket", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=60
    )
    assert made.output_text == chat.choices[0].message.content and "red" in made.output_text
    assert made.status == "completed" and made.object == "response"
    assert made.usage.input_tokens == chat.usage.prompt_tokens
    assert made.usage.output_tokens == chat.usage.completion_tokens


async def test_events_build_up_the_whole_response(client):
    # Each with blocks of its own: what earlier requests have left is part of the usage.
    question = {"input": QUESTION, "top_logprobs": 1}
    whole = await ask(client, **question, extra_body={"cache_salt": "whole"})
    stream = await ask(client, **question, stream=True, extra_body={"cache_salt": "stream"})
    events = [event async for event in stream]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    last = events[-1].response
    assert last.output_text == whole.output_text and last.usage == whole.usage
    found = last.output[0].content[0].logprobs
    assert [entry.token for entry in found] == [e.token for e in whole.output[0].content[0].logprobs]
    assert "".join(entry.token for entry in found).startswith(whole.output_text)


async def test_a_conversation_goes_on_by_the_response_before(client):
    first = await ask(client, input=QUESTION)
    second = await ask(client, input="What shape is it?", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    turns = [
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What shape is it?"},
    ]
    alone = await ask(client, input=[*QUESTION, *turns])
    assert second.output_text == alone.output_text
    assert second.usage.input_tokens == alone.usage.input_tokens


async def test_what_is_kept(client):
    made = await ask(client, metadata={"key": "value"}, instructions="Be brief.")
    assert await client.responses.retrieve(made.id) == made
    assert made.metadata == {"key": "value"} and made.instructions == "Be brief."
    items = (await client.responses.input_items.list(made.id)).data
    assert [item.content[0].text for item in items] == ["Hello!"]
    await client.responses.delete(made.id)
    for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            await gone(made.id)
    with pytest.raises(openai.NotFoundError) as refused:
        await ask(client, previous_response_id=made.id)
    assert refused.value.param == "previous_response_id"
    loose = await ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(loose.id)


async def test_a_function_call_and_its_output(client):
    options = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    made = await ask(client, **options, max_output_tokens=200)
    (call,) = made.output
    assert call.type == "function_call" and call.name == "report" and call.status == "completed"
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    later = await ask(client, input=[output], previous_response_id=made.id)
    assert later.status in ("completed", "incomplete")
    again = [{"role": "user", "content": "Hello!"}, call.model_dump(exclude_none=True), output]
    assert (await ask(client, input=again)).output_text == later.output_text


@pytest.mark.parametrize("background", [False, True])
async def test_a_call_of_a_function_under_function_in_a_namespace(client, background):
    nested = {"type": "function", "function": {"name": "report", "parameters": PARAMETERS}}
    space = {"type": "namespace", "name": "eye", "tools": [nested]}
    options = {"tools": [space], "tool_choice": "required", "parallel_tool_calls": False}
    made = await ask(client, **options, background=background, stream=background)
    if background:
        made = [event async for event in made][-1].response
    assert made.status in ("completed", "incomplete")
    assert [(call.namespace, call.name) for call in made.output] == [("eye", "report")]


async def test_a_call_of_a_function_in_a_namespace(client):
    """Its item has both names, in a stream and when it is streamed again; the prompt has them as one."""
    space = {"type": "namespace", "name": "eye", "description": "Sees.", "tools": [TOOL]}
    asked = {"tools": [space], "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = (await ask(client, **asked)).output
    assert (call.type, call.namespace, call.name) == ("function_call", "eye", "report")
    events = [e async for e in await ask(client, **asked, background=True, stream=True)]
    assert next(e.item for e in events if e.type == "response.output_item.added").namespace == "eye"
    name = events[-1].response.id
    again = [e async for e in await client.responses.retrieve(name, stream=True, starting_after=1)]
    assert [e.to_dict() for e in again] == [e.to_dict() for e in events[2:]]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    question = {"role": "user", "content": "Hello!"}
    items = [question, call.to_dict(), output]
    plain = [question, {**call.to_dict(), "namespace": None, "name": "eye.report"}, output]
    counts = [
        await client.responses.input_tokens.count(model="pocket", input=given) for given in (items, plain)
    ]
    assert counts[0].input_tokens == counts[1].input_tokens


async def test_a_streamed_function_call(client):
    choice = {"type": "function", "name": "report"}
    options = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    events = [event async for event in await ask(client, **options, stream=True)]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == events[-1].response.output[0].arguments


async def test_a_custom_call_and_its_output(client):
    """Whole, streamed, and streamed again; in a namespace, too. The conversation goes on behind it."""
    form = {"type": "grammar", "syntax": "regex", "definition": '[a-f]{3,9}\\n"'}
    note = {"type": "custom", "name": "note", "format": form}
    asked = {"tool_choice": "required", "parallel_tool_calls": False}
    made = await ask(client, tools=[note], **asked)
    (call,) = made.output
    assert isinstance(call, ResponseCustomToolCall) and call.name == "note"
    assert re.fullmatch(form["definition"], call.input)
    space = {"type": "namespace", "name": "eye", "tools": [note]}
    events = [e async for e in await ask(client, tools=[space], **asked, background=True, stream=True)]
    deltas = [e.delta for e in events if isinstance(e, ResponseCustomToolCallInputDeltaEvent)]
    (done,) = [e for e in events if isinstance(e, ResponseCustomToolCallInputDoneEvent)]
    item = events[-1].response.output[0]
    assert "".join(deltas) == done.input == item.input and (item.namespace, item.name) == ("eye", "note")
    name = events[-1].response.id
    again = [e async for e in await client.responses.retrieve(name, stream=True, starting_after=1)]
    assert [e.to_dict() for e in again] == [e.to_dict() for e in events[2:]]
    output = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "done"}
    lark = {"type": "grammar", "syntax": "lark", "definition": 'start: ("a" | /[\\n"]/)~2..4'}
    made_by_lark = await ask(client, tools=[note | {"format": lark}], **asked)
    assert re.fullmatch('[a\\n"]{2,4}', made_by_lark.output[0].input)
    later = await ask(client, input=[output], previous_response_id=made.id)
    items = [{"role": "user", "content": "Hello!"}, call.to_dict(), output]
    assert (await ask(client, input=items)).output_text == later.output_text


async def test_a_form_for_the_answer(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    text = {"format": {"type": "json_schema", "name": "S", "schema": schema, "strict": True}}
    made = await ask(client, text=text)
    assert json.loads(made.output_text)["n"] in (1, 2)


async def test_an_answer_that_is_cut(client):
    made = await ask(client, max_output_tokens=2)
    assert made.status == "incomplete" and made.incomplete_details.reason == "max_output_tokens"
    assert made.output[0].status == "incomplete"


async def test_a_background_response(client):
    started = await ask(client, background=True, max_output_tokens=900, extra_body={"ignore_eos": True})
    assert started.status == "in_progress" and started.background
    cancelled = await client.responses.cancel(started.id)
    assert cancelled.status == "cancelled"
    assert (await client.responses.retrieve(started.id)).status == "cancelled"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input": []}, "input", None),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", None),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "input[0].content[0].file_data",
            None,
        ),
        ({"input": [{"role": "king", "content": "a"}]}, "input[0].role", None),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function", "name": ""}]}, "tools[0].name", None),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "name": "tools[7]"}},
            "tool_choice.name",
            None,
        ),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", None),
        # The form of Chat Completions.
        (
            {"text": {"format": {"type": "json_schema", "json_schema": {"schema": {}}}}},
            "text.format.schema",
            None,
        ),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format", None),
        ({"max_output_tokens": 9000}, "max_output_tokens", "context_length_exceeded"),
        ({"input": "word " * 4000}, "input", "context_length_exceeded"),
        ({"conversation": "c"}, "conversation", "unsupported_parameter"),
        ({"background": True, "stream": True, "top_logprobs": 1}, "top_logprobs", "unsupported_parameter"),
        ({"extra_body": {"n": 2}}, "n", "unsupported_parameter"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs", "unsupported_parameter"),
        ({"extra_body": {"return_token_ids": True}}, "return_token_ids", "unsupported_parameter"),
        (
            {"text": {"format": {"type": "json_object"}}, "extra_body": {"guided_regex": "a"}},
            "guided_regex",
            None,
        ),
    ],
)
async def test_what_is_refused(client, change, param, code):
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(client, **change)
    assert refused.value.param == param and code in (None, refused.value.code)


@pytest.mark.parametrize("stream", [False, True])
async def test_deep_values_are_kept_and_sent_back(http, stream):
    """The body itself and what holds the value count: these are as deep as they may be."""
    deep: dict = {}
    for _ in range(254):
        deep = {"a": deep}
    given = {"model": "pocket", "input": [{"role": "user", "content": "Hello!"}], "max_output_tokens": 1}
    made = await http.post("/v1/responses", json={**given, "metadata": deep, "stream": stream})
    last = json.loads(made.text.split("data: ")[-1])["response"] if stream else made.json()
    kept = (await http.get(f"/v1/responses/{last['id']}")).json()
    assert made.status_code == 200 and last["metadata"] == kept["metadata"] == deep


async def test_tokens_of_an_input_are_those_of_its_response(client):
    asked = {"input": QUESTION, "instructions": "Be brief."}
    made = await ask(client, **asked)
    counted = await client.responses.input_tokens.count(model="pocket", **asked)
    assert counted.input_tokens == made.usage.input_tokens and counted.object == "response.input_tokens"
    further = {"input": "And its shape?", "previous_response_id": made.id}
    counted = await client.responses.input_tokens.count(model="pocket", **further)
    assert counted.input_tokens == (await ask(client, **further)).usage.input_tokens
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.input_tokens.count(
            model="pocket", input=[{"type": "item_reference", "id": "a"}]
        )
    assert refused.value.param == "input[0].type"


async def test_items_of_an_input_come_page_by_page(client):
    given = [
        {"role": "user", "content": str(index), "id": "same" if index < 2 else None} for index in range(23)
    ]
    made = await ask(client, input=given, max_output_tokens=1)
    items = client.responses.input_items

    def texts(page) -> list[int]:
        return [int(item.content if isinstance(item.content, str) else item.content[0].text) for item in page]

    first = await items.list(made.id)
    assert texts(first.data) == [*range(22, 2, -1)] and first.has_more
    assert (first.first_id, first.last_id) == (first.data[0].id, first.data[-1].id)
    assert texts([item async for item in first]) == [*range(22, -1, -1)]
    assert texts([item async for item in items.list(made.id, limit=1, order="asc")]) == [*range(23)]
    last = await items.list(made.id, order="asc", after=first.data[2].id)
    assert texts(last.data) == [21, 22] and not last.has_more
    for options, param in (
        ({"order": "up"}, "order"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"after": "none"}, "after"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await items.list(made.id, **options)
        assert refused.value.param == param


async def test_a_conversation_waits_for_the_end_of_a_response(client):
    long = {"max_output_tokens": 900, "background": True, "extra_body": {"ignore_eos": True}}
    running = await ask(client, **long)
    with pytest.raises(openai.BadRequestError, match="still made") as refused:
        await ask(client, previous_response_id=running.id)
    assert refused.value.param == "previous_response_id"
    await client.responses.cancel(running.id)
    assert (await ask(client, previous_response_id=running.id, max_output_tokens=1)).status == "incomplete"
