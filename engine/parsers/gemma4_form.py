"""Grammar of calls in the notation of Gemma 4; :mod:`engine.parsers.gemma4` reads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engine.parsers.arguments import (
    NUMERIC,
    arguments_of,
    flattened,
    left_out_of_object,
    others_of,
    refused,
    types_of,
)
from engine.parsers.call_forms import (
    OF_TEXTS,
    embedded,
    entries_in_order,
    other_key,
    tagged_value,
    whole_text,
)
from engine.parsers.free_text import ARGUMENT
from engine.parsers.gemma4 import CALL_END, QUOTE
from engine.parsers.grammar import CallForm, Rules, ToolSchema
from engine.parsers.lark_input import TextForm

_TYPES = ("string", "number", "boolean", "null", "object", "array")
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$defs", "definitions", "$schema"})

#: Keywords that are not looked at beside ``const`` and ``enum``.
_BESIDE_VALUES = {*OF_TEXTS, *NUMERIC, "minProperties", "maxProperties"}

#: Keys that stand without quotes.
_BARE_KEY = re.compile(r'[^\s:,{}\[\]<>|"]+( [^\s:,{}\[\]<>|"]+)*')


class _Notation:
    """Expressions for the values of one function's schema.

    Followed are types, ``enum``, ``const``, bounds of numbers, patterns and lengths of texts, properties of
    objects, entries of lists and their number, references, ``allOf``, and ``anyOf``; ``oneOf`` is read as
    ``anyOf``. Other keywords allow more than they should; the rules note them as left out.

    Args:
        number: of the function, which no other has.
    """

    def __init__(self, rules: Rules, tool: ToolSchema, number: int) -> None:
        self._rules, self._root, self._prefix = rules, tool.parameters, f"value_{number}"
        self._names: dict[str, str] = {}
        # Schemas whose rules are still to be written.
        self._pending: list[str] = []

    def arguments(self) -> str:
        """The members of the function's arguments.

        Raises:
            InvalidRequest: the schema is malformed, or too large when written out.
        """
        members = self.members(self._root, f"arguments{self._prefix.removeprefix('value')}")
        # Not by recursion: schemas may refer on through more levels than Python can nest.
        while self._pending:
            key = self._pending.pop()
            name = self._names[key]
            self._rules.add(name, " | ".join(self._choices(json.loads(key), name)))
        return members

    def value(self, schema: Any) -> str:
        """The rule of the values that ``schema`` allows. Equal schemas share one, so that they may recur."""
        if not isinstance(schema, Mapping | bool):
            raise refused(f"{json.dumps(schema)[:60]} is no schema")
        key = json.dumps({} if isinstance(schema, bool) else schema, sort_keys=True)
        if key not in self._names:
            # Options within options are written out with all that stands beside each. Their number doubles
            # with each level, and a circle of them has no end.
            self._rules.spend(len(key) // 8)
            self._names[key] = f"{self._prefix}_{len(self._names)}"
            self._pending.append(key)
        return self._names[key]

    def members(self, schema: Mapping[str, Any], name: str) -> str:
        """The entries of an object, without its braces. They stand in the order in which the chat template
        sorts keys."""
        literal, found = self._rules.special.literal, arguments_of(self._root, schema)
        left_out = set(left_out_of_object(self._root, schema))
        patterns = schema.get("patternProperties") or {}
        if all(whole_text(pattern) is not None for pattern in patterns) and patterns:
            left_out.discard("patternProperties")
        self._rules.left_out |= left_out
        entries = [
            (f"{literal(_key(key) + ':')} {self.value(found[key].schema)}", found[key].required)
            for key in sorted(found, key=str.lower)
        ]
        others = []
        for place, (pattern, each) in enumerate(_other_members(self._root, schema)):
            terminal = self._rules.add(f"{name}_KEY_{place}".upper(), other_key(pattern, found))
            others.append(f'{terminal} ":" {self.value(each)}')
        return entries_in_order(self._rules, name, entries, f"({' | '.join(others)})" if others else "", ",")

    def _choices(self, schema: Mapping[str, Any], name: str) -> Iterator[str]:
        found = flattened(self._root, schema)
        self._rules.leave_out(found, "oneOf")
        if "allOf" in left_out_of_object(self._root, schema):
            self._rules.left_out.add("allOf")
        options = found.pop("anyOf", None) or found.pop("oneOf", None)
        if options:
            rest = {key: value for key, value in found.items() if key not in _ANNOTATIONS | {"oneOf"}}
            parts = [{**rest, "allOf": [option]} if rest else option for option in options]
            yield from map(self.value, [part for part in parts if self._may_be_met(part)] or parts)
            return
        kinds = _kinds(found)
        if "const" in found or "enum" in found:
            self._rules.left_out |= found.keys() & _BESIDE_VALUES
            values = [found["const"]] if "const" in found else found["enum"]
            fitting = [value for value in values if _has_type(value, kinds)]
            yield from (self._rules.special.literal(_written(value)) for value in fitting or values)
            return
        for kind in [kind for kind in kinds if _has_room(kind, found)] or kinds:
            yield self._of_type(kind, found, name)

    def _may_be_met(self, schema: Any) -> bool:
        """Return False if the bounds of ``schema`` exclude each other for values of all its types."""
        if not isinstance(schema, Mapping):
            return schema is not False
        found = flattened(self._root, schema)
        if found.keys() & {"anyOf", "oneOf", "const", "enum"}:
            return True
        return any(_has_room(kind, found) for kind in _kinds(found))

    def _of_type(self, kind: str, schema: Mapping[str, Any], name: str) -> str:
        literal = self._rules.special.literal
        if kind == "string":
            text = {**schema, "type": "string"}
            return f"{literal(QUOTE)} {tagged_value(self._rules, {}, text, f'{name}_text', QUOTE, QUOTE)}"
        if kind == "object":
            return f'"{{" {self.members(schema, f"{name}_member")} "}}"'
        if kind == "array":
            return f'"[" {self._entries(schema)} "]"'
        return embedded({"type": kind, **{key: schema[key] for key in NUMERIC if key in schema}})

    def _entries(self, schema: Mapping[str, Any]) -> str:
        """The entries of a list, without its brackets."""
        first, rest = schema.get("prefixItems", ()), schema.get("items", True)
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems", True)
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        if high is not None and high < len(first):
            first, rest = first[:high], False
        behind = ""
        if rest is not False and high != len(first):
            more, least = self.value(rest), max(low - len(first), 0)
            most = None if high is None else high - len(first)
            # Without entries before it, the first of the rest has no comma before it.
            lead = 0 if first else 1
            behind = _repeated(f'"," {more}', max(least - lead, 0), None if most is None else most - lead)
            if not first:
                behind = f"{more} {behind}" if least else f"({more} {behind})?"
        for place in reversed(range(len(first))):
            comma = '"," ' if place else ""
            behind = f"{comma}{self.value(first[place])} {behind}"
            behind = behind if place < low else f"({behind})?"
        return behind


def _other_members(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Patterns of the keys that an object may have beside those it names, each with a schema."""
    for pattern, each in (schema.get("patternProperties") or {}).items():
        yield f'{whole_text(pattern) or ".*"}/ & /[^\\s:,{{}}\\[\\]<>|"]{{1,64}}', each
    if (others := others_of(root, schema)) is not None:
        yield "[a-zA-Z_][a-zA-Z0-9_]{0,63}", others


def _repeated(expression: str, least: int, most: int | None) -> str:
    """``expression`` as often as that; ``most`` None means without end."""
    if most == 0:
        return ""
    return f"({expression})" + ("*" if (least, most) == (0, None) else f"{{{least},{most or ''}}}")


def _kinds(schema: Mapping[str, Any]) -> Sequence[str]:
    """The types that values may have."""
    kinds = types_of(schema)
    return _TYPES if kinds is None else kinds


#: The keywords of the least and the greatest size of a value, by its type.
_SIZES = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}


def _has_room(kind: str, schema: Mapping[str, Any]) -> bool:
    """Return whether some value of a type is within the bounds of ``schema``."""
    if kind in _SIZES:
        low, high = (schema.get(key) for key in _SIZES[kind])
        return low is None or high is None or low <= high
    if kind not in ("number", "integer"):
        return True
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    return low <= high and max(low, above) < below and above < high


def _has_type(value: Any, kinds: Sequence[str]) -> bool:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    name = names.get(type(value), "null")
    return name in kinds or (name == "integer" and "number" in kinds)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else f"{QUOTE}{key}{QUOTE}"


def _written(value: Any) -> str:
    """A value as a call shows it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        keys = sorted(value, key=str.lower)
        return "{" + ",".join(f"{_key(key)}:{_written(value[key])}" for key in keys) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return json.dumps(value)


def _arguments(rules: Rules, tool: ToolSchema, number: int) -> str:
    """``key:value,...}`` and the closing tag."""
    members = _Notation(rules, tool, number).arguments()
    return f"{members} {rules.special.literal('}' + CALL_END)}".strip()


#: ``call:NAME{key:value,...}``.
GEMMA4_CALL = CallForm(
    lambda name: f"call:{name}{{",
    _arguments,
    TextForm(f"{ARGUMENT}:{QUOTE}", f"{QUOTE}}}{CALL_END}", QUOTE),
)
