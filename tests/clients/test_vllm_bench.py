"""Payloads of `vllm bench serve`."""

import json

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("httpx==0.28.1")

import httpx  # noqa: E402


@pytest.fixture
def send(base_url):
    def send(path: str, payload: dict) -> list[dict]:
        """The events of a stream but its end, or the one JSON object."""
        headers = {"Authorization": "Bearer EMPTY", "x-request-id": "bench-0"}
        with httpx.stream("POST", f"{base_url}/{path}", json=payload, headers=headers, timeout=60) as answer:
            answer.read()
            assert answer.status_code == 200, answer.text
        if not payload.get("stream"):
            return [answer.json()]
        events = [
            line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")
        ]
        assert events[-1] == "[DONE]"
        return [json.loads(event) for event in events[:-1]]

    return send


def test_completions(send):
    """The backend ``openai`` or ``vllm``: random texts, of which each answer has a fixed length."""
    payload = {
        "model": cases.MODEL,
        "prompt": "red green blue " * 40,
        "repetition_penalty": 1.0,
        "max_tokens": 16,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "top_p": 1.0,
    }
    events = send("completions", payload)
    assert events[-1]["usage"]["completion_tokens"] == 16
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"])


def test_chat(send):
    """The backend ``openai-chat``, whose texts are lists of parts."""
    payload = {
        "model": cases.MODEL,
        "messages": [{"role": "user", "content": [{"type": "text", "text": cases.GREETING}]}],
        "max_completion_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    events = send("chat/completions", payload)
    assert events[-1]["usage"]["completion_tokens"] == 16


def test_image(send):
    """Run the benchmark with an image, as of the data set ``random-mm``."""
    parts = [
        {"type": "text", "text": cases.QUESTION},
        {"type": "image_url", "image_url": {"url": cases.DATA_URL}},
    ]
    payload = {
        "model": cases.MODEL,
        "messages": [{"role": "user", "content": parts}],
        "max_completion_tokens": 32,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
    }
    events = send("chat/completions", payload)
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    assert cases.is_caption(text)


def test_schema(send):
    """``vllm bench serve_structured_output``: a schema beside the messages."""
    payload = {
        "model": cases.MODEL,
        "messages": [cases.question()],
        "max_tokens": 64,
        "stream": True,
        "temperature": 0.0,
        "structured_outputs": {"json": cases.PARAMETERS},
    }
    events = send("chat/completions", payload)
    text = "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"])
    assert cases.is_right(text)


def test_embeddings(send):
    """The backends ``openai-embeddings`` and ``openai-embeddings-chat``."""
    (made,) = send(
        "embeddings", {"model": cases.EMBEDDER, "input": "red " * 30, "truncate_prompt_tokens": -1}
    )
    assert len(made["data"][0]["embedding"]) == 256
    (made,) = send("embeddings", {"model": cases.EMBEDDER, "messages": [cases.question()]})
    assert len(made["data"][0]["embedding"]) == 256
