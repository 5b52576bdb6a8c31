"""Uses of openai-python since its helpers for parsed answers and the Responses API.

The fixture ``client`` is that of :mod:`tests.clients.openai_uses`.
"""

from typing import Literal

import pydantic

from tests.clients import cases


class Facts(pydantic.BaseModel):
    color: Literal["red", "green", "blue"]
    shape: Literal["circle", "square", "star"]
    count: int


def test_schema_of_a_class(client):
    made = client.chat.completions.parse(
        model=cases.MODEL, messages=[cases.question()], response_format=Facts, temperature=0
    )
    assert made.choices[0].message.parsed == Facts(**cases.FACTS)


def test_schema_beside_tools(client):
    """The model calls a function first, or answers in the form that was asked for."""
    tool = {**cases.TOOL, "function": {**cases.TOOL["function"], "strict": True}}
    called, answered = (
        client.chat.completions.parse(
            model=cases.MODEL,
            messages=[cases.question(text)],
            tools=[tool],
            response_format=Facts,
            temperature=0,
        ).choices[0]
        for text in (cases.REQUEST, cases.QUESTION)
    )
    (call,) = called.message.tool_calls
    assert called.finish_reason == "tool_calls" and call.function.parsed_arguments == cases.FACTS
    assert answered.message.parsed == Facts(**cases.FACTS) and not answered.message.tool_calls


def test_stream_with_events(client):
    with client.chat.completions.stream(
        model=cases.MODEL, messages=[cases.question()], temperature=0
    ) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert cases.is_caption(whole.choices[0].message.content) and "content.delta" in kinds


def asked(text: str) -> list[dict]:
    parts = [{"type": "input_image", "image_url": cases.DATA_URL}, {"type": "input_text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_responses(client):
    made = client.responses.create(model=cases.MODEL, input=asked(cases.QUESTION), temperature=0)
    assert cases.is_caption(made.output_text)
    more = client.responses.create(
        model=cases.MODEL, input="How many circles are there?", previous_response_id=made.id, temperature=0
    )
    assert "3" in more.output_text
    client.responses.delete(made.id)


def test_responses_in_a_stream(client):
    events = list(
        client.responses.create(model=cases.MODEL, input=asked(cases.QUESTION), temperature=0, stream=True)
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert cases.is_caption(text) and events[-1].type == "response.completed"


def test_responses_with_a_schema(client):
    made = client.responses.parse(
        model=cases.MODEL, input=asked(cases.QUESTION), text_format=Facts, temperature=0
    )
    assert made.output_parsed == Facts(**cases.FACTS)


def test_responses_with_tools(client):
    function = cases.TOOL["function"]
    tools = [{"type": "function", "strict": True, **function}]
    made = client.responses.create(model=cases.MODEL, input=asked(cases.REQUEST), tools=tools, temperature=0)
    (call,) = [item for item in made.output if item.type == "function_call"]
    assert call.name == "report" and cases.is_right(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "saved"}
    end = client.responses.create(
        model=cases.MODEL, previous_response_id=made.id, input=[result], tools=tools, temperature=0
    )
    assert cases.is_caption(end.output_text)
