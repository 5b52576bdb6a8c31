"""Every example runs, and says what it should."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.serving import free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
OFFLINE = {
    "offline.py": ["red circle and a blue square", "There are 2 shapes."],
    "offline_single_image.py": ["red circle and a blue square"],
    "offline_batch.py": [
        "red circle and a blue square",
        "The triangle is green.",
        "HELLO",
        "simple pictures",
    ],
    "offline_multi_image.py": ["No, first red, then green."],
    # The small model was never taught what a video is; it answers something.
    "offline_video_frames.py": [],
    "offline_image_embeddings.py": [],
    "offline_embedding.py": [
        "256 numbers",
        "A red square. is picture 1",
        "A green triangle. is picture 2",
        "score: [1.0,",
    ],
}


def run(monkeypatch, name: str, *args: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", OFFLINE)
def test_offline(monkeypatch, capsys, name):
    run(monkeypatch, name)
    said = capsys.readouterr().out
    assert said.strip()
    for words in OFFLINE[name]:
        assert words in said


def test_none_is_left_out():
    clients = {
        "chat_client.py",
        "decision_client.py",
        "embedding_client.py",
        "rerank_client.py",
        "structured_client.py",
        "tool_client.py",
        "pictures.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == OFFLINE.keys() | clients


def test_pictures_are_written(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "pictures.py", str(tmp_path))
    assert len(list(tmp_path.glob("*.png"))) == 5


@pytest.mark.parametrize("name", ["chat", "rerank", "structured", "tool"])
def test_clients_say_that_no_server_answers(monkeypatch, capsys, name):
    with pytest.raises(SystemExit):
        run(monkeypatch, f"{name}_client.py", "--base-url", f"http://127.0.0.1:{free_port()}/v1")
    assert "no server answers at http://127.0.0.1" in capsys.readouterr().err


@pytest.mark.ray
def test_clients(monkeypatch, capsys, served):
    run(monkeypatch, "chat_client.py", "Describe this image.", "--base-url", served.base_url)
    assert "red circle and a blue square" in capsys.readouterr().out
    run(monkeypatch, "decision_client.py", "--base-url", served.base_url)
    said = [line.partition(" yes: ") for line in capsys.readouterr().out.splitlines()]
    assert [question for question, _, share in said if float(share[:-1]) > 90] == [
        "Is there a red circle?",
        "Is there a blue square?",
    ]
    assert len(said) == 3 and float(said[2][2][:-1]) < 10
    run(monkeypatch, "embedding_client.py", "--model", "tests/vectors", "--base-url", served.base_url)
    assert capsys.readouterr().out.startswith("Embedding output: [")
    run(monkeypatch, "rerank_client.py", "--model", "tests/vectors", "--base-url", served.base_url)
    assert capsys.readouterr().out.startswith("picture 2: ")
    for name, model in (("embedding", "pocket-embed"), ("rerank", "pocket-embed"), ("tool", "pocket-tools")):
        with pytest.raises(SystemExit):
            run(monkeypatch, f"{name}_client.py", "--base-url", served.base_url)
        assert f"The model '{model}' does not exist" in capsys.readouterr().err
