"""Checks a structured spec's sizes and shapes before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.errors import InvalidRequest
from engine.sampling_params import MAX_REGEX_LENGTH, MAX_STRUCTURED_TEXT, StructuredSpec

MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NODES = 20_000
MAX_CHOICES = 4096


class GrammarRefused(Exception):
    """A grammar is invalid, or takes more time, memory or stack than a grammar may."""


def check_spec(spec: StructuredSpec) -> None:
    """Check a spec. Raises :class:`InvalidRequest` if it is malformed or larger than a spec may be."""
    if len(spec.text) > MAX_STRUCTURED_TEXT:
        raise _refused(spec, f"it has {len(spec.text)} characters, the limit is {MAX_STRUCTURED_TEXT}")
    if spec.kind == "json_schema":
        schema = _parse(spec)
        if not isinstance(schema, dict):
            raise _refused(spec, "a JSON schema must be an object")
        if reason := oversize(schema):
            raise _refused(spec, reason)
    elif spec.kind == "choice":
        choices = _parse(spec)
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise _refused(spec, "choices must be a JSON list of at least one non-empty string")
        if len(choices) > MAX_CHOICES:
            raise _refused(spec, f"it has {len(choices)} choices, the limit is {MAX_CHOICES}")
        if any("\ud800" <= c <= "\udfff" for choice in choices for c in choice):
            raise _refused(spec, "a choice has a lone surrogate, which is no character")
    elif spec.kind == "regex" and len(spec.text) > MAX_REGEX_LENGTH:
        raise _refused(spec, f"it has {len(spec.text)} characters, the limit is {MAX_REGEX_LENGTH}")
    if spec.kind in ("regex", "grammar") and not spec.text:
        raise _refused(spec, "it is empty")


def refusal(spec: StructuredSpec, reason: str) -> str:
    """A short sentence for the caller, however long the compiler's message is."""
    name = {"json_object": "JSON schema", "json_schema": "JSON schema"}.get(spec.kind, spec.kind)
    reason = reason.rstrip(". ") if len(reason) <= 300 else reason[:297] + ".."
    return f"The {name} is refused: {reason}."


def _refused(spec: StructuredSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(refusal(spec, reason), param="structured")


def _parse(spec: StructuredSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"it is no JSON: {error}"
        raise _refused(spec, reason) from None


def count_values(schema: Any, most: int) -> int:
    """The number of values in a schema; some number above ``most`` if there are more."""
    count = 0
    for level in _levels(schema):
        count += len(level)
        if count > most:
            break
    return count


def oversize(schema: Any) -> str | None:
    """Why a schema is nested too deeply or has too many values; None if neither."""
    nodes = 0
    for depth, level in enumerate(_levels(schema), 1):
        nodes += len(level)
        if depth > MAX_SCHEMA_DEPTH:
            return f"it is nested deeper than {MAX_SCHEMA_DEPTH} levels"
        if nodes > MAX_SCHEMA_NODES:
            return f"it has more than {MAX_SCHEMA_NODES} values"
    return None


def _levels(schema: Any) -> Iterator[list[Any]]:
    """The schema itself, then the values that it holds, then those that they hold, and so on."""
    level = [schema]
    while level:
        yield level
        children: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                children.extend(node.values())
            elif isinstance(node, list):
                children.extend(node)
        level = children
