"""Every parameter of the clients' types works, is refused by name, or is known to change nothing."""

import pytest

from tests.deployments.parameters import ENDPOINTS, LIMITS, PAGE, page, undecided

pytestmark = pytest.mark.usefixtures("idle_afterwards")

BY_PATH = {each.path: each for each in ENDPOINTS}


def test_none_is_ignored_in_silence():
    assert not list(undecided())


def test_the_page_is_that_of_the_installed_clients():
    assert PAGE.read_text() == page(), "run: python -m tests.deployments.parameters"
    for path, limits in LIMITS.items():
        assert {BY_PATH[path].state(name) for name in limits} == {"works"}


def cases(state: str) -> list[tuple[str, str]]:
    return [(each.path, name) for each in ENDPOINTS for name in each.names if each.state(name) == state]


def body(path: str) -> dict:
    given = BY_PATH[path].body
    model = "tests/vectors" if given.TASK == "embed" else "pocket"
    return {**given.EXAMPLE, "model": model} | ({} if given.TASK == "embed" else {"temperature": 0})


@pytest.mark.parametrize(("path", "name"), cases("refused"))
async def test_refused_by_name(http, path, name):
    response = await http.post(path, json={**body(path), name: {"a": 1}})
    error = response.json()["error"]
    assert response.status_code == 400
    assert f"Unsupported parameter: '{name}' is not supported" in error["message"]
    if path != "/v1/messages":
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    for nothing in (None, False, [], {}):
        assert (await http.post(path, json={**body(path), name: nothing})).status_code == 200


@pytest.mark.parametrize("path", BY_PATH)
async def test_what_has_no_effect_changes_nothing(http, path):
    names = [name for where, name in cases("no effect") if where == path]
    assert names

    async def answer(**fields) -> dict:
        response = await http.post(path, json={**body(path), **fields})
        assert response.status_code == 200, response.text
        made = response.json()
        return {key: made.get(key) for key in ("choices", "content", "data", "status")}

    assert await answer(**{name: "x" for name in names if name != "metadata"}) == await answer()
    assert await answer(metadata={"a": "b"}) == await answer()


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"verbosity": "low"}, "verbosity"),
        ("/v1/responses", {"text": {"verbosity": "high"}}, "text.verbosity"),
        ("/v1/chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
    ],
)
async def test_values_that_cannot_be_had_are_refused(http, path, fields, param):
    response = await http.post(path, json={**body(path), **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param
    asks_for_nothing = {"verbosity": "medium"} if param == "verbosity" else {}
    assert (await http.post(path, json={**body(path), **asks_for_nothing})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_the_service_tier_is_echoed(http, path):
    made = (await http.post(path, json={**body(path), "service_tier": "priority"})).json()
    assert made["service_tier"] == "priority"
