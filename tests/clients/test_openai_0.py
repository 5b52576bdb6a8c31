"""openai-python before 1.0."""

import json

import pytest

from tests.clients import cases
from tests.clients.environment import needs

# openai 0.28 reads embeddings by numpy, which it does not ask for.
needs("openai==0.28.1", "numpy==2.4.6")

import openai  # noqa: E402


@pytest.fixture(autouse=True)
def address(base_url, monkeypatch):
    monkeypatch.setattr(openai, "api_base", base_url)
    monkeypatch.setattr(openai, "api_key", "EMPTY")


def ask(*messages, **options):
    return openai.ChatCompletion.create(model=cases.MODEL, messages=list(messages), temperature=0, **options)


def test_chat():
    answer = ask({"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)


def test_image():
    assert cases.is_caption(ask(cases.question()).choices[0].message.content)


def test_stream():
    pieces = [chunk.choices[0].delta.get("content") for chunk in ask(cases.question(), stream=True)]
    assert cases.is_caption("".join(piece or "" for piece in pieces)) and len(pieces) > 1


def test_tools_as_functions():
    function = cases.TOOL["function"]
    question = cases.question(cases.REQUEST)
    made = ask(question, functions=[function]).choices[0]
    assert made.finish_reason == "function_call"
    assert cases.is_right(made.message.function_call.arguments)


def test_agent():
    function = cases.TOOL["function"]
    question = cases.question(cases.REQUEST)
    message = ask(question, functions=[function]).choices[0].message
    result = cases.report(**json.loads(message.function_call.arguments))
    answer = {"role": "function", "name": "report", "content": result}
    end = ask(question, message, answer, functions=[function])
    assert cases.is_caption(end.choices[0].message.content)


def test_embeddings():
    made = openai.Embedding.create(model=cases.EMBEDDER, input=["A red circle.", "Two stars."])
    assert [len(entry["embedding"]) for entry in made["data"]] == [256, 256]


def test_completions():
    made = openai.Completion.create(model=cases.MODEL, prompt="Three red", max_tokens=4)
    assert made.choices[0].text
