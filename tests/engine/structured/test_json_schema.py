"""JSON schemas: what is followed, and what is refused with the keyword named and advice."""

import json
import re
from types import SimpleNamespace

import jsonschema
import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from engine.structured.checks import GrammarRefused
from engine.structured.json_schema import close_objects, literals, prepare_schema
from engine.structured.prepare import prepare
from tests.engine.structured.conftest import EOS, encode
from tests.engine.structured.test_grammar import sample

TEXT = {"type": "string"}


def closed(**properties):
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def compile_schema(compiler, schema):
    return compiler.compile(StructuredSpec(kind="json_schema", text=json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"not": TEXT}}}, "keyword not at /properties/a .* enum"),
        ({"if": {}, "then": {}}, "keyword if at / .* anyOf"),
        ({"anyOf": [TEXT, {"dependentRequired": {"a": ["b"]}}]}, "dependentRequired at /anyOf/1 .* anyOf"),
        ({"type": "object", "propertyNames": {"minLength": 2}}, "propertyNames .* patternProperties"),
        ({"type": "array", "contains": TEXT}, "keyword contains .* prefixItems"),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties .* additionalProperties"),
        ({"$defs": {"A": {"not": TEXT}}, "$ref": "#/$defs/A"}, "keyword not is not supported; say"),
        ({"oneOf": [TEXT, {"type": "string", "pattern": "a"}]}, "oneOf is followed only .* use anyOf"),
        (
            {"type": "object", "properties": {"a": TEXT, "b": TEXT}, "minProperties": 1},
            "minProperties and maxProperties are followed only",
        ),
        (
            {"type": "object", "patternProperties": {"a": TEXT, "b": {"type": "null"}}},
            "/a/ and /b/ of patternProperties must not match the same key",
        ),
        ({"$ref": "#/x"}, r"\$ref points to '/x', which is not there"),
        ({"$ref": "http://127.0.0.1:9/x"}, "which is not fetched; put the schema under"),
        ({"type": "string", "pattern": "(?=a)b"}, "no regular expression: look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, "no regular expression: backreferences"),
        ({"const": 2**53 + 1}, r"integer 9007199254740993 has more digits .* as a string"),
        (
            {"$defs": {"A": {"enum": [1, {"id": [-(10**23) - 1]}]}}, "$ref": "#/$defs/A"},
            "integer -10{22}1 has",
        ),
        ({"type": "string", "minLength": 5, "maxLength": 3}, r"minLength \(5\) is greater"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_with_the_keyword_named(compiler, schema, words):
    with pytest.raises(InvalidRequest, match=words) as caught:
        compile_schema(compiler, schema)
    assert caught.value.param == "structured"
    message = caught.value.message
    assert message.endswith(".") and "\n" not in message and "coerce_one_of" not in message
    assert "<non-verbose" not in message and "Unimplemented" not in message


def test_a_grammar_that_names_an_unknown_token_is_refused_plainly(compiler):
    with pytest.raises(InvalidRequest, match='unknown special token: "<nothing>"') as caught:
        compiler.compile(StructuredSpec(kind="grammar", text="start: <nothing>"))
    assert "⟦" not in caught.value.message


@pytest.mark.parametrize(
    ("lark", "message"),
    [
        ('start: %json {"$ref": "#/x"}', r"\$ref points to '/x', which is not there"),
        ("start: a\na: /(?=a)b/", "a pattern is no regular expression: look-around, .*, is not supported"),
        ("start: x", 'at 1\\(8\\): unknown name: "x"'),
    ],
)
def test_a_message_shows_no_lines_of_a_grammar(compiler, lark, message):
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(StructuredSpec(kind="grammar", text=lark))
    assert re.fullmatch(rf"The grammar is refused: {message}\.", caught.value.message)


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        (closed(a={"type": "string", "not": {"const": "x"}}), ['{"a": "y"}']),
        ({"type": "integer", "if": {"minimum": 5}, "then": {"multipleOf": 2}, "else": {}}, ["3", "6"]),
        ({"type": "object", "properties": {"a": TEXT}, "dependentRequired": {"a": ["b"]}}, ['{"b": 1}']),
        ({"type": "object", "propertyNames": {"minLength": 2}}, ['{"ab": 1}']),
        ({"type": "array", "contains": TEXT, "minContains": 1}, ['[1, "x"]']),
        ({"type": "object", "properties": {"a": TEXT}, "unevaluatedProperties": False}, ['{"a": ""}', "{}"]),
        ({"oneOf": [TEXT, {"type": "string", "pattern": "a"}]}, ['"b"']),
        ({"oneOf": [TEXT, {"maxLength": 3}], "anyOf": [TEXT, {"type": "null"}]}, ['"abcd"', "null"]),
        ({"type": "object", "properties": {"a": TEXT, "b": TEXT}, "minProperties": 1}, ['{"b": "x"}']),
        ({"type": "string", "pattern": "^(?!a)b"}, ['"b"']),
        ({"type": "string", "pattern": r"^(a|b)\1$"}, ['"aa"']),
        ({"type": "string", "pattern": r"\bfoo\b"}, ['"foo"']),
        ({"type": "string", "pattern": "^a{,2}$"}, ['"a{,2}"']),
        ({"type": "string", "format": "email", "pattern": "^(?!x).*$"}, ['"a@b.cd"']),
        ({"type": "string", "format": "time", "pattern": "^[0-9]{2}:[0-9]{2}$"}, ['"12:34"']),
        (
            {"type": "object", "patternProperties": {"^(?=a)": TEXT}, "additionalProperties": False},
            ['{"ab": "x"}'],
        ),
        (closed(a={"$ref": "http://127.0.0.1:9/x"}), ['{"a": [1]}']),
        ({"$defs": {"A": {"type": "null", "not": {}}}, "$ref": "#/$defs/A"}, ["null"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_followed_may_be_left_out(compiler, tokenizer, schema, answers):
    """All answers under the schema are still allowed, and what can be followed is."""
    with pytest.raises(InvalidRequest):
        compile_schema(compiler, schema)
    grammar = compile_schema(compiler, prepare_schema(schema, strict=False))
    for answer in answers:
        assert grammar.matcher().accept([*encode(tokenizer, answer), EOS[0]]), answer
    assert not grammar.matcher().accept(encode(tokenizer, "true"))


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[\w.+-]+@\d{2,}\.\p{L}*$",
        r"^a\/b\-\\bc$",
        r"^(?:a|(?<name>b))[?=(]\x41\u00e9{1,3}$",
        r"^\s\S\W\D\n?$",
    ],
)
def test_patterns_of_the_same_dialect_are_followed(compiler, pattern):
    schema = {"type": "string", "pattern": pattern}
    assert prepare_schema(schema, strict=False) == schema
    compile_schema(compiler, schema)


def test_names_that_may_be_any_string_say_nothing():
    """As JSON Schema's writers for Zod and TypeScript describe mappings."""
    for names in ({"type": "string"}, {}, True, {"title": "Key", "type": "string"}):
        schema = {"type": "object", "propertyNames": names, "properties": {"a": TEXT}}
        assert prepare_schema(schema) == {"type": "object", "properties": {"a": TEXT}}


CHEF, COLOUR = closed(kind={"const": "chef"}, age={"type": "integer"}), closed(kind={"enum": ["red", "blue"]})


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [CHEF, COLOUR]},
        {"$defs": {"A": CHEF, "B": COLOUR}, "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]},
        {"oneOf": [TEXT, {"type": ["integer", "null"]}, CHEF]},
        {"type": "array", "items": {"type": "boolean"}, "uniqueItems": False, "maxItems": 2},
        {"type": "string", "format": "password", "maxLength": 3},
        {"type": "object", "properties": {"if": TEXT, "not": {"type": "null"}}, "required": ["if"]},
        {"enum": [{"not": 1}, "x"]},
        {"$defs": {"unused": {"not": {}}}, "type": "null"},
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": {"type": "boolean"},
        },
        {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "maxProperties": 0},
        {
            "$defs": {"Key": {"title": "Key", "type": "string", "enum": ["a", "b"]}},
            "type": "object",
            "propertyNames": {"$ref": "#/$defs/Key"},
            "additionalProperties": {"type": "null"},
        },
        {"type": "string", "format": "uuid4"},
        {
            "type": "string",
            "pattern": r"^(?!^[-+.]*$)[+-]?0*(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
        },
        {"enum": [2**53, 2**60, -(2**53), True]},
        {"type": "null", "x-guidance": {"lenient": True, "whitespace_pattern": "x"}},
    ],
    ids=json.dumps,
)
def test_answers_are_valid_under_the_schema_as_it_was_given(compiler, tokenizer, vocab_size, schema):
    grammar = compile_schema(compiler, schema)
    answers = [sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(40)]
    finished = [answer for answer in answers if answer is not None]
    assert finished
    for answer in finished:
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("value", [[], {}, 5, None])
def test_a_format_that_is_no_text_is_refused_by_the_compiler(compiler, value):
    with pytest.raises(InvalidRequest, match="Expected string for 'format'"):
        compile_schema(compiler, {"type": "string", "format": value})


@pytest.mark.parametrize("bounds", [(-(1 << 63), (1 << 63) - 1), (0, (1 << 64) - 1), (-(10**30), 10**30)])
def test_integers_may_have_the_bounds_of_64_bits(compiler, tokenizer, bounds):
    schema = {"type": "integer", "minimum": bounds[0], "maximum": bounds[1]}
    grammar = compile_schema(compiler, schema)
    for number in (0, 7, (1 << 62) + 1):
        assert grammar.matcher().accept([*encode(tokenizer, str(number)), EOS[0]]), number
    for kind in ("integer", "number", ["number", "null"]):
        bounds = {"minimum": -1.7976931348623157e308, "exclusiveMaximum": 1e19}
        grammar = compile_schema(compiler, {"type": kind, **bounds})
        assert grammar.matcher().accept([*encode(tokenizer, "-1234567"), EOS[0]])


def test_every_alternative_can_come(compiler, tokenizer):
    grammar = compile_schema(compiler, {"oneOf": [CHEF, COLOUR, TEXT]})
    for answer in ('{"kind": "chef", "age": 3}', '{"kind": "blue"}', '"x"'):
        matcher = grammar.matcher()
        assert matcher.accept([*encode(tokenizer, answer), EOS[0]])


@pytest.mark.parametrize(
    "options",
    [
        [TEXT, TEXT],
        [{"type": "integer"}, {"type": "number"}],
        [closed(a={"const": 1}), closed(a={"enum": [1, 2]})],
        [closed(a={"const": 1}), closed(b={"const": 2})],
        [closed(a={"const": 1}) | {"type": ["object", "null"]}, closed(a={"const": 2})],
        [closed(a={"const": 1}) | {"required": []}, closed(a={"const": 2})],
        [{"$ref": "#"}, TEXT],
        [True, TEXT],
    ],
    ids=json.dumps,
)
def test_one_of_schemas_that_may_overlap_is_left_to_the_grammar_engine(options):
    assert prepare_schema({"oneOf": options}) == {"oneOf": options}


def test_the_order_of_keywords_stays():
    schema = {"oneOf": [CHEF, COLOUR], "type": "object", "properties": {"z": TEXT, "a": TEXT}}
    assert list(prepare_schema(schema)) == ["anyOf", "type", "properties"]
    both = {"oneOf": [CHEF, COLOUR], "anyOf": [CHEF]}
    assert prepare_schema(both) == both


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ({"enum": ["a", 5, "b"]}, {"properties": {"a": TEXT, "b": TEXT}, "additionalProperties": False}),
        ({"const": "a", "title": "T"}, {"properties": {"a": TEXT}, "additionalProperties": False}),
        ({"pattern": "^x"}, {"patternProperties": {"^x": TEXT}, "additionalProperties": False}),
    ],
)
def test_names_of_properties_become_properties(names, wanted):
    assert prepare_schema({"propertyNames": names, "additionalProperties": TEXT}) == wanted
    with pytest.raises(GrammarRefused, match="propertyNames"):
        prepare_schema({"propertyNames": names, "properties": {"c": TEXT}})
    with pytest.raises(GrammarRefused, match="propertyNames"):
        prepare_schema({"propertyNames": {**names, "maxLength": 1}})


def test_literals_are_values_that_schemas_spell_out():
    schema = {
        "properties": {"const": {"const": 5}, "enum": TEXT, "required": {"enum": ["x"]}},
        "required": ["const"],
        "default": {"const": "no"},
    }
    assert sorted(map(str, literals(schema))) == ["5", "const", "x"]


def test_a_number_beyond_json_is_refused():
    speller = SimpleNamespace(segmenter=SimpleNamespace(cuts_all=True))
    with pytest.raises(GrammarRefused, match="number"):
        prepare(StructuredSpec(kind="json_schema", text='{"maximum": 1e999}'), speller)


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        ({"properties": {}, "patternProperties": {}}, {"properties": {}, "patternProperties": {}}),
        (
            {"$defs": {"D": {"properties": {}}}, "items": {"anyOf": [{"properties": {}}, True]}},
            {
                "$defs": {"D": {"properties": {}, "additionalProperties": False}},
                "items": {"anyOf": [{"properties": {}, "additionalProperties": False}, True]},
            },
        ),
        ({"allOf": [{"properties": {"a": {}}}]}, {"allOf": [{"properties": {"a": {}}}]}),
        # A malformed list stays for the compiler to refuse.
        ({"properties": {}, "required": [{}]}, {"properties": {}, "required": [{}]}),
        # Values are no schemas.
        ({"enum": [{"properties": {}}]}, {"enum": [{"properties": {}}]}),
        ({"default": {"properties": {}}}, {"default": {"properties": {}}}),
        (True, True),
    ],
)
def test_closed_objects_have_only_the_properties_that_they_name(schema, wanted):
    before = json.dumps(schema)
    assert close_objects(schema) == wanted
    assert json.dumps(schema) == before


@pytest.mark.parametrize("low", [2**53 - 2, 2**53 + 1, 2**60 - 3, -(2**53) - 5, -(2**60) - 3])
def test_bounds_that_are_no_doubles_are_kept(compiler, tokenizer, low):
    """llguidance rounds them; some integers within them may not come."""
    for lower, upper in (("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")):
        schema = {"type": "integer", lower: low, upper: low + 301}
        grammar, allowed = compile_schema(compiler, schema), []
        for number in [*range(low - 3, low + 4), low + 150, *range(low + 298, low + 305)]:
            if grammar.matcher().accept([*encode(tokenizer, str(number)), EOS[0]]):
                jsonschema.validate(number, schema)
                allowed.append(number)
        assert low + 150 in allowed
