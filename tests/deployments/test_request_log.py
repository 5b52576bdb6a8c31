"""The line of each request in the log, its id, and the line that says that the server is ready."""

import builtins
import io
import json
import logging
import logging.handlers
import weakref

import httpx
import pytest

from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.logs import JsonFormatter, LoggingConfig, Rendered, write_soon
from deployments.readiness import announce
from tests.deployments.asgi import AppTransport
from tests.deployments.pictures import ask, circle, square
from tests.serving import wait_until


@pytest.fixture
def records(caplog):
    """Records of requests so far, oldest first."""
    caplog.set_level(logging.DEBUG, "ray.serve")

    def found() -> list[logging.LogRecord]:
        return [record for record in caplog.records if hasattr(record, "request_id")]

    return found


def chat(*images: str, **fields) -> dict:
    messages = ask("What color is the circle?", *images)
    return {"model": "pocket", "messages": messages, "max_tokens": 8, "temperature": 0} | fields


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_one_line_with_its_tokens_images_and_times(http, records, stream):
    body = chat(circle("red", (97, 61)), square("blue", (61, 97)), stream=stream)
    response = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "one-of-mine"})
    assert response.headers["x-request-id"] == "one-of-mine"
    (record,) = records()
    line = record.getMessage()
    assert record.levelname == "INFO"
    assert line.startswith("POST /v1/chat/completions: 200 request_id=one-of-mine answer_id=chatcmpl-")
    assert record.answer_id in response.text
    assert record.model == "pocket" and record.images == 2
    whole = await http.post("/v1/chat/completions", json=body | {"stream": False})
    usage = whole.json()["usage"]
    assert record.prompt_tokens == usage["prompt_tokens"]
    assert record.completion_tokens == usage["completion_tokens"] > 1
    stages = [f"{name}_ms" for name in ("fetch", "prepare", "prompt", "encode", "queue", "prefill")]
    assert all(getattr(record, name) >= 0 and f" {name}=" in line for name in stages)
    assert max(record.encode_ms, record.prepare_ms) <= record.first_token_ms <= record.total_ms
    rest = record.per_token_ms * (record.completion_tokens - 1)
    assert record.first_token_ms + rest <= record.total_ms + 1


async def test_a_request_without_an_id_gets_one(http, records):
    given = ["a b", "x" * 129, "é", ""]
    for value in given:
        response = await http.get("/v1/models", headers={"x-request-id": value.encode()})
        assert response.headers["x-request-id"] not in given
    ids = [record.request_id for record in records()]
    assert len(set(ids)) == len(given) and all(id.isalnum() for id in ids)


async def test_tokens_of_several_prompts_are_added(http, records):
    body = {"model": "pocket", "prompt": ["A red", "A blue circle"], "max_tokens": 3, "ignore_eos": True}
    usage = (await http.post("/v1/completions", json=body)).json()["usage"]
    (record,) = records()
    assert (record.prompt_tokens, record.completion_tokens) == (usage["prompt_tokens"], 6)
    await http.post("/v1/embeddings", json={"model": "tests/vectors", "input": ["A red", "A blue circle"]})
    assert records()[1].prompt_tokens > 0 and not hasattr(records()[1], "completion_tokens")


async def test_an_error_within_a_stream_is_on_the_line(http, records):
    # The grammar lets it begin, another constraint keeps it from ending.
    body = chat(stream=True, guided_regex="xx~", bad_words=["~"])
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200 and "no_token_allowed" in response.text
    (record,) = records()
    assert ": 200 then 400 no_token_allowed: " in record.getMessage()
    assert record.levelname == "INFO" and record.completion_tokens == 2


async def test_a_client_that_leaves_a_stream_is_on_the_line(http, running, records):
    body = chat(stream=True, max_tokens=900, ignore_eos=True)
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        await anext(response.aiter_bytes())
    (record,) = await wait_until(records)
    assert ": 200 the client left before its end request_id=" in record.getMessage()
    assert record.levelname == "INFO" and record.client_left and record.prompt_tokens > 0
    await running.wait_until_idle()


async def test_probes_that_succeed_are_logged_at_debug(http, records):
    for path in ("/health", "/ping"):
        await http.get(path)
    await http.get("/v1/models")
    assert [record.levelname for record in records()] == ["DEBUG", "DEBUG", "INFO"]


async def test_no_secret_is_logged(running, records):
    keys = [{"name": "team", "key": "very-secret"}]
    api = create_api(IngressConfig(keys=keys), running.app.api.state.pipelines)
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        headers = {"Authorization": "Bearer very-secret"}
        private = chat(circle("red"))
        private["messages"][0]["content"][0]["image_url"]["url"] = "data:image/png;base64,cHJpdmF0ZQ=="
        await http.get("/v1/models?api_key=very-secret", headers=headers)
        await http.post("/v1/chat/completions", json=private, headers=headers)
        await http.get("/v1/models", headers={"Authorization": "Bearer very-secret-but-wrong"})
    lines = [JsonFormatter().format(record) for record in records()]
    assert [json.loads(line)["status"] for line in lines] == [200, 400, 401]
    assert not any("very-secret" in line or "cHJpdmF0" in line for line in lines)
    assert [json.loads(line).get("key") for line in lines] == ["team", "team", None]


async def test_json_lines_hold_the_fields_by_name(http, records):
    await http.post("/v1/chat/completions", json=chat(temperature=-1))
    line = JsonFormatter().format(records()[0])
    assert "\n" not in line
    found = json.loads(line)
    assert {"time", "level", "logger", "message", "request_id", "total_ms"} <= found.keys()
    assert (found["status"], found["error"], found["error_param"]) == (400, "invalid_request", "temperature")
    try:
        raise ValueError("broken")
    except ValueError as error:
        record = logging.LogRecord(
            "engine", logging.ERROR, "", 1, "an %s", ("error",), (type(error), error, None)
        )
    found = json.loads(JsonFormatter().format(record))
    assert found["message"] == "an error" and found["exception"].endswith("ValueError: broken")


async def test_the_line_that_says_that_the_server_is_ready(running, caplog):
    caplog.set_level(logging.INFO, "ray.serve")
    await announce(running.app.api.state.pipelines, "http://127.0.0.1:8000")
    (record,) = [record for record in caplog.records if hasattr(record, "address")]
    assert record.getMessage() == (
        "ready at http://127.0.0.1:8000: pocket (generate, CPU, context of 1024 tokens); "
        "tests/vectors (embed, CPU, context of 512 tokens)"
    )


def test_the_configuration_of_logs_reaches_ray_serve():
    from ray.serve.schema import LoggingConfig as ServeLogging

    for format in ("text", "json"):
        found = ServeLogging(**LoggingConfig(format=format, level="WARNING").for_serve())
        assert (found.encoding, found.log_level) == (format.upper(), "WARNING")
        assert not found.enable_access_log


@pytest.mark.parametrize("formatter", [logging.Formatter(), JsonFormatter()])
@pytest.mark.parametrize("how", ["argument", "exc_info"])
def test_a_record_that_waits_to_be_written_keeps_nothing_of_an_error(formatter, how):
    class Media:
        """Stands for pixels."""

    def fail():
        media = Media()
        found.append(weakref.ref(media))
        raise ValueError("too large")

    found: list[weakref.ref] = []
    written = io.StringIO()
    target = logging.StreamHandler(written)
    target.setFormatter(formatter)
    buffer = logging.handlers.MemoryHandler(1000, target=target)
    log = logging.Logger("test", logging.INFO)
    log.addFilter(Rendered())
    log.addHandler(buffer)
    try:
        fail()
    except ValueError as error:
        if how == "argument":
            log.warning("%d failed: %s", 1, error)
        else:
            log.warning("%d failed", 1, exc_info=error)
    assert found[0]() is None and not written.getvalue()
    buffer.flush()
    assert "1 failed" in written.getvalue() and "too large" in written.getvalue()
    assert ("in fail" in written.getvalue()) == (how == "exc_info")


async def test_records_are_written_soon_that_ray_serve_would_keep_in_memory(monkeypatch):
    monkeypatch.setattr("deployments.logs.WRITTEN_AFTER_S", 0.01)
    written = io.StringIO()
    log = logging.Logger("test", logging.INFO)
    log.addHandler(logging.handlers.MemoryHandler(1000, target=logging.StreamHandler(written)))
    log.info("one")
    assert not written.getvalue()
    thread = write_soon(log)
    await wait_until(lambda: written.getvalue() == "one\n")
    # One that takes the place of the first.
    log.handlers = [logging.handlers.MemoryHandler(1000, target=logging.StreamHandler(written))]
    log.info("two")
    await wait_until(lambda: written.getvalue() == "one\ntwo\n")
    del log
    await wait_until(lambda: not thread.is_alive())


@pytest.mark.parametrize("formatter", [logging.Formatter(), JsonFormatter()])
def test_a_traceback_is_whole_where_ray_serve_has_replaced_print(formatter, monkeypatch):
    from ray.serve._private.logging_utils import redirected_print

    monkeypatch.setattr(builtins, "print", redirected_print)
    written = io.StringIO()
    log = logging.Logger("test", logging.INFO)
    log.addHandler(logging.StreamHandler(written))
    log.handlers[0].setFormatter(formatter)
    log.addFilter(Rendered())
    try:
        raise ValueError("too large")
    except ValueError as error:
        log.error("it failed", exc_info=error)
    text = written.getvalue()
    if isinstance(formatter, JsonFormatter):
        text = json.loads(text)["exception"]
    first, *_, last = text[text.index("Traceback") :].strip().splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ValueError: too large")
