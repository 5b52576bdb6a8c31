"""Calls in Gemma 4's notation: values within values, against Transformers' own parser and a chat template."""

import json

import jinja2
import jsonschema
import pytest

from engine.errors import InvalidRequest
from engine.parsers.answer import AnswerParser
from engine.parsers.formats import REASONING_TAGS, TOOL_FORMATS
from engine.parsers.grammar import (
    Rules,
    SpecialTokens,
    Thought,
    ToolSchema,
    grammar_with_budget,
    tool_grammar,
)
from engine.parsers.reasoning import ReasoningParser
from tests.engine.parsers.cuts import joined, parse
from tests.engine.parsers.test_grammar import VOCABULARIES, call_of, vocabulary

GEMMA4, TAGS = TOOL_FORMATS["gemma4"], REASONING_TAGS["gemma4"]
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SHORT = {"type": "string", "pattern": "^[a-c]{1,3}$"}

#: Schemas of one argument.
SCHEMAS = {
    "objects in a list": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"b_1": {"type": ["integer", "null"], "maximum": 3}, "a": SHORT},
            "required": ["a"],
            "additionalProperties": False,
        },
        "minItems": 1,
        "maxItems": 3,
    },
    "places of a list": {
        "type": "array",
        "prefixItems": [{"enum": ["x", "y"]}, {"type": "boolean"}],
        "items": DIGIT,
        "minItems": 1,
        "maxItems": 4,
    },
    "no more entries": {"type": "array", "prefixItems": [SHORT], "items": False},
    "no entries": {"type": "array", "maxItems": 0},
    "one or none": {"type": "array", "items": DIGIT, "maxItems": 1},
    "two or more": {"type": "array", "items": DIGIT, "minItems": 2},
    "values of all kinds": {"enum": [1, "1", None, True, [], {"k": [1.5, "q"], "A": {}}]},
    "a map": {"type": "object", "additionalProperties": DIGIT},
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^x_[a-c]{1,9}$": DIGIT},
        "additionalProperties": False,
    },
    "one of two shapes": {
        "type": "object",
        "properties": {"kind": {"const": "a"}, "x": DIGIT, "y": {"type": "null"}},
        "anyOf": [{"required": ["x"]}, {"required": ["y"]}],
        "required": ["kind"],
        "additionalProperties": False,
    },
    "an option that nothing meets": {"anyOf": [{"type": "integer", "minimum": 5, "maximum": 3}, SHORT]},
    "a type that nothing meets": {"type": ["boolean", "integer"], "minimum": 5, "maximum": 3},
    "bounds beside options": {
        "type": "integer",
        "minimum": 5,
        "anyOf": [{"exclusiveMaximum": 5}, {"maximum": 10}, {"exclusiveMinimum": 7, "maximum": 7}],
    },
    "a reference that says more": {"$ref": "#/$defs/Digit", "maximum": 4},
    "a tree": {"$ref": "#/$defs/Tree"},
}
DEFINITIONS = {
    "Digit": DIGIT,
    "Tree": {
        "type": "object",
        "properties": {"leaves": {"type": "array", "items": {"$ref": "#/$defs/Tree"}, "maxItems": 2}},
        "additionalProperties": False,
    },
}


def no_rules() -> Rules:
    return Rules(SpecialTokens({}, frozenset()))


def reference(text):
    """The calls that Transformers reads in an answer, as pairs of name and arguments; see :func:`calls`."""
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    templates = pytest.importorskip("transformers.cli.serving.utils")._RESPONSE_TEMPLATE_FALLBACKS
    (form,) = [form for names, form in templates.items() if "gemma4" in names]
    found = parsing.parse_response(text, form, prefix="")
    called = [each["function"] for each in found.get("tool_calls", ())]
    return found.get("reasoning_content", ""), [(each["name"], each["arguments"]) for each in called]


def calls(text):
    """The thought of an answer, and its calls."""
    parser = AnswerParser(ReasoningParser(TAGS), GEMMA4.parser({}))
    found = joined(parser, [text])
    return found["reasoning"], [(name, json.loads(arguments)) for name, arguments in found["calls"]]


@pytest.mark.parametrize("words", VOCABULARIES)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_values_within_values_follow_their_schemas(schema, words):
    words = vocabulary(words)
    given = {
        "type": "object",
        "properties": {"value": schema},
        "required": ["value"],
        "additionalProperties": False,
        "$defs": DEFINITIONS,
    }
    tools = [ToolSchema("f", given)]
    grammar = tool_grammar(GEMMA4.layout, tools, words.special, choice="required", parallel=False)
    found = []
    for seed in range(4):
        walk = words.walk(grammar, seed)
        if walk.finished:
            _, ((name, arguments),) = calls(walk.text)
            jsonschema.validate(arguments, given)
            assert reference(walk.text) == ("", [(name, arguments)])
            found.append(arguments)
    assert found


def levels(count):
    """Definitions of options within options."""
    return {
        f"A{level}": {
            "anyOf": [
                {"allOf": [{"$ref": f"#/$defs/A{level + 1}"}], "required": [f"{name}{level}"]}
                for name in ("q", "r")
            ]
        }
        for level in range(count)
    }


@pytest.mark.parametrize(
    ("schema", "definitions"),
    [
        ({"$ref": "#/$defs/A0"}, levels(30)),
        (
            {"$ref": "#/$defs/A"},
            {"A": {"required": ["x"], "anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
        ),
        (
            {"$ref": "#/$defs/Pet"},
            {
                "Pet": {"required": ["kind"], "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
                "Cat": {"allOf": [{"$ref": "#/$defs/Pet"}, {"properties": {"purrs": {"type": "boolean"}}}]},
                "Dog": {"allOf": [{"$ref": "#/$defs/Pet"}, {"properties": {"barks": {"type": "boolean"}}}]},
            },
        ),
        *(
            (schema, {})
            for schema in (
                {"type": "array", "maxItems": "5"},
                {"type": "array", "minItems": None},
                {"type": "array", "prefixItems": None},
                {"type": "array", "items": 5},
                {"type": None},
                {"type": "string", "enum": None},
                {"type": "object", "required": True},
                {"type": "object", "required": "c"},
                {"type": "object", "required": [{}]},
                {"type": "object", "properties": []},
                {"type": "object", "patternProperties": None},
                {"type": "string", "pattern": 5},
                {"anyOf": {}},
                {"enum": "x"},
                {"$ref": 5},
            )
        ),
    ],
)
def test_schemas_that_no_grammar_can_follow_are_refused(schema, definitions):
    given = {"type": "object", "properties": {"value": schema}, "$defs": definitions}
    with pytest.raises(InvalidRequest, match="The JSON schema is refused: "):
        GEMMA4.layout.form.left_out(ToolSchema("f", given), no_rules())


def test_keywords_of_other_types_say_nothing():
    value = {"type": ["boolean", "null"], "minimum": None, "pattern": None, "maxItems": "5"}
    tool = ToolSchema("f", {"type": "object", "properties": {"value": value}, "minLength": None})
    assert GEMMA4.layout.form.left_out(tool, no_rules()) == []


def test_references_may_lead_through_many_levels():
    chain = {
        f"A{level}": {"type": "object", "properties": {"next": {"$ref": f"#/$defs/A{level + 1}"}}}
        for level in range(400)
    }
    given = {"type": "object", "properties": {"value": {"$ref": "#/$defs/A0"}}, "$defs": chain}
    assert GEMMA4.layout.form.left_out(ToolSchema("f", given), no_rules()) == []


#: Writes a turn as the public template does: keys sorted, texts between tokens, all else as Jinja does.
TEMPLATE = """{%- macro shown(value) -%}
{%- if value is string -%}<|"|>{{ value }}<|"|>
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{{ '{' }}{{ entries(value) }}{{ '}' }}
{%- elif value is sequence -%}
{{ '[' }}{%- for entry in value -%}{{ shown(entry) }}{{ '' if loop.last else ',' }}{%- endfor -%}{{ ']' }}
{%- else -%}{{ value }}{%- endif -%}{%- endmacro -%}
{%- macro entries(values) -%}
{%- for key, value in values | dictsort -%}{{ key }}:{{ shown(value) }}{{ '' if loop.last else ',' }}
{%- endfor -%}{%- endmacro -%}
<|channel>thought\n{{ thought }}\n<channel|>
{%- for name, arguments in calls -%}
<|tool_call>call:{{ name }}{{ '{' }}{{ entries(arguments) }}{{ '}' }}<tool_call|>
{%- endfor -%}"""


def test_a_turn_comes_back_as_the_template_wrote_it():
    made = [
        (
            "f",
            {
                "Z": -3,
                "b": 'say "hi", {you}:\n[1]',
                "a": {"x": 1, "l": [1.5, True, "q", [], {}, [{"u": "v"}]]},
            },
        ),
        ("f", {}),
        ("g", {"t": False, "big": 1e30, "small": 1e-07, "empty": "", "no": {}}),
    ]
    written = jinja2.Environment().from_string(TEMPLATE).render(thought="I call.\n\nTwice.", calls=made)
    assert calls(written) == ("I call.\n\nTwice.", made) == reference(written)
    nothing = jinja2.Environment().from_string(TEMPLATE).render(thought="", calls=[("f", {"a": None})])
    # Jinja spells it ``None``, which Transformers doesn't read.
    assert "a:None" in nothing and calls(nothing) == ("", [("f", {"a": None})])


def test_a_forced_call_of_that_turn_is_allowed():
    words = vocabulary("tokens")
    given = {
        "type": "object",
        "properties": {"b": {"type": "string"}, "Z": {"type": "integer"}, "a": {"type": "object"}},
        "required": ["Z", "b", "a"],
        "additionalProperties": False,
    }
    text = (
        '<|tool_call>call:f{a:{l:[1.5,true,<|"|>q<|"|>,[],{}],x:1},'
        'b:<|"|>say "hi", {you}:\n[1]<|"|>,Z:-3}<tool_call|>'
    )
    tools = [ToolSchema("f", given)]
    for choice in ("auto", "required"):
        grammar = tool_grammar(GEMMA4.layout, tools, words.special, choice=choice)
        assert words.accepts(grammar, text) and words.accepts(grammar, text + text)
        assert not words.accepts(grammar, text.replace("true", "maybe"))


def test_half_a_surrogate_pair_is_no_character():
    text = r"""<|tool_call>call:f{"k\ud83d":"x\ud83d",b:"\ud83d\ude00"}<tool_call|>"""
    assert calls(text)[1] == [("f", {"k\ufffd": "x\ufffd", "b": "\U0001f600"})]


def test_a_name_without_end_is_text():
    long = "<|tool_call>call:" + "x" * 129
    assert parse(lambda: GEMMA4.parser({}), long + "{a:1}")["text"] == long + "{a:1}"
    assert calls("<|tool_call>call:" + "x" * 128 + "{a:1}")[1] == [("x" * 128, {"a": 1})]


def test_a_text_arrives_before_it_ends():
    parser = GEMMA4.parser({})
    parser.feed('<|tool_call>call:f{a:{b:[<|"|>')
    assert [event.text for event in parser.feed("a long answer")] == ["a long answer"]


@pytest.mark.parametrize("words", VOCABULARIES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_thought_has_its_label(inside, words):
    words, call = vocabulary(words), call_of(GEMMA4, "stop")
    begin = "" if inside else TAGS.start + TAGS.label
    tools = [ToolSchema("stop", {"type": "object", "additionalProperties": False})]
    grammar = tool_grammar(
        GEMMA4.layout, tools, words.special, choice="required", thought=Thought(TAGS, inside)
    )
    assert words.accepts(grammar, f"{begin}hm\n{TAGS.end}{call}")
    assert inside or not words.accepts(grammar, f"{TAGS.start}hm{TAGS.end}{call}")
    if words is vocabulary("tokens"):
        bounded = grammar_with_budget(words.special, Thought(TAGS, inside, 2))
        assert words.accepts(bounded, f"{begin}hm{TAGS.end}so") and words.accepts(
            bounded, f"{begin}{TAGS.end}"
        )
        assert not words.accepts(bounded, f"{begin}one two three four{TAGS.end}so")


def test_a_thought_and_calls_for_every_cut():
    text = '<|channel>thought\nhm\n<channel|>Look.<|tool_call>call:f{a:<|"|>b<|"|>}<tool_call|>'
    found = parse(lambda: AnswerParser(ReasoningParser(TAGS), GEMMA4.parser({})), text)
    assert found == {"reasoning": "hm", "text": "Look.", "calls": [("f", '{"a": "b"}')]}
