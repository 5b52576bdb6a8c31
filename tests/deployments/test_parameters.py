"""Every parameter of the clients' types works, is refused by name, or is known to change nothing."""

import json
import re

import pytest
from pytest import approx

from tests.deployments.nested_parameters import WRONG, Field, left_out, put, sample
from tests.deployments.parameters import (
    BODIES,
    ENDPOINTS,
    LIMITS,
    OTHERS,
    PAGE,
    VLLM_LIMITS,
    beyond,
    page,
    undecided,
)

pytestmark = pytest.mark.usefixtures("idle_afterwards")

BY_PATH = {each.path: each for each in ENDPOINTS}


def test_none_is_ignored_in_silence():
    assert not list(undecided())


def test_the_page_is_that_of_the_installed_clients():
    assert PAGE.read_text() == page(), "run: python -m tests.deployments.parameters"
    for path, limits in LIMITS.items():
        assert {BY_PATH[path].state(name) for name in limits} == {"works"}
    works = {(path, name) for path, name, state in beyond() if state == "works"}
    assert works >= {(path, name) for path, limits in VLLM_LIMITS.items() for name in limits}


def cases(state: str) -> list[tuple[str, str]]:
    """Endpoint and name of each parameter that is treated so, of clients and of vLLM's server."""
    found = [(each.path, name) for each in ENDPOINTS for name in each.names if each.state(name) == state]
    more = [(path, name) for path, name, treated in beyond() if treated == state and path in BY_PATH]
    return list(dict.fromkeys([*found, *more]))


def body(path: str) -> dict:
    given = BODIES[path]
    model = "tests/vectors" if "embed" in given.TASKS else "pocket"
    return {**given.EXAMPLE, "model": model} | ({} if "embed" in given.TASKS else {"temperature": 0})


def at_most(path: str, tokens: int) -> dict:
    """The field that bounds the tokens of an answer."""
    return {"max_output_tokens" if path == "/v1/responses" else "max_tokens": tokens}


@pytest.mark.parametrize(("path", "name"), cases("refused"))
async def test_refused_by_name(http, path, name):
    response = await http.post(path, json={**body(path), name: {"a": 1}})
    error = response.json()["error"]
    assert response.status_code == 400
    assert f"Unsupported parameter: '{name}' is not supported" in error["message"]
    if path != "/v1/messages":
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    short = body(path) | at_most(path, 1)
    for nothing in (None, False, [], {}):
        assert (await http.post(path, json={**short, name: nothing})).status_code == 200


@pytest.mark.parametrize("path", BY_PATH)
async def test_what_has_no_effect_changes_nothing(http, path):
    names = [name for where, name in cases("no effect") if where == path]
    assert names

    async def answer(**fields) -> dict:
        response = await http.post(path, json={**body(path), **fields})
        assert response.status_code == 200, response.text
        made = response.json()
        # The last bits of a vector depend on the batch that it was made in.
        vectors = [approx(each["embedding"], abs=1e-5) for each in made.get("data", ())]
        vectors += [approx(each["probability"], abs=1e-5) for each in made.get("answers", ())]
        return {"data": vectors, **{key: made.get(key) for key in ("choices", "content", "status")}}

    async def same(**fields) -> None:
        with_them, without = await answer(**fields), await answer()
        assert with_them | {"data": [each.expected for each in with_them["data"]]} == without

    await same(**{name: "x" for name in names if name != "metadata"})
    await same(metadata={"a": "b"})


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


def nested(*states: str) -> list[tuple[str, Field]]:
    """One field for each row of the tables of fields within parameters."""
    rows: dict[tuple[str, str], Field] = {}
    for each in ENDPOINTS:
        for path, field in each.nested().items():
            row, state, _ = each.treatment(path)
            if state in states:
                rows.setdefault((each.path, row), field)
    return [(path, field) for (path, _), field in rows.items()]


def around(path: str, field: Field) -> dict:
    """A body that may hold the field."""
    named = {"type": "function", "function": {"name": "report"}}
    flat = {"type": "function", "name": "report", "parameters": {"type": "object"}}
    tools: dict = {"tools": [flat if path == "/v1/responses" else named]}
    if path == "/v1/messages":
        tools = {"tools": [{"name": "report", "input_schema": {"type": "object"}}]}
    beside = {
        "stream_options": {"stream": True},
        "tool_choice": tools,
        # Only a call that is required can be had of this model.
        "tools": {"tool_choice": {"type": "any"} if path == "/v1/messages" else "required"},
        "function_call": {"functions": [{"name": "report"}]},
    }
    return {**body(path), **at_most(path, 16), **beside.get(str(field.steps[0]), {})}


def named_field(path: str, error: dict, field: Field) -> str | None:
    """The field that an error names."""
    if path != "/v1/messages":
        return error["param"]
    # Anthropic's errors have no place for it but their message.
    found = re.search(rf"\b{field.steps[0]}\b([\w.\[\]]*[\w\]])?", error["message"])
    return found and found[0]


async def test_a_wrong_value_within_a_parameter_is_refused_by_its_own_name(http):
    """So each of these fields is read."""
    fields = nested("works")
    assert len(fields) > 80
    for path, field in fields:
        # A list of objects is right for examples and for JSON.
        wrong = "wrong" if field.path.endswith(("input_examples", "<input_json>.data")) else WRONG
        response = await http.post(path, json=put(around(path, field), field, wrong))
        assert response.status_code == 400, (path, field.path, response.text)
        error = response.json()["error"]
        named, wanted = named_field(path, error, field), field.param
        # The object may be named that holds the field, or the entry of it.
        assert named and (wanted.startswith(named) or named.startswith(wanted)), (wanted, error)


@pytest.mark.parametrize("path", OTHERS)
async def test_other_endpoints_refuse_by_name_and_log_what_they_do_not_know(http, path, caplog):
    given = body(path)
    assert (await http.post(path, json=given)).status_code == 200
    for name in OTHERS[path].REFUSED:
        response = await http.post(path, json={**given, name: {"a": 1}})
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    for name in OTHERS[path].model_fields:
        # Null is absence: of a field that must be given, it is the field that is missing.
        response = await http.post(path, json={**given, name: None})
        assert response.status_code == 200 or response.json()["error"]["param"], (name, response.text)
    caplog.clear()
    for _ in range(2):
        assert (await http.post(path, json={**given, "never_heard_of_here": 1})).status_code == 200
    logged = [record.getMessage() for record in caplog.records if "unknown" in record.getMessage()]
    assert logged == ["the unknown field 'never_heard_of_here' is ignored"]


@pytest.mark.parametrize("path", [*BY_PATH, *OTHERS])
async def test_a_wrong_value_of_any_field_is_refused_by_its_own_name(http, path):
    """Also of fields that only other servers' clients know."""
    for name, known in BODIES[path].model_fields.items():
        field = known.alias or name
        given = {**body(path), field: WRONG}
        if name == "messages":
            for other in ("input", "prompt"):
                given.pop(other, None)
        response = await http.post(path, json=given)
        assert response.status_code in (400, 404), (field, response.text)
        error = response.json()["error"]
        if path == "/v1/messages":
            # Anthropic's errors have no place for the name but their message.
            assert re.search(rf"\b{field}\b", error["message"]), (field, error)
        else:
            assert re.match(rf"{field}\b", error["param"]), (field, error)
            # The types that it may have are no fields.
            assert not re.search(r"\.(str|int|float|bool)\b", error["param"]), (field, error)


async def test_what_is_not_offered_within_a_parameter_is_refused_by_name(http):
    fields = nested("refused")
    assert len(fields) > 30
    for path, field in fields:
        response = await http.post(path, json=put(around(path, field), field, sample(field.hint, field.name)))
        assert response.status_code == 400, (path, field.path, response.text)
        named = named_field(path, response.json()["error"], field)
        assert named, (field.param, response.text)
        # Objects of kinds that are not offered are named by their type, or by what they lack.
        holder = named.removesuffix(".type").removesuffix(".function").removesuffix(".role")
        assert field.param.startswith(holder), (field.param, named)


async def test_fields_without_effect_within_a_parameter_change_nothing(http, wide):
    fields = nested("no effect")
    assert len(fields) > 30
    fields = fields if wide else fields[::3]
    # Many fields leave the same body behind.
    wanted: dict[str, list] = {}
    for path, field in fields:
        given = put(around(path, field), field, sample(field.hint, field.name))
        without = left_out(given, field)
        name = f"{path} {json.dumps(without, sort_keys=True)}"
        if name not in wanted:
            wanted[name] = await answers(http, path, without)
        assert await answers(http, path, given) == wanted[name], field.path


async def answers(http, path: str, given: dict) -> list:
    """The texts and calls of an answer."""
    response = await http.post(path, json=given)
    assert response.status_code == 200, (path, given, response.text)
    if given.get("stream"):
        return ["".join(re.findall(r'"content":"([^"]*)"', response.text))]
    made = response.json()
    if "choices" in made:
        return made["choices"]
    if "answers" in made:
        # What is computed with a cached prefix rounds differently.
        return [round(answer["probability"], 3) for answer in made["answers"]]
    if "content" in made:
        return [{**block, "id": None} for block in made["content"]]
    return [[item.get(name) for name in ("content", "arguments", "input")] for item in made["output"]]


def unknown_fields(path: str, given: dict, caplog) -> list[str]:
    """The unknown fields that reading a body logs."""
    caplog.clear()
    BODIES[path].read(given)
    return [re.findall("'(.*)'", record.getMessage())[0] for record in caplog.records]


#: Endpoints whose nested fields are plain data, which is looked through where a body is read.
PLAIN = ("/v1/chat/completions", "/v1/responses")


def test_a_field_within_a_parameter_is_logged_only_if_nobody_knows_it(caplog):
    fields = [
        (path, field)
        for path, field in nested("works", "no effect")
        # Citations, callers and logprobs are not looked into.
        if path in PLAIN and not re.search(r"\.(annotations|logprobs|caller|tools)\b.*\.", field.path)
    ]
    assert len(fields) > 80
    for path, field in fields:
        given = put(around(path, field), field, sample(field.hint, field.name))
        assert unknown_fields(path, given, caplog) == [], field.path


NEVER = {"never_heard_of": 1, "absent": None}
CONTENT = [
    {"type": "text", "text": "a", **NEVER},
    {"type": "image_url", "image_url": {"url": "data:,", **NEVER}},
    {"type": "file", "file": {"file_data": "data:,", **NEVER}},
]
LOGGED = ["content[].", "content[].file.", "content[].image_url."]


@pytest.mark.parametrize(
    ("path", "given", "objects"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": CONTENT, **NEVER},
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "a", "function": {"name": "f", **NEVER}, **NEVER}],
                        "function_call": {"name": "f", **NEVER},
                    },
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": NEVER, **NEVER}}],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [NEVER], **NEVER}},
                "response_format": {"type": "text", **NEVER},
            },
            [
                "messages[].",
                *(f"messages[].{each}" for each in LOGGED),
                "messages[].function_call.",
                "messages[].tool_calls[].",
                "messages[].tool_calls[].function.",
                "response_format.",
                "tool_choice.allowed_tools.",
                "tool_choice.allowed_tools.tools[].",
                "tools[].function.",
            ],
        ),
        (
            "/v1/chat/completions",
            {"messages": [], "functions": [{"name": "f", **NEVER}], "function_call": {"name": "f", **NEVER}},
            ["function_call.", "functions[]."],
        ),
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": CONTENT, **NEVER},
                    {"type": "function_call_output", "output": [CONTENT[0]]},
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "", **NEVER}]},
                ]
            },
            [
                "input[].",
                *(f"input[].{each}" for each in LOGGED),
                "input[].output[].",
                "input[].summary[].",
            ],
        ),
        (
            "/v1/embeddings",
            {"messages": [{"role": "user", "content": CONTENT}]},
            [f"messages[].{each}" for each in LOGGED],
        ),
        ("/pooling", {"messages": [{"role": "user", "content": "", **NEVER}]}, ["messages[]."]),
        ("/tokenize", {"messages": [{"role": "user", "content": "", **NEVER}]}, ["messages[]."]),
        (
            "/v1/score",
            {"queries": {"text": "a", **NEVER}, "text_2": [{"content": CONTENT}]},
            ["queries.", *(f"text_2[].{each}" for each in LOGGED)],
        ),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "a", **NEVER}]}, ["documents[]."]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_unknown_fields_of_plain_objects_are_logged_once(path, given, objects, caplog):
    """By the way to them. A schema may hold any field, and null is absence."""
    given = {"model": "pocket", **given}
    assert sorted(unknown_fields(path, given, caplog)) == sorted(f"{each}never_heard_of" for each in objects)
    assert unknown_fields(path, given, caplog) == []


def test_clients_cannot_fill_the_log_with_names(caplog):
    given = {"model": "pocket", "prompt": "a"}
    for _ in range(2):
        BODIES["/v1/completions"].read({**given, **{f"never_heard_of_{i}": 1 for i in range(1000)}})
    *named, last = [record.getMessage() for record in caplog.records]
    assert named == [f"the unknown field 'never_heard_of_{i}' is ignored" for i in range(256)]
    assert last == "256 unknown fields were logged; further ones are ignored in silence"
