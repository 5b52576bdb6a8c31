"""The files of the pages: what is served, to whom, and under which policy."""

import re
import signal

import httpx
import pytest
import uvicorn

from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.routers.page import _FILES
from tests.deployments.asgi import AppTransport

PATHS = ["/", "/page/docs", *(f"/page/{name}" for name in _FILES)]


def client(running, **ingress) -> httpx.AsyncClient:
    api = create_api(IngressConfig(**ingress), running.app.api.state.pipelines)
    return httpx.AsyncClient(transport=AppTransport(api), base_url="http://test")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_every_file_is_served_under_a_policy_that_allows_no_other_server(http, method):
    assert len(PATHS) > 8
    for path in PATHS:
        response = await http.request(method, path)
        assert response.status_code == 200, path
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert bool(response.content) == (method == "GET")


def test_no_file_names_another_server():
    """Addresses in attributes of HTML and in CSS; namespaces and placeholders load nothing."""
    for path in _FILES.values():
        text = path.read_text()
        assert re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", text) == [], path
        assert "<script>" not in text and not re.search(r"\son\w+=", text), path


async def test_other_methods_and_other_files_are_refused(http):
    assert (await http.post("/", json={})).status_code == 405
    for name in ("none.js", "..%2Fapi.py", "%2e%2e/api.py"):
        assert (await http.get(f"/page/{name}")).status_code == 404


async def test_the_pages_need_no_key_but_everything_they_ask_for_does(running):
    async with client(running, keys=[{"name": "one", "key": "secret"}]) as http:
        for path in (*PATHS, "/docs"):
            assert (await http.get(path, follow_redirects=True)).status_code == 200, path
            assert (await http.post(path, json={})).status_code == 401, path
        for path in ("/v1/models", "/openapi.json", "/metrics"):
            assert (await http.get(path)).status_code == 401, path


async def test_the_pages_may_be_left_out(running):
    async with client(running, page=False) as http:
        for path in (*PATHS, "/docs"):
            assert (await http.get(path)).status_code == 404, path
        assert (await http.get("/openapi.json")).status_code == 200


async def test_docs_lead_to_the_page_of_the_api(http):
    response = await http.get("/docs", follow_redirects=True)
    assert response.status_code == 200 and "Sightline: API" in response.text


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_the_server_of_these_tests_leaves_signals_to_the_process(site, name):
    handler = signal.getsignal(getattr(signal, name))
    assert not isinstance(getattr(handler, "__self__", None), uvicorn.Server)
