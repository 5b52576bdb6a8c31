"""llm, the command-line tool."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients import cases
from tests.clients.environment import needs

needs("llm==0.36")

PYTHON_TOOL = """
def report(color: str, shape: str, count: int) -> str:
    "Report a picture."
    return "saved" if (color, shape, count) == ("red", "circle", 3) else "Error: not allowed"
"""


@pytest.fixture
def ask(base_url, tmp_path):
    (tmp_path / "picture.png").write_bytes(cases.PNG)
    model = {
        "model_id": "pocket",
        "model_name": cases.MODEL,
        "api_base": base_url,
        "api_key_name": "sightline",
        "vision": True,
        "supports_schema": True,
        "supports_tools": True,
    }
    # JSON is YAML too.
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    (tmp_path / "keys.json").write_text(json.dumps({"sightline": "EMPTY"}))

    def ask(*arguments: str) -> str:
        command = [
            Path(sys.executable).with_name("llm"),
            "-m",
            "pocket",
            "-o",
            "temperature",
            "0",
            *arguments,
        ]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ask


def test_chat(ask):
    assert cases.is_greeting(ask("--no-stream", cases.GREETING))


def test_image(ask):
    assert cases.is_caption(ask("--no-stream", cases.QUESTION, "-a", "picture.png"))


def test_stream(ask):
    assert cases.is_caption(ask(cases.QUESTION, "-a", "picture.png"))


def test_schema(ask):
    schema = json.dumps(cases.PARAMETERS)
    assert cases.is_right(ask(cases.QUESTION, "-a", "picture.png", "--schema", schema))


def test_agent(ask):
    said = ask(cases.REQUEST, "-a", "picture.png", "--functions", PYTHON_TOOL)
    assert cases.is_caption(said)
