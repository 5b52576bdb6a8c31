"""guidellm, the benchmark."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.clients import cases
from tests.clients.environment import needs

# The benchmark imports torch. The project's build serves it, so that none with CUDA is fetched.
needs("guidellm==0.8.1", "torch==2.13.0")

TOKENIZER = Path(__file__).parents[2] / "models" / cases.MODEL


def run(folder: Path, root: str, path: str, rows: list[dict], **backend) -> list[str]:
    """Send one request for each row to an endpoint, one after another; the texts of the answers.

    Args:
        path: the endpoint.
        rows: columns of guidellm's data.
        backend: options of guidellm's HTTP backend.
    """
    data, report = folder / "data.jsonl", folder / "report.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "backend": {"kind": "openai_http", "target": root, "model": cases.MODEL, "request_format": path}
        | backend,
        "profile": {"kind": "synchronous"},
        "constraint": {"kind": "max_requests", "count": len(rows)},
        "tokenizer": {"kind": "hf_auto", "model": TOKENIZER},
        "data": {"kind": "json_file", "path": data},
        "output": {"kind": "json", "path": report},
    }
    command = [Path(sys.executable).with_name("guidellm"), "run", "--disable-console"]
    for name, fields in options.items():
        command += [f"--{name}", ",".join(f"{key}={value}" for key, value in fields.items())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    assert not requests["errored"], requests["errored"][0]["info"]["error"]
    assert len(requests["successful"]) == len(rows)
    return [request["output"] for request in requests["successful"]]


def test_image(root, tmp_path):
    rows = [{"messages": [cases.question()], "output_tokens_count": 12}]
    (text,) = run(tmp_path, root, "/v1/chat/completions", rows, stream=False)
    assert cases.is_caption(text)


def test_stream(root, tmp_path):
    """The benchmark streams unless it is told not to."""
    rows = [{"messages": [cases.question()], "output_tokens_count": 12}]
    (text,) = run(tmp_path, root, "/v1/chat/completions", rows)
    assert cases.is_caption(text)


def test_chat(root, tmp_path):
    rows = [{"prompt": cases.GREETING, "output_tokens_count": 12}] * 2
    assert all(map(cases.is_greeting, run(tmp_path, root, "/v1/chat/completions", rows, stream=False)))


def test_completions(root, tmp_path):
    rows = [{"prompt": "Three red", "output_tokens_count": 4}]
    assert all(run(tmp_path, root, "/v1/completions", rows))


def test_responses(root, tmp_path):
    rows = [{"prompt": cases.GREETING, "output_tokens_count": 12}]
    assert all(map(cases.is_greeting, run(tmp_path, root, "/v1/responses", rows)))


def test_embeddings(root, tmp_path):
    run(tmp_path, root, "/v1/embeddings", [{"prompt": "A red circle."}], model=cases.EMBEDDER)
