"""The ASGI application around the endpoints: limits, and errors that no endpoint handles."""

import asyncio
import logging
import re
import socket
from contextlib import suppress

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, Request
from fastapi.responses import Response

from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.direct import Direct
from engine.errors import InvalidRequest
from tests.deployments.asgi import AppTransport, Exchange
from tests.serving import wait_until


def scope(path: str = "/v1/chat/completions", **headers: str) -> dict:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_beyond_the_limit_is_refused_before_all_of_it_is_read(running, announced):
    headers = {"content_length": str(1 << 40)} if announced else {}
    parts = [b"{" * (1 << 20)] * 100
    exchange = Exchange(running.app.api, scope(**headers), parts, then="wait")
    start = await exchange.next_message()
    assert start["status"] == 413
    assert b"request_too_large" in b"".join([part async for part in exchange])
    assert exchange.read == (0 if announced else 65)
    await exchange.aclose()


@pytest.mark.parametrize("timed", [True, False], ids=["the request's time", "the piece's time"])
async def test_a_body_that_does_not_come_gives_its_place_back(running, monkeypatch, timed):
    if not timed:
        monkeypatch.setattr("deployments.body.PIECE_S", 0.01)
    config = IngressConfig(request_timeout_s=0.01 if timed else None)
    api = create_api(config, running.app.api.state.pipelines)
    exchange = Exchange(api, scope(), [b'{"model": '], then="wait")
    start = await asyncio.wait_for(exchange.next_message(), 60)
    assert start["status"] == 408
    assert b"request_timeout" in b"".join([part async for part in exchange])
    await exchange.finished()
    assert not api.state.admission.active
    await exchange.aclose()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "The body is empty. Send a JSON object."),
        (b" \n", "The body is empty. Send a JSON object."),
        (b'{"model": "a",\n 1}', "enclosed in double quotes, line 2, column 2."),
        (b"model=a", "not valid JSON: Expecting value, line 1, column 1."),
        (b'{"model": "\xff"}', "not JSON in UTF-8"),
        (b'{"n": ' + b"1" * 5000 + b"}", "a number that is too long"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 256 + b"]" * 256 + b"}", "nested too deeply: more than 256 lists"),
        (b'{"a": ' + b"[" * 255 + b"]" * 255 + b"}", "messages: Field required"),
        (b'{"a": [' + b"[]," * 300 + b"0]}", "messages: Field required"),
        (b"[]", "The body must be a JSON object."),
        (b'{"model": "\xed\xa0\xbd"}', "not JSON in UTF-8"),
        ('{"model": "a"}'.encode("utf-16"), "not JSON in UTF-8"),
        ('{"a": 1}'.encode("utf-8-sig"), "messages: Field required"),
    ],
    ids=range(14),
)
async def test_what_is_no_json_is_told_where(http, body, told):
    response = await http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400 and told in response.json()["error"]["message"]


async def test_a_body_that_an_offer_of_another_protocol_has_lost_is_told(http):
    """Only where it is lost: h11 and HAProxy keep it."""
    for body, told in ((b"", "speak HTTP/1.1 alone"), (b"{}", "messages: Field required")):
        response = await http.post("/v1/chat/completions", content=body, headers={"Upgrade": "h2c"})
        assert response.status_code == 400 and told in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("first", "status"),
    [("POST /v1/chat/completions", b"400"), ("GET /v1/models", b"200"), ("CONNECT /v1/models", b"405")],
)
async def test_a_body_behind_an_offer_of_another_protocol_is_no_request(running, first, status):
    hidden = b"GET /v1/nothing HTTP/1.1\r\nhost: a\r\n\r\n"
    head = f"{first} HTTP/1.1\r\nhost: a\r\n"
    if not first.startswith("CONNECT"):
        head += "connection: upgrade\r\nupgrade: h2c\r\n"
    head += f"content-length: {len(hidden)}\r\n\r\n"
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(running.app.api, http="httptools", lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        await wait_until(lambda: server.started)
        reader, writer = await asyncio.open_connection(*bound.getsockname())
        writer.write(head.encode())
        start = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        # A packet of its own. By now the connection may have ended.
        writer.write(hidden)
        rest = b""
        with suppress(ConnectionError):
            rest = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        server.should_exit = True
        await serving
    assert start.startswith(b"HTTP/1.1 " + status) and b"connection: close" in start
    # The first answer's JSON, and no further head.
    assert b"\r\n" not in rest


async def test_other_requests_keep_their_connection(http):
    assert "connection" not in (await http.get("/v1/models")).headers


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"temperature": NaN}', "temperature"),
        ('{"metadata": {"a": [0, 1e400]}}', "metadata.a[1]"),
        ('{"tools": [{"parameters": {"minimum": -Infinity}}]}', "tools[0].parameters.minimum"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_numbers_that_no_answer_could_repeat_are_refused_by_name(http, path, body, param):
    response = await http.post(path, content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and f"{param} must be a finite number" in error["message"], error
    assert path == "/v1/messages" or error["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (r'{"model": "\ud83d"}', "model"),
        (
            r'{"messages": [{}, {"role": "user", "content": [{"text": "a \uDE00 b"}]}]}',
            "messages[1].content[0].text",
        ),
        (r'{"metadata": {"a": {"\ud83d": "b"}}}', "metadata.a"),
        (r'{"\udc00": 1}', None),
        (r'{"input": ["\ud83d\ude00", "\ude00\ud83d"]}', "input[1]"),
    ],
    ids=["field", "part", "key within", "key", "the wrong order"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize"])
async def test_half_of_a_surrogate_pair_is_refused_by_the_name_of_its_field(http, path, body, param):
    response = await http.post(path, content=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(f"{param or 'The name of a field'} has half of a surrogate pair")


async def test_escaped_characters_and_escaped_backslashes_are_text(http):
    body = r'{"model": "pocket", "prompt": "\ud83d\ude00 \\ud83d"}'
    tokens = (await http.post("/tokenize", content=body)).json()["tokens"]
    text = await http.post("/detokenize", json={"model": "pocket", "tokens": tokens})
    assert text.json()["prompt"] == "\N{GRINNING FACE} \\ud83d"


async def test_unknown_routes_and_methods(http):
    found = await http.post("/v1/nothing", json={})
    assert found.status_code == 404
    assert found.json()["error"]["message"] == "There is no endpoint /v1/nothing."
    for method, path, allowed in (
        ("POST", "/v1/models", "GET, HEAD"),
        ("GET", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/chat/completions/", "POST"),
        ("PUT", "/v1/responses/resp_1", "DELETE, GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
    ):
        found = await http.request(method, path)
        assert (found.status_code, found.headers["allow"]) == (405, allowed)
        assert found.json()["error"]["code"] == "method_not_allowed"
        assert f"takes {' or '.join(allowed.split(', '))} requests, not {method}." in found.text


async def test_the_hint_for_a_base_url_needs_no_description_of_the_api():
    """Making that takes tenths of a second, in which all streams would wait."""
    api, described = create_api(IngressConfig(), {}), []
    api.openapi = lambda: described.append(1)
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        for path, hint in (
            ("/chat/completions", "/v1/chat/completions? Let the client's base URL end in /v1."),
            # As Anthropic's clients do.
            ("/v1/v1/messages", "/v1/messages? The client adds /v1 itself: leave it out of the base URL."),
        ):
            found = await http.post(path, json={})
            assert found.json()["error"]["message"] == f"There is no endpoint {path}. Did you mean {hint}"
        assert "Did you mean" not in (await http.post("/nothing", json={})).json()["error"]["message"]
    assert not described


async def test_requests_beyond_the_limit_are_refused_and_free_their_places(running):
    api = create_api(IngressConfig(max_active_requests=2), {})
    waiting = [Exchange(api, scope(), [b"{"], then="wait") for _ in range(2)]
    await wait_until(lambda: all(exchange.read for exchange in waiting))
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        refused = await http.post("/v1/chat/completions", json={})
        assert refused.status_code == 429 and refused.headers["retry-after"]
        assert refused.json()["error"] == {
            "message": "More than 2 requests are open; try again shortly.",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
        }
        assert (await http.get("/v1/models")).status_code == 200
        await waiting[0].aclose()
        assert (await http.post("/v1/chat/completions", json={})).status_code == 400
        await waiting[1].aclose()


async def test_a_refusal_is_one_line_of_the_log(http, caplog):
    with caplog.at_level(logging.INFO, "ray.serve"):
        body = {"model": "pocket", "messages": [], "temperature": -1}
        await http.post("/v1/chat/completions", json=body)
        await http.post("/v1/none%0Asuch", json=body)
    records = [record for record in caplog.records if record.name == "ray.serve"]
    assert [record.levelname for record in records] == ["INFO", "INFO"]
    assert not any(record.exc_info for record in records)
    first, second = (record.getMessage() for record in records)
    assert first.startswith("POST /v1/chat/completions: 400 invalid_request (temperature): temperature must")
    assert second.startswith("POST /v1/none") and "404" in second and "\n" not in second


async def test_a_client_that_leaves_while_its_body_is_read_is_no_error(running, caplog):
    with caplog.at_level(logging.INFO, "ray.serve"):
        exchange = Exchange(running.app.api, scope(), [b"{"], then="leave")
        await exchange.finished()
    assert [record.levelname for record in caplog.records if record.name == "ray.serve"] == ["INFO"]


async def test_endpoints_that_read_the_request_themselves_are_called_without_routing():
    router, routed = APIRouter(), []

    @router.post("/direct")
    async def direct(request: Request) -> Response:
        if await request.body() == b"wrong":
            raise InvalidRequest("too wrong", param="body")
        return Response(b"made")

    @router.get("/direct/{name}")
    async def named(request: Request, name: str) -> Response:
        raise AssertionError("called without its name")

    @router.get("/data")
    async def data(request: Request) -> dict:
        raise AssertionError("its answer is no response yet")

    async def app(scope, receive, send):
        routed.append((scope["method"], scope["path"]))
        await Response(b"routed")(scope, receive, send)

    direct_app = Direct(app, router.routes)
    async with httpx.AsyncClient(transport=AppTransport(direct_app), base_url="http://test") as http:
        assert (await http.post("/direct")).content == b"made" and not routed
        refused = await http.post("/direct", content=b"wrong")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "body"
        for method, path in (
            ("GET", "/direct"),
            ("GET", "/direct/one"),
            ("GET", "/data"),
            ("POST", "/other"),
        ):
            assert (await http.request(method, path)).content == b"routed"
    assert routed == [("GET", "/direct"), ("GET", "/direct/one"), ("GET", "/data"), ("POST", "/other")]


class Broken(dict):
    """Stands for models that can't even be looked up."""

    def __contains__(self, name: object) -> bool:
        raise RuntimeError("a secret of the server")


async def test_a_bug_is_a_500_without_details():
    api = create_api(IngressConfig(), Broken())
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        body = {"model": "any", "messages": []}
        found = await http.post("/v1/chat/completions", json=body)
    assert found.status_code == 500 and "secret" not in found.text
    assert found.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("prefix", ["/several", "/v1", "/a/b"])
async def test_behind_a_prefix_all_is_as_without_one(running, prefix):
    """The scope is as Ray Serve and uvicorn make it: the prefix is in ``path`` and is ``root_path``."""
    keys = [{"name": "one", "key": "secret"}]
    api = create_api(IngressConfig(keys=keys), running.app.api.state.pipelines)
    behind = httpx.ASGITransport(api, root_path=prefix)
    key = {"Authorization": "Bearer secret"}
    async with httpx.AsyncClient(transport=behind, base_url=f"http://test{prefix}") as client:
        for path in ("/health", "/health/", "/", "/page/page.css"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.head("/version")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/v1/models", headers=key)).json()["data"][0]["id"] == "pocket"
        asked = {"model": "pocket", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=asked, headers=key)).status_code == 200
        # The form of Anthropic's errors, and the header that its clients read.
        refused = await client.post("/v1/messages", json={**asked, "model": "none"}, headers=key)
        assert refused.json()["type"] == "error" and refused.headers["request-id"]
        missing = await client.get("/models", headers=key)
        assert missing.status_code == 404 and "Did you mean /v1/models?" in missing.json()["error"]["message"]
        counted = (await client.get("/metrics", headers=key)).text
        assert re.search(r'sightline_http_requests_total{.*route="/v1/chat/completions".*} 1', counted)
        described = (await client.get("/openapi.json", headers=key)).json()
        assert described["servers"] == [{"url": prefix}]
    async with httpx.AsyncClient(transport=behind, base_url="http://test") as client:
        # The page's links need the slash.
        moved = await client.get(prefix)
        assert moved.status_code == 307 and moved.headers["location"] == f"{prefix}/"
