"""Tool calls over HTTP. The grammar writes the calls here, so any model can make them."""

import json
import re

import openai
import pytest
from openai.types.chat import ChatCompletionMessageCustomToolCall

pytestmark = pytest.mark.usefixtures("idle_afterwards")

HELLO = [{"role": "user", "content": "Hello!"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["color", "count"],
}
TOOLS = [
    {"type": "function", "function": {"name": "report", "description": "Reports.", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]


async def ask(client, **options):
    given = {"model": "pocket", "messages": HELLO, "max_tokens": 200, "temperature": 0, "tools": TOOLS}
    return await client.chat.completions.create(**given | options)


def check(name: str, arguments: str) -> None:
    if name == "report":
        found = json.loads(arguments)
        assert found["color"] in ("red", "blue") and 0 <= found["count"] <= 9 and len(found) == 2
    else:
        assert (name, json.loads(arguments)) == ("stop", {})


async def test_a_required_call(client):
    made = await ask(client, tool_choice="required", parallel_tool_calls=False)
    (choice,) = made.choices
    (call,) = choice.message.tool_calls
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    assert call.id.startswith("call_") and call.type == "function"
    check(call.function.name, call.function.arguments)


@pytest.mark.parametrize("name", ["report", "stop"])
async def test_a_named_call(client, name):
    made = await ask(
        client, tool_choice={"type": "function", "function": {"name": name}}, parallel_tool_calls=False
    )
    (call,) = made.choices[0].message.tool_calls
    assert call.function.name == name
    check(name, call.function.arguments)


async def test_a_streamed_call_is_the_whole_one(client):
    options = {
        "tool_choice": {"type": "function", "function": {"name": "report"}},
        "parallel_tool_calls": False,
    }
    whole = (await ask(client, **options)).choices[0].message.tool_calls[0].function
    chunks = [chunk async for chunk in await ask(client, **options, stream=True, n=2)]
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
        # The id and the name come once, the arguments in pieces.
        assert [call.id is not None for call in calls] == [True] + [False] * (len(calls) - 1)
        assert [call.function.name for call in calls] == ["report"] + [None] * (len(calls) - 1)
        assert "".join(call.function.arguments for call in calls) == whole.arguments
        assert len(calls) > 2 and {call.index for call in calls} == {0}
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
        assert not any(choice.delta.content for choice in choices)


DAY = r'(January|June) [0-9]{1,2}(st|th) of \\"20[0-9]{2}"'


def custom(name: str, **grammar) -> dict:
    form = {"format": {"type": "grammar", "grammar": grammar}} if grammar else {}
    return {"type": "custom", "custom": {"name": name, **form}}


async def test_the_input_of_a_custom_tool_is_text(client):
    """Whole and streamed; a function beside it keeps its JSON. The input matches its regex."""
    tools = [TOOLS[0], custom("note", syntax="regex", definition=DAY), custom("say")]
    options = {"tools": tools, "parallel_tool_calls": False}
    for name in ("note", "report"):
        kind = "custom" if name == "note" else "function"
        chosen = options | {"tool_choice": {"type": kind, kind: {"name": name}}}
        (call,) = (await ask(client, **chosen)).choices[0].message.tool_calls
        chunks = [chunk async for chunk in await ask(client, **chosen, stream=True)]
        deltas = [c.to_dict() for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert [delta.get("type") for delta in deltas] == [kind] + [None] * (len(deltas) - 1)
        assert deltas[0][kind]["name"] == name and len(deltas) > 2
        if name == "report":
            check(name, call.function.arguments)
            continue
        assert isinstance(call, ChatCompletionMessageCustomToolCall)
        assert re.fullmatch(DAY, call.custom.input)
        assert "".join(delta["custom"]["input"] for delta in deltas) == call.custom.input


SUM = """
start: term (" + " term)*
term: NUMBER | "(" start ")" | "\\"" /[\\s\\S]{0,2}/ "\\""
NUMBER: /[0-9]/
"""


async def test_the_input_of_a_custom_tool_follows_its_lark_grammar(client):
    tools = [custom("sum", syntax="lark", definition=SUM), TOOLS[0]]
    chosen = {"tools": tools, "tool_choice": {"type": "custom", "custom": {"name": "sum"}}, "seed": 3}
    chosen |= {"parallel_tool_calls": False}
    (call,) = (await ask(client, **chosen)).choices[0].message.tool_calls
    chunks = [chunk async for chunk in await ask(client, **chosen, stream=True)]
    deltas = [c.to_dict() for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert "".join(delta["custom"]["input"] for delta in deltas) == call.custom.input
    assert re.fullmatch(r'([0-9( ]|"(?s:.){0,2}")([0-9() +]|"(?s:.){0,2}")*', call.custom.input)
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(
            client, tools=[custom("sum", syntax="lark", definition="start: sum")], tool_choice="required"
        )
    assert refused.value.param == "tools[0].custom.format.grammar.definition"


async def test_a_custom_call_of_an_earlier_turn_is_shown_as_a_function_of_its_input(http):
    text = 'say "a\\b"\nZoë'
    calls = [
        {"id": "c", "type": "custom", "custom": {"name": "say", "input": text}},
        {"id": "c", "type": "function", "function": {"name": "say", "arguments": {"input": text}}},
    ]
    result = {"role": "tool", "tool_call_id": "c", "content": "ok"}
    prompts = []
    for call in calls:
        messages = [*HELLO, {"role": "assistant", "tool_calls": [call]}, result]
        response = await http.post("/tokenize", json={"model": "pocket", "messages": messages})
        prompts.append(response.json()["tokens"])
    assert prompts[0] == prompts[1]


async def test_a_regex_that_no_grammar_follows_is_refused(client):
    """It is all that the tool says of its input, so it is not left out."""
    tools = [custom("note", syntax="regex", definition="(?=a)b")]
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tools" and "look-around" in refused.value.message


async def test_a_required_call_beside_a_form_of_the_text(client):
    """Agents that answer in a form send it with every turn, also while they must call."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "S", "schema": {"type": "integer"}, "strict": True},
    }
    alone = await ask(client, tools=TOOLS, tool_choice="required")
    made = await ask(client, tools=TOOLS, tool_choice="required", response_format=form)
    calls = [
        [call.function.to_dict() for call in each.choices[0].message.tool_calls] for each in (alone, made)
    ]
    assert calls[0] == calls[1]


async def test_functions_are_answered_in_their_own_form(client):
    given = {"model": "pocket", "messages": HELLO, "max_tokens": 200, "temperature": 0}
    made = await client.chat.completions.create(
        **given, functions=[TOOLS[0]["function"]], function_call={"name": "report"}
    )
    message = made.choices[0].message
    assert made.choices[0].finish_reason == "function_call" and message.tool_calls is None
    check(message.function_call.name, message.function_call.arguments)


async def test_no_tools_no_calls(client):
    for options in ({"tools": []}, {"tool_choice": "none"}):
        made = await ask(client, **options)
        assert made.choices[0].message.tool_calls is None and made.choices[0].message.content


async def test_a_schema_that_leaves_open_what_objects_hold_is_closed(client):
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    for strict in (True, None):
        made = await client.chat.completions.create(
            model="pocket",
            messages=HELLO,
            temperature=0,
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "S", "schema": schema, "strict": strict},
            },
        )
        assert made.choices[0].finish_reason == "stop"
        assert set(json.loads(made.choices[0].message.content)) == {"color"}
