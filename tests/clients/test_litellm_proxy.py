"""LiteLLM's proxy."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("litellm[proxy]==1.108.7")

from openai import OpenAI  # noqa: E402


@pytest.fixture(scope="module")
def proxy(base_url, tmp_path_factory) -> Iterator[str]:
    """A proxy before the server; its address."""
    folder = tmp_path_factory.mktemp("proxy")
    names = {"vlm": cases.MODEL, "vectors": cases.EMBEDDER}
    models = [
        {
            "model_name": name,
            "litellm_params": {"model": f"openai/{served}", "api_base": base_url, "api_key": "EMPTY"},
        }
        for name, served in names.items()
    ]
    # JSON is YAML too.
    (folder / "config.yaml").write_text(json.dumps({"model_list": models}))
    port = _free_port()
    command = [Path(sys.executable).with_name("litellm"), "--config", folder / "config.yaml"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while not _answers(f"{address}/health/liveliness"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[
                -3000:
            ]
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.fixture
def client(proxy):
    return OpenAI(base_url=f"{proxy}/v1", api_key="EMPTY", max_retries=0)


def ask(client, *messages, **options):
    return client.chat.completions.create(model="vlm", messages=list(messages), temperature=0, **options)


def test_chat(client):
    answer = ask(client, {"role": "user", "content": cases.GREETING})
    assert cases.is_greeting(answer.choices[0].message.content)


def test_image(client):
    assert cases.is_caption(ask(client, cases.question()).choices[0].message.content)


def test_stream(client):
    pieces = [
        c.choices[0].delta.content or "" for c in ask(client, cases.question(), stream=True) if c.choices
    ]
    assert cases.is_caption("".join(pieces)) and len(pieces) > 1


def test_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": cases.PARAMETERS, "strict": True}}
    answer = ask(client, cases.question(), response_format=form)
    assert cases.is_right(answer.choices[0].message.content)


def test_tools(client):
    (call,) = ask(client, cases.question(cases.REQUEST), tools=[cases.TOOL]).choices[0].message.tool_calls
    assert call.function.name == "report" and cases.is_right(call.function.arguments)


def test_embeddings(client):
    made = client.embeddings.create(model="vectors", input=["A red circle."])
    assert len(made.data[0].embedding) == 256


def test_responses(client):
    """The proxy must not take the model out of service afterwards, as it does after a failure."""
    assert cases.is_greeting(client.responses.create(model="vlm", input=cases.GREETING).output_text)
    test_chat(client)


def test_completions(client):
    made = client.completions.create(model="vlm", prompt="Three red", max_tokens=4)
    assert made.choices[0].text
