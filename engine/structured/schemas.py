"""JSON schemas as clients write them, made ready for a grammar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Formats that the grammar engine spells out. All others are annotations, as JSON Schema lets them be.
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"}
)

#: Keywords whose value is a schema, a list of schemas, or schemas by name.
_SCHEMA = frozenset(
    {"items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains"}
    | {"propertyNames", "unevaluatedItems", "unevaluatedProperties"}
)
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

#: Keywords that tell whether an object may have properties that the schema doesn't name.
_OPENNESS = ("additionalProperties", "patternProperties", "unevaluatedProperties")

#: Deeper schemas are left as they are: the grammar's own limits refuse them.
_MAX_DEPTH = 64


def for_grammar(schema: Any, *, closed: bool) -> Any:
    """Return a copy of ``schema`` without what a grammar can't or mustn't follow.

    Formats that the grammar engine doesn't know and ``uniqueItems`` are dropped: an answer may break them, as
    it may where they are annotations. ``x-guidance``, an option of the grammar engine, isn't the client's.

    Args:
        closed: objects that name properties and don't say whether they may have more may not, as OpenAI's
            strict mode wants it.
    """
    return _copy(schema, closed, _MAX_DEPTH)


def _copy(schema: Any, closed: bool, depth: int) -> Any:
    if not isinstance(schema, Mapping) or depth == 0:
        return schema
    found: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("uniqueItems", "x-guidance") or (key == "format" and not _is_known(value)):
            continue
        if key in _SCHEMA:
            value = _copy(value, closed, depth - 1)
        elif key in _SCHEMAS and isinstance(value, list):
            # Parts of a whole are closed by the whole: each would refuse the others' properties.
            value = [_copy(entry, closed and key != "allOf", depth - 1) for entry in value]
        elif key in _NAMED and isinstance(value, Mapping):
            value = {name: _copy(entry, closed, depth - 1) for name, entry in value.items()}
        found[key] = value
    if (
        closed
        and isinstance(schema.get("properties"), Mapping)
        and not any(key in schema for key in _OPENNESS)
    ):
        found["additionalProperties"] = False
    return found


def _is_known(name: Any) -> bool:
    return isinstance(name, str) and name in FORMATS
