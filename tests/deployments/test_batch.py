"""A file of requests is answered line by line, and a run that was cut off goes on."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from deployments import batch
from deployments.batch import BatchFiles, answer_all
from tests.deployments.pictures import circle, data_url
from tests.serving import app_args

pytestmark = pytest.mark.usefixtures("idle_afterwards")

PICTURE = [
    {"type": "image_url", "image_url": {"url": data_url(circle("red"))}},
    {"type": "text", "text": "What color is the circle?"},
]


def line(name: str | None, url: str = "/v1/chat/completions", **body) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "pocket", **body}}


def chat(name: str | None, content="Hello", **body) -> dict:
    return line(name, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0, **body)


LINES = [
    chat("red", PICTURE),
    line("vector", "/v1/embeddings", model="tests/vectors", input="a"),
    chat("too long", "a " * 3000),
    line("nowhere", "/v1/nothing"),
]


async def run(app, folder: Path, lines: list[str], at_a_time: int = 3) -> tuple[dict, dict]:
    """Counts, and the answers by their ids."""
    (folder / "in").write_text("\n".join(lines) + "\n\n")
    with (folder / "in").open("rb") as given, (folder / "out").open("a+b") as made:
        counts = await answer_all(app, BatchFiles(given, made), at_a_time)
    answers = [json.loads(each) for each in (folder / "out").read_text().splitlines()]
    return dict(counts), {each["custom_id"]: each for each in answers}


async def test_each_line_has_an_answer(running, tmp_path, http):
    counts, answers = await run(running.app, tmp_path, list(map(json.dumps, LINES)))
    assert counts == {"answered": 2, "refused": 2}
    made = {name: answer["response"]["body"] for name, answer in answers.items()}
    wanted = (await http.post("/v1/chat/completions", json=LINES[0]["body"])).json()
    assert made["red"]["choices"] == wanted["choices"] and "red" in wanted["choices"][0]["message"]["content"]
    assert len(made["vector"]["data"]) == 1 and all(answer["error"] is None for answer in answers.values())
    assert made["too long"]["error"]["param"] == "messages"
    statuses = {name: answer["response"]["status_code"] for name, answer in answers.items()}
    assert statuses == {"red": 200, "vector": 200, "too long": 400, "nowhere": 404}
    assert all(answer["response"]["request_id"] for answer in answers.values())
    assert len({answer["id"] for answer in answers.values()}) == 4


async def test_a_run_that_was_cut_off_goes_on(running, tmp_path):
    await run(running.app, tmp_path, [json.dumps(LINES[0]), json.dumps(LINES[2])])
    # The process ended within a line.
    with (tmp_path / "out").open("ab") as made:
        made.write(b'{"id": "batch_req_1", "custom_id": "vec')
    counts, answers = await run(running.app, tmp_path, list(map(json.dumps, LINES)))
    # What was refused is asked again, and has a further line.
    assert counts == {"skipped": 1, "answered": 1, "refused": 2}
    assert answers.keys() == {"red", "vector", "too long", "nowhere"}
    assert len((tmp_path / "out").read_bytes().splitlines()) == 5


@pytest.mark.parametrize(
    ("before", "number"),
    [
        (b"hello\n", 1),
        (b"\n[]\n", 2),
        (b"[" * 100_000 + b"\n", 1),
        (b'{"response": {"status_code": 200}}\n', 1),
        (b'{"id": "batch_req_1", "custom_id": [], "response": {"status_code": 200}}\n', 1),
        # The two files in each other's place, the last line without its end.
        ("\n".join(map(json.dumps, LINES)).encode(), 1),
        (json.dumps(LINES[0]).encode(), 1),
        # Another file's last line, behind an answer.
        (b'{"id": "batch_req_1", "custom_id": null, "response": null}\n{"id": "a', 2),
    ],
)
async def test_a_file_that_holds_no_answers_is_left_alone(tmp_path, before, number):
    (tmp_path / "out").write_bytes(before)
    with pytest.raises(batch.InTheWay, match=f"out, line {number}, is no answer"):
        await run(None, tmp_path, [])
    assert (tmp_path / "out").read_bytes() == before


async def test_two_runs_do_not_write_to_one_file(tmp_path):
    with (tmp_path / "out").open("a+b") as made:
        BatchFiles(made, made)
        with pytest.raises(batch.InTheWay, match="Another run writes to"):
            await run(None, tmp_path, [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        (json.dumps(chat(None)), "custom_id"),
        (json.dumps({**chat("a"), "method": "GET"}), "method"),
        (json.dumps({**chat("a"), "url": "http://example.com"}), "url"),
        (json.dumps({**chat("a"), "body": 3}), "body"),
        (json.dumps(chat("a", stream=True)), "body.stream"),
        (json.dumps(chat("red")), "come before"),
        ("[" * 100_000, "nested"),
        ('{"custom_id": "a", "url": "/", "body": {"a": ' + "[" * 20_000 + "]" * 20_000 + "}}", "nested"),
        (json.dumps(chat("\ud800")), "custom_id"),
        (json.dumps({**chat("a"), "url": "/\ud800"}), "url"),
    ],
)
async def test_a_line_that_is_no_request_stops_no_other(running, tmp_path, given, said):
    lines = [json.dumps(LINES[0]), given, json.dumps(LINES[1])]
    counts, answers = await run(running.app, tmp_path, lines, at_a_time=1)
    assert counts == {"answered": 2, "refused": 1} and answers["red"]["response"]["status_code"] == 200
    error = answers[None]["error"]
    assert (
        error["code"] == "invalid_line"
        and error["message"].startswith("Line 2: ")
        and said in error["message"]
    )


async def test_a_request_that_fails_stops_no_other(tmp_path):
    async def app(scope, receive, send) -> None:
        if scope["path"] == "/raises":
            raise ZeroDivisionError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        # Half of a surrogate pair in JSON, or no JSON at all.
        body = b'"\\ud800"' if scope["path"] == "/half" else b"\x00"
        await send({"type": "http.response.body", "body": body})

    lines = [json.dumps(line(url[1:], url)) for url in ("/raises", "/bytes", "/half")]
    counts, answers = await run(app, tmp_path, lines, at_a_time=1)
    assert counts == {"answered": 1, "refused": 2}
    assert answers["half"]["response"]["body"] == "\ud800"
    codes = {name: answer["error"]["code"] for name, answer in answers.items() if answer["error"]}
    assert codes == {"raises": "internal_error", "bytes": "invalid_response"}


@pytest.mark.parametrize(
    ("refusals", "retry_after", "waited", "status"),
    [(2, b"7", [7.0] * 2, 200), (99, b"99", [batch._LONGEST_WAIT_S] * (batch._TRIES - 1), 429)],
)
async def test_requests_that_are_too_many_are_sent_again(
    tmp_path, monkeypatch, refusals, retry_after, waited, status
):
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    async def app(scope, receive, send) -> None:
        await receive()
        status = 429 if len(waits) < refusals else 200
        headers = [(b"Retry-After", retry_after)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    # The module's own alone: others of this process sleep as ever.
    monkeypatch.setattr(batch, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": wait}))
    _, answers = await run(app, tmp_path, [json.dumps(LINES[0])])
    assert answers["red"]["response"]["status_code"] == status and waits == waited


def test_the_command_needs_no_server_and_no_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    args = app_args()
    args["ingress"]["keys"] = [{"name": "a", "env": "SOME_KEY"}]
    (tmp_path / "in").write_text(json.dumps(LINES[0]) + "\n")
    config = {"applications": [{"name": "a", "import_path": "deployments.app:build", "args": args}]}
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    paths = [str(tmp_path / name) for name in ("in", "out")]
    assert batch.main([*paths, "--config", str(tmp_path / "config")]) == 0
    assert "1 answered, 0 refused, 0 skipped" in capsys.readouterr().err
    made = json.loads((tmp_path / "out").read_text())
    assert "red" in made["response"]["body"]["choices"][0]["message"]["content"]
    assert batch.main([*paths, "--config", str(tmp_path / "nothing")]) == 1
    assert "nothing can't be read" in capsys.readouterr().err
