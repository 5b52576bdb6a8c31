"""The server's own description: complete, true for its examples, and no input that it allows is a 5xx."""

import asyncio
from threading import Event
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
import schemathesis

from deployments.api import create_api
from deployments.config import IngressConfig
from tests.deployments.asgi import AppTransport
from tests.serving import wait_until

pytestmark = pytest.mark.usefixtures("idle_afterwards")

#: Endpoints that write no JSON, or that other tests hold to their form.
PLAIN = {"/health", "/ping", "/version", "/load", "/metrics", "/v1/models", "/v1/models/{name}"}


@pytest.fixture
def described(running) -> dict[str, Any]:
    return running.app.api.openapi()


def operations(described: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_endpoint_says_what_it_reads_and_writes(described):
    found = operations(described)
    assert len(found) > 15
    for path, method, operation in found:
        if path in PLAIN or path.startswith("/playground"):
            continue
        responses = operation["responses"]
        assert "422" not in responses and {"401", "404", "500", "503"} <= responses.keys()
        assert responses["200"]["content"]["application/json"]["schema"]["$ref"], path
        error = responses["404"]["content"]["application/json"]["schema"]["$ref"]
        anthropic = path.startswith("/v1/messages")
        assert error.endswith("/AnthropicErrorResponse" if anthropic else "/ErrorResponse")
        if method == "post" and "{" not in path:
            content = operation["requestBody"]["content"]["application/json"]
            assert content["schema"]["$ref"] and content["example"]["model"] in ("pocket", "tests/vectors")
            assert {"400", "413", "429"} <= responses.keys()
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_every_reference_has_its_schema(described):
    def references(node: Any):
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    schemas = described["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in references(described)} <= schemas.keys()


async def test_the_event_loop_goes_on_while_the_description_is_built():
    """It takes tenths of a second, and is built once."""
    api = create_api(IngressConfig(), {})
    build, begun, goes_on = api.openapi, Event(), Event()

    def slow() -> dict[str, Any]:
        begun.set()
        assert goes_on.wait(60)
        return build()

    api.openapi = slow
    async with httpx.AsyncClient(transport=AppTransport(api), base_url="http://test") as http:
        asked = [asyncio.create_task(http.get("/openapi.json")) for _ in range(2)]
        await wait_until(begun.is_set)
        assert (await http.get("/ping")).status_code == 200
        assert not any(each.done() for each in asked)
        goes_on.set()
        first, second = [(await each).json() for each in asked]
        assert first == second == build() and "servers" not in first
        # A server behind a prefix says so.
        behind = httpx.AsyncClient(transport=httpx.ASGITransport(api, root_path="/a"), base_url="http://test")
        assert (await behind.get("/openapi.json")).json() == {"servers": [{"url": "/a"}], **first}


async def test_every_example_is_answered_in_the_described_form(http, described):
    asked = 0
    for path, _, operation in operations(described):
        if "requestBody" not in operation:
            continue
        example = operation["requestBody"]["content"]["application/json"]["example"]
        response = await http.post(path, json=example)
        assert response.status_code == 200, (path, response.text)
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), {**schema, "components": described["components"]})
        refused = await http.post(path, json={**example, "model": "none"})
        schema = operation["responses"]["404"]["content"]["application/json"]["schema"]
        jsonschema.validate(refused.json(), {**schema, "components": described["components"]})
        asked += 1
    assert asked >= 11


#: Fields that say how long an answer may get. Random values would keep the engine busy for minutes.
LONG = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_length", "min_tokens", "min_length")


def bounded(body: Any, example: dict[str, Any], number: int) -> Any:
    """``body`` for a model that is served, with short answers; every second body has what the example has."""
    if not isinstance(body, dict):
        return body
    body = {**body, "model": example["model"]}
    if number % 2:
        body |= {name: value for name, value in example.items() if name not in LONG}
    if isinstance(body.get("n"), int):
        body["n"] = min(body["n"], 3)
    given = [name for name in LONG if isinstance(body.get(name), int)]
    body |= {name: min(body[name], 3) for name in given}
    if not any(name.startswith("max_") and body.get(name) for name in given):
        body[next((name for name in LONG if name in example), "max_tokens")] = 3
    return {**body, "background": False} if "background" in body else body


async def test_no_body_that_the_description_allows_is_a_fault_of_the_server(http, described):
    loop = asyncio.get_running_loop()
    schema = schemathesis.openapi.from_dict(described)
    statuses: dict[str, list[int]] = {}

    def ask(path: str, example: dict[str, Any], body: Any) -> int:
        body = bounded(body, example, len(statuses.setdefault(path, [])))
        asked = asyncio.run_coroutine_threadsafe(http.post(path, json=body), loop)
        response = asked.result(60)
        assert response.status_code < 500, (path, body, response.text)
        return response.status_code

    def explore(path: str, operation: dict[str, Any]) -> None:
        example = operation["requestBody"]["content"]["application/json"]["example"]

        @hypothesis.seed(0)
        @hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
        @hypothesis.given(case=schema[path]["POST"].as_strategy())
        def check(case) -> None:
            statuses[path].append(ask(path, example, case.body))

        statuses[path] = []
        check()

    for path, _, operation in operations(described):
        if "requestBody" in operation:
            await asyncio.to_thread(explore, path, operation)
    assert sum(len(each) for each in statuses.values()) >= 55
    # Not everything is refused at the door.
    assert sum(200 in each for each in statuses.values()) > 3, statuses


@pytest.mark.parametrize("name", ["none", "%00", "a/b", "é" * 300])
@pytest.mark.parametrize("method", ["GET", "DELETE", "POST"])
async def test_names_in_paths_are_looked_up(http, name, method):
    for path in (f"/v1/models/{name}", f"/v1/responses/{name}", f"/v1/responses/{name}/cancel"):
        assert (await http.request(method, path)).status_code in (400, 404, 405)
