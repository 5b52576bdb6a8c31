"""Arguments follow their schemas in every format of calls, also where schemas refer to each other."""

import json

import jsonschema
import pytest

from engine.parsers.arguments import arguments_of, is_text, resolved, standalone, text_choices
from engine.parsers.formats import TOOL_FORMATS
from engine.parsers.grammar import ToolSchema, tool_grammar
from tests.engine.parsers.cuts import joined
from tests.engine.parsers.test_grammar import vocabulary

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

#: Schemas of one argument ``value``, beside what they refer to.
SCHEMAS = {
    "choices by reference": {"$ref": "#/$defs/Choice"},
    "choices that look like JSON": {"enum": ["1", "true", "null"]},
    "text that looks like JSON": {"type": "string", "pattern": "^[0-9]{2}$"},
    "one text": {"const": "cat", "type": "string"},
    "pattern within": {"type": "string", "pattern": "[a-c]/\\\\d", "maxLength": 9},
    "pattern on the left": {"type": "string", "pattern": "^(ab|c)+-"},
    "optional": {"anyOf": [{"$ref": "#/$defs/Choice"}, {"type": "null"}]},
    "boolean by reference": {"$ref": "#/definitions/Sure"},
    "objects in a list": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "maxItems": 2},
    "chain of references": {"$ref": "#/$defs/Alias"},
    "recursion": {"$ref": "#/$defs/Node"},
    "reference to a sibling": {"$ref": "#/properties/other"},
}
DEFINITIONS = {
    "$defs": {
        "Choice": {"enum": ["red", "dark blue"]},
        "Point": {
            "type": "object",
            "properties": {"x": {"$ref": "#/$defs/Digit"}, "default": {"$ref": "#/$defs/Digit"}},
            "required": ["x"],
            "additionalProperties": False,
        },
        "Digit": DIGIT,
        "Alias": {"$ref": "#/$defs/Choice"},
        "Node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Node"}]}},
            "required": ["next"],
            "additionalProperties": False,
        },
    },
    "definitions": {"Sure": {"type": "boolean"}},
}


def parameters(schema: dict) -> dict:
    return {
        "type": "object",
        "properties": {"value": schema, "other": DIGIT},
        "required": ["value"],
        "additionalProperties": False,
        **DEFINITIONS,
    }


@pytest.mark.parametrize("found", TOOL_FORMATS.values(), ids=lambda found: found.name)
def test_arguments_follow_schemas_that_refer_to_each_other(found):
    words = vocabulary("tokens")
    for name, schema in SCHEMAS.items():
        given = parameters(schema)
        tools = [ToolSchema("f", given)]
        grammar = tool_grammar(found.layout, tools, words.special, choice="required", parallel=False)
        finished = 0
        for seed in range(4):
            walk = words.walk(grammar, seed)
            ((_, arguments),) = joined(found.parser({"f": given}), [walk.text])["calls"] or [("", "")]
            if walk.finished:
                jsonschema.validate(json.loads(arguments), given)
                finished += 1
        assert finished or "pattern" in schema, name


#: Schemas of all arguments of a function.
FUNCTIONS = {
    "reference": {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": DIGIT}, "required": ["a"]}}},
    "parts": {
        "allOf": [
            {"properties": {"a": {"type": "boolean"}}, "required": ["a"]},
            {"$ref": "#/$defs/B"},
        ],
        "$defs": {"B": {"properties": {"b": DIGIT}, "required": ["b"]}},
    },
    "reference beside others": {
        "$ref": "#/$defs/A",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "$defs": {"A": {"properties": {"a": DIGIT}, "required": ["a"]}},
    },
    "any value": {"properties": {"a": True}, "required": ["a"], "additionalProperties": False},
    "required beside": {"properties": {"a": DIGIT}, "required": ["b", "a"], "additionalProperties": DIGIT},
    "no names": {"additionalProperties": DIGIT},
    "keys that are no names": {
        "properties": {"a-b c": DIGIT, "class": DIGIT, 'a>b\n"c': {"enum": ["x"]}, "a>b": DIGIT, "1": DIGIT},
        "required": ["a-b c", "class", 'a>b\n"c', "a>b", "1"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("found", TOOL_FORMATS.values(), ids=lambda found: found.name)
@pytest.mark.parametrize("given", FUNCTIONS.values(), ids=FUNCTIONS)
def test_all_arguments_that_are_required_come(found, given):
    words = vocabulary("tokens")
    tools = [ToolSchema("my-tool.x:1", {"type": "object", **given})]
    grammar = tool_grammar(found.layout, tools, words.special, choice="required", parallel=False)
    finished = 0
    for seed in range(4):
        walk = words.walk(grammar, seed)
        if walk.finished:
            ((name, arguments),) = joined(found.parser({"my-tool.x:1": given}), [walk.text])["calls"]
            assert name == "my-tool.x:1"
            jsonschema.validate(json.loads(arguments), given)
            finished += 1
    assert finished or given == FUNCTIONS["any value"]


#: A call whose arguments are two digits.
CALLS = {
    "qwen_xml": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
    "<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
    "glm": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
    "<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": 2}}\n</tool_call>',
    "gemma4": "<|tool_call>call:f{a:1,b:2}<tool_call|>",
    "pythonic": "[f(a=1, b=2)]",
}


@pytest.mark.parametrize("found", CALLS)
@pytest.mark.parametrize(
    ("schema", "allowed"),
    [
        ({"properties": {"a": DIGIT}, "additionalProperties": DIGIT}, True),
        ({"additionalProperties": DIGIT}, True),
        ({"properties": {"a": DIGIT}, "additionalProperties": {"type": "boolean"}}, False),
        ({"properties": {"a": DIGIT}, "additionalProperties": False}, False),
    ],
)
def test_arguments_that_the_schema_does_not_name(found, schema, allowed):
    words = vocabulary("tokens")
    given, layout = {"type": "object", **schema}, TOOL_FORMATS[found]
    grammar = tool_grammar(layout.layout, [ToolSchema("f", given)], words.special, choice="required")
    assert words.accepts(grammar, CALLS[found]) == allowed
    if allowed:
        assert joined(layout.parser({"f": given}), [CALLS[found]])["calls"] == [("f", '{"a": 1, "b": 2}')]


@pytest.mark.parametrize("found", CALLS)
@pytest.mark.parametrize(
    ("schema", "digits"),
    [
        ({"type": "integer"}, 19),
        ({"type": ["integer", "null"], "description": "a count"}, 19),
        ({"type": "integer", "minimum": 0}, 19),
        ({"anyOf": [{"type": "integer", "exclusiveMinimum": 1}, {"type": "null"}]}, 19),
        ({"$ref": "#/$defs/Count"}, 19),
        ({"type": "integer", "enum": [1, 2]}, 1),
        ({"type": "integer", "minimum": 0, "maximum": 99}, 2),
    ],
)
def test_integers_have_a_bounded_number_of_digits(found, schema, digits):
    words, layout = vocabulary("tokens"), TOOL_FORMATS[found].layout
    given = {"properties": {"a": schema, "b": True}, "$defs": {"Count": {"type": "integer"}}}
    tools = [ToolSchema("f", {"type": "object", **given})]
    grammar = tool_grammar(layout, tools, words.special, choice="required")
    begin, _, end = CALLS[found].partition("1")
    assert words.accepts(grammar, begin + "1" * digits + end)
    assert not words.accepts(grammar, begin + "1" * (digits + 1) + end)


@pytest.mark.parametrize("name", ["qwen_xml", "glm"])
def test_an_argument_of_any_kind_is_text_where_it_is_no_json(name):
    words, found = vocabulary("tokens"), TOOL_FORMATS[name]
    call = CALLS[name].replace("2", "New York")
    grammar = tool_grammar(
        found.layout, [ToolSchema("f", {"type": "object"})], words.special, choice="required"
    )
    assert words.accepts(grammar, call)
    assert joined(found.parser({"f": {}}), [call])["calls"] == [("f", '{"a": 1, "b": "New York"}')]


def test_a_part_stands_alone_with_all_that_it_refers_to():
    root = parameters({"$ref": "#/$defs/Point", "title": "#/x"})
    alone = standalone(root, root["properties"]["value"])
    jsonschema.validate({"x": 3, "default": 4}, alone)
    for wrong in ({"x": 10}, {"x": 3, "default": "a"}, {"x": 3, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, alone)
    assert standalone(root, DIGIT) is DIGIT
    missing = {"$ref": "#/$defs/Nothing"}
    assert standalone(root, missing) is missing
    # The compiler says that it is no schema.
    no_schema = [{"$ref": "#/$defs/Point"}]
    assert standalone(root, no_schema) is no_schema
    whole = standalone({"type": "array", "items": {"$ref": "#"}}, {"$ref": "#"})
    jsonschema.validate([[], [[]]], whole)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([[], [1]], whole)
    # Values are no schemas, even if they look like references.
    data = {"enum": [{"$ref": "#/a"}], "properties": {"enum": {"$ref": "#/$defs/Digit"}}}
    assert standalone(root, data)["enum"] == data["enum"]
    assert standalone(root, data)["properties"]["enum"] == {"$ref": "#/$defs/0"}


def test_parts_that_refer_to_each_other_are_read_once():
    again = [{"$ref": "#/$defs/A"}] * 9
    part = {"allOf": again, "properties": {"a": DIGIT}, "required": ["a"]}
    root = {"type": "object", "allOf": [*again, {"properties": {"b": DIGIT}}], "$defs": {"A": part}}
    assert {name: found.required for name, found in arguments_of(root).items()} == {"a": True, "b": False}


def test_references_in_a_circle_lead_nowhere():
    root = {"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}}
    assert not is_text(resolved(root, {"$ref": "#/$defs/A"}))
    assert resolved(root, {"$ref": "#/$defs/C"}) == {} == resolved(root, True)
    assert text_choices({"enum": ["a", 1]}) is None
