"""JSON schemas made ready for llguidance, and its refusals in words that help a caller."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.parsers.arguments import BOUNDS, INTEGER_BOUND, types_of
from engine.structured.checks import GrammarRefused, oversize
from engine.structured.decimals import plain_decimals
from engine.text_formats import BOUNDED_FORMATS, FORMAT_LENGTHS

Schema = dict[str, Any]

#: llguidance's options for answers in JSON. They stand on one line, as Python's ``json.dumps`` writes them.
#: Line breaks and indentation cost tokens and say nothing, and a model that may write them sometimes writes
#: little else. Where a space may be left out, a model has to choose: a step for each comma and colon.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

#: Keywords that llguidance lacks, each with what a caller can do instead.
_UNSUPPORTED = {
    "not": "say what is allowed instead, with enum, pattern or anyOf",
    "if": "list the cases with anyOf",
    "then": "list the cases with anyOf",
    "else": "list the cases with anyOf",
    "dependentRequired": "list the cases with anyOf",
    "dependentSchemas": "list the cases with anyOf",
    "dependencies": "list the cases with anyOf",
    "propertyNames": "use patternProperties with additionalProperties false",
    "contains": "describe every entry with items or prefixItems",
    "minContains": "describe every entry with items or prefixItems",
    "maxContains": "describe every entry with items or prefixItems",
    "unevaluatedProperties": "use additionalProperties in each of the schemas",
    "unevaluatedItems": "use items in each of the schemas",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}

#: Formats that answers are made to follow. All others are annotations, as JSON Schema has it by default.
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}

#: Formats of UUIDs of one version: ``uuid4`` says more than ``uuid``, and is followed as that.
_UUID_VERSION = re.compile(r"uuid[1-8]")

#: Keywords whose value is a schema, a list of schemas, or schemas by name.
_IN_SCHEMA = ("additionalItems", "additionalProperties", "items")
_IN_LIST = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_DEFINITIONS = ("$defs", "definitions")
_IN_NAMES = ("properties", "patternProperties", *_DEFINITIONS)


def _unsupported(keyword: str, where: str = "") -> str:
    advice = _UNSUPPORTED.get(keyword)
    return f"the keyword {keyword}{where} is not supported{'; ' + advice if advice else ''}"


#: llguidance's messages, in words that say what to change.
_PLAINER: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r'Unimplemented keys: \["([^"]+)".*\]'), lambda match: _unsupported(match[1])),
    (
        re.compile(r"oneOf constraints are not supported.*"),
        "oneOf is followed only where its schemas exclude each other, by their types or by different const "
        "values of a required property; use anyOf instead",
    ),
    (
        re.compile(r"min/maxProperties only supported when .*"),
        "minProperties and maxProperties are followed only where all of properties are required",
    ),
    (
        re.compile(r"patternProperty regexes (.+) are not disjoint"),
        r"the patterns \1 of patternProperties must not match the same key",
    ),
    (re.compile(r"Pointer '(.*)' does not exist"), r"$ref points to '\1', which is not there"),
    (
        re.compile(r"Resource '(.*)' is not present.*"),
        r"$ref names '\1', which is not fetched; put the schema under $defs",
    ),
    (re.compile(r"; following special tokens are available.*"), ""),
    # Where in a grammar it is. Most grammars are not the caller's own; a short message has no lines.
    (re.compile(r"at \d+\(\d+\): (failed to compile JSON schema: |invalid regex .* \(in regex\): )"), ""),
    (re.compile(r"(?<!^)\s\d+ \| .*"), ""),
    (re.compile(r"regex parse error:.*error: (.*)"), r"a pattern is no regular expression: \1"),
]


def prepare_schema(schema: Schema, *, strict: bool = True) -> Schema:
    """A schema that llguidance takes and that allows the same answers.

    ``x-guidance`` and what :func:`not_followed` names are left out. Formats become patterns. ``oneOf``
    becomes ``anyOf`` where no answer can match two of its schemas. ``propertyNames`` with ``enum`` or
    ``pattern`` becomes the properties themselves. Of decimal numbers as pydantic describes them, those are
    allowed that Python writes.

    Args:
        strict: false leaves out what llguidance can't follow instead of refusing it, so that more answers
            are allowed: keywords that it lacks, patterns in a dialect that it doesn't read, references to
            other documents, counts of properties that need not be there; ``oneOf`` becomes ``anyOf``.

    Raises:
        GrammarRefused: it uses a keyword that llguidance lacks, or spells out an integer that it can't keep.
    """
    if (number := _inexact(list(literals(schema)))) is not None:
        raise GrammarRefused(f"the integer {number} has more digits than can be kept; give it as a string")
    root = {key: value for key, value in schema.items() if key != "x-guidance"}
    return _Preparation(root, strict).of(root, "")


#: Keywords that tell whether an object may have properties that the schema doesn't name.
_OPENNESS = ("additionalProperties", "patternProperties", "unevaluatedProperties")


def close_objects(schema: Any) -> Any:
    """Return a copy in which objects have only the properties that they name, as in OpenAI's strict mode.

    Objects that say themselves whether they may have more stay as they are, and so do those that name none or
    require others.
    The parts of ``allOf`` stay open: each would refuse the properties of the others. A schema that is larger
    than schemas may be stays as it is.
    """
    return schema if oversize(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in _IN_LIST and isinstance(value, list) and key != "allOf":
            value = [_closed(entry) for entry in value]
        elif key in _IN_NAMES and isinstance(value, dict):
            value = {name: _closed(entry) for name, entry in value.items()}
        elif key in _IN_SCHEMA:
            value = _closed(value)
        found[key] = value
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, dict) and not any(key in schema for key in _OPENNESS):
        listed = required if isinstance(required, list) else []
        if all(isinstance(name, str) and name in properties for name in listed):
            found["additionalProperties"] = False
    return found


def schemas_in(schema: Any) -> Iterator[Schema]:
    """``schema`` and all schemas within it, but not what it gives as data, such as the values of ``enum``."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key, value in schema.items():
        if key in _IN_LIST and isinstance(value, list):
            parts: Iterable[Any] = value
        elif key in _IN_NAMES and isinstance(value, dict):
            parts = value.values()
        else:
            parts = [value] if key in _IN_SCHEMA else []
        for part in parts:
            yield from schemas_in(part)


def literals(schema: Any) -> Iterator[Any]:
    """Values that ``schema`` spells out: of ``const`` and ``enum``, and the keys that objects must have."""
    for node in schemas_in(schema):
        if "const" in node:
            yield node["const"]
        for key in ("enum", "required"):
            if isinstance(node.get(key), list):
                yield from node[key]


def _inexact(value: Any) -> int | None:
    """An integer within ``value`` that is no double: llguidance would force the nearest double instead."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((number for entry in value if (number := _inexact(entry)) is not None), None)
    if isinstance(value, int) and (abs(value) >= 1 << 1000 or int(float(value)) != value):
        return value
    return None


def plainer(message: str) -> str:
    """llguidance's message about a grammar in one line that says what to change."""
    message = " ".join(message.replace("<non-verbose/>", "").split())
    for pattern, words in _PLAINER:
        message = pattern.sub(words, message)
    return message


#: Keywords that allow no more and no less.
_ANNOTATIONS = frozenset({"title", "description", "examples", "default", "deprecated", "$comment"})


#: Parts of a regular expression. llguidance reads no groups that look around, and of escapes those of
#: punctuation and of these letters. A brace without a least count is no repetition to it, but an error.
_PARTS_OF_REGEX = re.compile(r"\\(?P<escape>.)|(?P<other>\(\?<?[=!]|\{,)", re.DOTALL)
_ESCAPES = frozenset("aftnrvxuUpPdDsSwW")


def _is_read(pattern: Any) -> bool:
    """Return whether llguidance reads a pattern, as far as its dialect of regular expressions goes."""
    if not isinstance(pattern, str):
        return True
    return not any(
        part["other"] or (part["escape"].isalnum() and part["escape"] not in _ESCAPES)
        for part in _PARTS_OF_REGEX.finditer(pattern)
    )


def _loosened(schema: Schema) -> Schema:
    """``schema``, but for what llguidance can't follow of it; the schemas within it stay as they are."""
    left_out = set(_UNSUPPORTED)
    if not _is_read(schema.get("pattern")):
        left_out.add("pattern")
    elif "pattern" in schema:
        # Writers of both mean the pattern: Zod's times have no zone, without which no text has the format.
        left_out.add("format")
    if not all(_is_read(pattern) for pattern in _names(schema, "patternProperties")):
        # Properties that the patterns would allow are then no additional ones.
        left_out |= {"patternProperties", "additionalProperties"}
    if _names(schema, "properties") - _names(schema, "required"):
        left_out |= {"minProperties", "maxProperties"}
    if not str(schema.get("$ref", "#")).startswith("#"):
        left_out.add("$ref")
    if "anyOf" in schema:
        left_out.add("oneOf")
    found = {key: value for key, value in schema.items() if key not in left_out}
    return {"anyOf" if key == "oneOf" else key: value for key, value in found.items()}


def _with_pattern_of_format(schema: Schema) -> Schema:
    """``schema`` with a pattern, and a length if need be, in place of its format; no pattern is replaced."""
    kind = schema.get("format")
    if not isinstance(kind, str) or kind not in BOUNDED_FORMATS or "pattern" in schema:
        return schema
    found = {key: value for key, value in schema.items() if key != "format"}
    found["pattern"] = BOUNDED_FORMATS[kind]
    if kind in FORMAT_LENGTHS:
        given = found.setdefault("maxLength", FORMAT_LENGTHS[kind])
        if isinstance(given, int | float):
            found["maxLength"] = min(given, FORMAT_LENGTHS[kind])
    return found


def not_followed(schema: Any) -> list[str]:
    """Keywords that :func:`prepare_schema` leaves out of a schema that it takes, in alphabetical order."""
    found: set[str] = set()
    known = _FORMATS | BOUNDED_FORMATS.keys()
    for node in schemas_in(schema):
        if node.get("uniqueItems") is True:
            found.add("uniqueItems")
        kind, types = node.get("format"), types_of(node)
        # Of numbers it is a note, such as int64.
        if isinstance(kind, str) and kind not in known and (not types or "string" in types):
            found.add(f"format {kind!r}"[:100])
    return sorted(found)


def _names(schema: Schema, key: str) -> set[str]:
    """The names that a keyword lists, or that it has schemas for."""
    value = schema.get(key)
    return {name for name in value if isinstance(name, str)} if isinstance(value, dict | list) else set()


class _Preparation:
    def __init__(self, root: Schema, strict: bool) -> None:
        self._root, self._strict = root, strict

    def of(self, schema: Any, path: str) -> Any:
        """``schema``, which stands at ``path`` of the root, prepared."""
        if not isinstance(schema, dict):
            return schema
        schema = self._with_named_properties(schema)
        if (
            isinstance(pattern := schema.get("pattern"), str)
            and (plain := plain_decimals(pattern)) is not None
        ):
            schema = {**schema, "pattern": plain}
        if not self._strict:
            schema = _loosened(schema)
        schema = _with_pattern_of_format(schema)
        for keyword in _UNSUPPORTED:
            if keyword in schema:
                raise GrammarRefused(_unsupported(keyword, f" at {path or '/'}"))
        prepared: Schema = {}
        # The order of keywords is the order of an answer's properties.
        for key, value in schema.items():
            new = self._value(key, value, f"{path}/{key}")
            if key == "oneOf" and isinstance(new, list) and "anyOf" not in schema and self._exclusive(new):
                prepared["anyOf"] = new
            elif key == "format" and isinstance(value, str) and _UUID_VERSION.fullmatch(value):
                prepared[key] = "uuid"
            elif key == "format" and not isinstance(value, str):
                # The compiler says that it is no format.
                prepared[key] = value
            elif key in BOUNDS:
                prepared[key] = _within_64_bits(key, value)
            elif key != "uniqueItems" and (key != "format" or value in _FORMATS):
                prepared[key] = new
        return prepared

    def _with_named_properties(self, schema: Schema) -> Schema:
        """``schema`` with the keys that ``propertyNames`` allows as properties, as far as that says the same.

        Such schemas are made for mappings with enumerated keys, and others for mappings from any string.
        """
        names = self._resolved(schema.get("propertyNames"))
        if names is True:
            names = {}
        if not isinstance(names, dict):
            return schema
        names = {key: value for key, value in names.items() if key not in _ANNOTATIONS}
        type_ok = names.pop("type", "string") == "string"
        if type_ok and not names:
            return {key: value for key, value in schema.items() if key != "propertyNames"}
        if any(key in schema for key in ("properties", "patternProperties")):
            return schema
        value = schema.get("additionalProperties", True)
        rest = {
            key: old for key, old in schema.items() if key not in ("propertyNames", "additionalProperties")
        }
        keys = names.get("enum", [names["const"]] if "const" in names else None)
        if type_ok and names.keys() <= {"enum", "const"} and isinstance(keys, list):
            named = {"properties": {key: value for key in keys if isinstance(key, str)}}
        elif type_ok and names.keys() == {"pattern"} and isinstance(names["pattern"], str):
            named = {"patternProperties": {names["pattern"]: value}}
        else:
            return schema
        return {**rest, **named, "additionalProperties": False}

    def _value(self, key: str, value: Any, path: str) -> Any:
        if key in _IN_LIST and isinstance(value, list):
            return [self.of(entry, f"{path}/{index}") for index, entry in enumerate(value)]
        if key in _IN_NAMES and isinstance(value, dict):
            parts = {name: (entry, f"{path}/{name}") for name, entry in value.items()}
            prepare = self._definition if key in _DEFINITIONS else self.of
            return {name: prepare(entry, where) for name, (entry, where) in parts.items()}
        return self.of(value, path) if key in _IN_SCHEMA else value

    def _definition(self, schema: Any, path: str) -> Any:
        """Prepare a definition; keep a refused one as it is, since nothing may refer to it."""
        try:
            return self.of(schema, path)
        except GrammarRefused:
            return schema

    def _exclusive(self, options: list[Any]) -> bool:
        """Return whether no value can match two of ``options``."""
        schemas = [self._resolved(option) for option in options]
        return all(
            _exclude(one, other) for index, one in enumerate(schemas) for other in schemas[index + 1 :]
        )

    def _resolved(self, schema: Any) -> Any:
        """The schema that ``$ref`` points to within the root, if ``schema`` is nothing else."""
        for _ in range(16):
            if not isinstance(schema, dict) or not isinstance(pointer := schema.get("$ref"), str):
                return schema
            if not pointer.startswith("#/"):
                return None
            schema = self._root
            for part in pointer[2:].split("/"):
                part = part.replace("~1", "/").replace("~0", "~")
                schema = schema.get(part) if isinstance(schema, dict) else None
        return None


def _exclude(one: Any, other: Any) -> bool:
    """Return whether no value can match both schemas, as far as a quick look shows."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    types, others = _types(one), _types(other)
    if types and others and types.isdisjoint(others):
        return True
    if types != {"object"} or others != {"object"}:
        return False
    shared = set(_required(one)) & set(_required(other))
    return any(_values_exclude(one["properties"][name], other["properties"][name]) for name in shared)


def _types(schema: Schema) -> set[str]:
    """The types a value may have; empty if that isn't said."""
    # An integer is a number as well.
    return {"number" if name == "integer" else str(name) for name in types_of(schema) or ()}


def _within_64_bits(key: str, bound: Any) -> Any:
    """A bound that llguidance can follow: it refuses the least and the greatest integer of 64 bits and what
    is beyond, and reads bounds as doubles: one that is no double becomes the next one within. Numbers that
    are no integers get the narrower bound, too."""
    if not isinstance(bound, int | float) or isinstance(bound, bool) or bound in (math.inf, -math.inf):
        return bound
    upper = key in ("maximum", "exclusiveMaximum")
    bound = min(bound, INTEGER_BOUND) if upper else max(bound, -INTEGER_BOUND)
    if isinstance(bound, float) or abs(bound) > INTEGER_BOUND:
        return bound
    double = float(bound)
    if int(double) > bound if upper else int(double) < bound:
        double = math.nextafter(double, -math.inf if upper else math.inf)
    return int(double)


def _required(schema: Schema) -> Iterator[str]:
    required, properties = schema.get("required"), schema.get("properties")
    if isinstance(required, list) and isinstance(properties, dict):
        yield from (name for name in required if isinstance(name, str) and name in properties)


def _values_exclude(one: Any, other: Any) -> bool:
    values: list[list[Any]] = []
    for schema in (one, other):
        if not isinstance(schema, dict):
            return False
        if "const" in schema:
            values.append([schema["const"]])
        elif isinstance(schema.get("enum"), list):
            values.append(schema["enum"])
        else:
            return False
    # Python says ``True == 1``, JSON does not. To take them as equal errs on the safe side.
    return not any(value in values[1] for value in values[0])
