"""Schemas of clients, made ready for a grammar."""

import json

import llguidance
import pytest

from engine.structured.schemas import FORMATS, for_grammar
from tests.engine.tokenizers import byte_level


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        # Objects that name properties are closed, others stay open.
        ({"properties": {"a": {}}}, {"properties": {"a": {}}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({"properties": {}, "additionalProperties": True}, {"properties": {}, "additionalProperties": True}),
        (
            {"properties": {}, "patternProperties": {"^x": {}}},
            {"properties": {}, "patternProperties": {"^x": {}}},
        ),
        (
            {"$defs": {"D": {"properties": {}}}, "items": {"anyOf": [{"properties": {}}, True]}},
            {
                "$defs": {"D": {"properties": {}, "additionalProperties": False}},
                "items": {"anyOf": [{"properties": {}, "additionalProperties": False}, True]},
            },
        ),
        ({"allOf": [{"properties": {"a": {}}}]}, {"allOf": [{"properties": {"a": {}}}]}),
        # Annotations.
        ({"type": "string", "format": "path"}, {"type": "string"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"type": "array", "uniqueItems": True}, {"type": "array"}),
        ({"x-guidance": {"whitespace_flexible": False}}, {}),
        # Properties, values and defaults are no keywords.
        ({"enum": [{"format": "path", "properties": {}}]}, {"enum": [{"format": "path", "properties": {}}]}),
        ({"default": {"properties": {}}}, {"default": {"properties": {}}}),
        (
            {"properties": {"format": {"format": "path"}, "uniqueItems": True}},
            {"properties": {"format": {}, "uniqueItems": True}, "additionalProperties": False},
        ),
        (True, True),
    ],
)
def test_closed(schema, wanted):
    before = json.dumps(schema)
    assert for_grammar(schema, closed=True) == wanted
    assert json.dumps(schema) == before


def test_open_objects_stay_open():
    assert for_grammar({"properties": {"a": {"format": "path"}}}, closed=False) == {"properties": {"a": {}}}


def test_a_schema_of_any_depth_is_copied():
    schema: dict = {}
    for _ in range(500):
        schema = {"items": schema}
    assert for_grammar(schema, closed=True) == schema


def test_the_known_formats_are_the_grammar_engines():
    backend = byte_level()
    engine = llguidance.LLTokenizer(backend.to_str(), eos_token=[backend.token_to_id("<|im_end|>")])

    def is_taken(name: str) -> bool:
        schema = json.dumps({"type": "string", "format": name})
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
        return not llguidance.LLMatcher(engine, grammar, log_level=0).is_error()

    assert all(is_taken(name) for name in FORMATS)
    assert not any(
        is_taken(name) for name in ("path", "password", "binary", "uuid4", "uri-reference", "regex")
    )
