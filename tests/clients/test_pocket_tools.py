"""The model for tools over HTTP: held-out scenes, and the examples that use it."""

import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("PIL")

from models import eval_calls

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("task", "scenes", "share"), [("report", 20, 0.9), ("plain", 16, 0.75)])
def test_a_free_model_calls_where_it_is_asked_to(base_url, task, scenes, share):
    """The first of the 200 scenes of the model card's figures."""
    ask = eval_calls.ServedAsk(base_url, "pocket-tools", 8)
    assert eval_calls.evaluate(ask, scenes, (task,))[task] >= share


def run(monkeypatch, capsys, name: str, base_url: str) -> str:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [name, "--base-url", base_url])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_the_example_of_a_loop_with_a_tool(monkeypatch, capsys, base_url):
    called, answer = run(monkeypatch, capsys, "tool_client.py", base_url).splitlines()
    assert called == "report(color='green', shape='star', count=3)"
    assert "green star" in answer.lower()


def test_the_example_of_a_schema(monkeypatch, capsys, base_url):
    assert (
        run(monkeypatch, capsys, "structured_client.py", base_url) == "color='green' shape='star' count=3\n"
    )
