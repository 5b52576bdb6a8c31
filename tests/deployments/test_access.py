"""API keys, their limits and caches, and pages of other origins."""

from types import SimpleNamespace

import httpx
import pytest
import pytest_asyncio

from deployments.access import Access, Caller, KeyConfig
from deployments.api import create_api
from deployments.config import IngressConfig
from deployments.errors import error_headers
from engine.errors import ConfigError, InvalidRequest, Overloaded
from engine.media.ledger import Ledger
from tests.deployments.asgi import AppTransport

HELLO = [{"role": "user", "content": "Hello!"}]
CHAT = {"model": "pocket", "messages": HELLO, "max_tokens": 4, "temperature": 0}


@pytest_asyncio.fixture(loop_scope="session")
async def guarded(running, tmp_path, monkeypatch):
    """A client of the application behind keys."""
    monkeypatch.setenv("OTHER_KEY", "other-secret")
    (tmp_path / "key").write_text("file-secret\n")
    keys = [
        {"name": "one", "key": "secret", "max_active_requests": 1},
        {"name": "other", "env": "OTHER_KEY", "max_active_tokens": 100},
        {"name": "file", "file": str(tmp_path / "key"), "own_cache": False},
    ]
    config = IngressConfig(keys=keys, cors_origins=["http://localhost:3000"])
    api = create_api(config, running.app.api.state.pipelines)
    yield httpx.AsyncClient(transport=AppTransport(api), base_url="http://test", timeout=60)
    await running.wait_until_idle()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(""), {"Authorization": "Basic secret"}, bearer("sécret"), bearer("secre")],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/openapi.json", "/load", "/nothing"])
async def test_every_path_but_the_probes_needs_a_key(guarded, headers, path):
    response = await guarded.get(path, headers={k: v.encode() for k, v in headers.items()})
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "secret" not in response.text


@pytest.mark.parametrize("path", ["/health", "/ping", "/version"])
async def test_probes_need_no_key(guarded, path):
    assert (await guarded.get(path)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [bearer("secret"), bearer("other-secret"), bearer("file-secret"), {"x-api-key": "secret"}],
)
async def test_each_key_opens(guarded, headers):
    response = await guarded.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 200, response.text


async def test_a_key_has_so_many_requests_open(guarded):
    body = CHAT | {"max_tokens": 900, "ignore_eos": True, "stream": True}
    async with guarded.stream("POST", "/v1/chat/completions", json=body, headers=bearer("secret")) as first:
        assert first.status_code == 200
        refused = await guarded.post("/v1/chat/completions", json=CHAT, headers=bearer("secret"))
        assert refused.status_code == 429 and refused.headers["retry-after"]
        other = await guarded.get("/v1/models", headers=bearer("other-secret"))
        assert other.status_code == 200
    again = await guarded.post("/v1/chat/completions", json=CHAT, headers=bearer("secret"))
    assert again.status_code == 200


def test_refused_requests_are_told_to_come_back_one_after_the_other(monkeypatch):
    monkeypatch.setattr("deployments.access.time", SimpleNamespace(monotonic=lambda: now))
    caller, now = Caller(KeyConfig(name="a", key="k", max_active_requests=1, max_active_tokens=9)), 100.0

    def refused() -> int:
        with pytest.raises(Overloaded) as caught:
            caller.enter(Ledger())
        return int(error_headers(caught.value)["Retry-After"])

    def visits(count: int) -> None:
        for _ in range(count):
            caller.enter(Ledger()).end()

    visiting = caller.enter(Ledger())
    assert [refused() for _ in range(4)] == [2, 3, 4, 5]
    visiting.end()
    # Nobody waits any more, and requests end faster.
    visits(100)
    visiting = caller.enter(Ledger())
    assert [refused() for _ in range(50)][-1] == 3
    visiting.end()
    # What is refused for its tokens has not been at work, nor have requests that only look.
    now = 200.0
    for _ in range(100):
        caller.enter(Ledger(), works=False).end()
        visiting = caller.enter(Ledger())
        with pytest.raises(InvalidRequest):
            visiting.charge(10)
        visiting.end()
    visiting = caller.enter(Ledger())
    assert [refused() for _ in range(4)] == [2, 3, 4, 5]


def test_only_work_counts_to_the_requests_of_a_key():
    caller = Caller(KeyConfig(name="a", key="k", max_active_requests=1))
    looking = caller.enter(Ledger(), works=False)
    working = caller.enter(Ledger())
    looking.end()
    caller.enter(Ledger(), works=False).end()
    with pytest.raises(Overloaded, match="has 1 requests open"):
        caller.enter(Ledger())
    working.end()
    caller.enter(Ledger()).end()


async def test_a_key_asks_for_so_many_tokens(guarded):
    body = CHAT | {"max_tokens": 200}
    refused = await guarded.post("/v1/chat/completions", json=body, headers=bearer("other-secret"))
    # Not 429: it could never be answered, however often it came back.
    assert refused.status_code == 400 and "limit is 100" in refused.json()["error"]["message"]
    # What was refused is not counted, nor what has ended: these ask for more than the limit together.
    for _ in range(9):
        taken = await guarded.post("/v1/chat/completions", json=CHAT, headers=bearer("other-secret"))
        assert taken.status_code == 200


@pytest.mark.parametrize("fields", [{"max_tokens": 50, "n": 2}, {"max_tokens": None}])
async def test_all_completions_count_to_their_longest(guarded, fields):
    refused = await guarded.post("/v1/chat/completions", json=CHAT | fields, headers=bearer("other-secret"))
    assert refused.status_code == 400 and "limit is 100" in refused.json()["error"]["message"]


def test_requests_that_ask_for_too_much_together_may_come_back():
    caller = Caller(KeyConfig(name="a", key="k", max_active_tokens=9))
    first, second = caller.enter(Ledger()), caller.enter(Ledger())
    first.charge(5)
    with pytest.raises(Overloaded, match="ask for 5 tokens, and this request for 6; its limit is 9"):
        second.charge(6)
    # Several prompts of one request count together.
    with pytest.raises(InvalidRequest, match="asks for 10 tokens"):
        first.charge(5)
    first.end()
    second.charge(6)
    second.end()


@pytest.mark.parametrize("key", ["two words", "a\nb", "schlüssel", " ", "\x00"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ConfigError) as refused:
        Access(ledger=Ledger()).change([KeyConfig(name="a", key=key)])
    assert refused.value.param == "keys"
    assert "words" not in refused.value.message and "schlüssel" not in refused.value.message


def test_one_key_has_one_name(monkeypatch):
    monkeypatch.setenv("SAME", "k\n")
    keys = [KeyConfig(name="a", key="k"), KeyConfig(name="a", env="SAME")]
    access = Access(ledger=Ledger())
    access.change(keys)
    with pytest.raises(ConfigError, match="the keys 'a' and 'b' are the same"):
        access.change([*keys, KeyConfig(name="b", key="k")])


async def test_keys_share_no_cache_and_no_responses(guarded):
    long = [{"role": "user", "content": "One two three four five six seven eight nine ten. " * 4}]

    async def cached(key: str) -> int:
        body = CHAT | {"messages": long}
        response = await guarded.post("/v1/chat/completions", json=body, headers=bearer(key))
        return response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert await cached("secret") == 0 and await cached("secret") > 0
    assert await cached("file-secret") == 0
    made = await guarded.post(
        "/v1/responses", json={"model": "pocket", "input": "Hello!"}, headers=bearer("secret")
    )
    path = f"/v1/responses/{made.json()['id']}"
    assert (await guarded.get(path, headers=bearer("secret"))).status_code == 200
    assert (await guarded.get(path, headers=bearer("file-secret"))).status_code == 404


async def test_pages_of_other_origins(guarded):
    asked = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    response = await guarded.options("/v1/chat/completions", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    made = await guarded.get("/v1/models", headers=bearer("secret") | {"Origin": "http://localhost:3000"})
    assert made.headers["access-control-allow-origin"] == "http://localhost:3000"
    other = await guarded.get("/v1/models", headers=bearer("secret") | {"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_a_key_says_where_it_is():
    for given in ({}, {"key": "a", "env": "B"}):
        with pytest.raises(ValueError, match="exactly one"):
            KeyConfig(name="a", **given)
    with pytest.raises(ConfigError, match="empty"):
        KeyConfig(name="a", env="NO_SUCH_VARIABLE").secret()
    with pytest.raises(ConfigError, match="can't be read"):
        KeyConfig(name="a", file="/no/such/file").secret()
    assert "hidden" not in repr(KeyConfig(name="a", key="hidden"))
