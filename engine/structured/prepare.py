"""Structured specs made ready for llguidance: what it can't do is refused in words that name the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from engine.structured.checks import GrammarRefused, check_spec, oversize, refusal
from engine.structured.json_schema import Schema, literals, plainer, prepare_schema
from engine.text.spelling import Speller


def prepare(spec: StructuredSpec, speller: Speller) -> str:
    """The text of ``spec`` in a form that llguidance takes, which means the same.

    Raises:
        GrammarRefused: no answer can follow it, or llguidance lacks a keyword that it uses.
    """
    if spec.kind == "choice":
        for choice in json.loads(spec.text):
            _check_spelling(choice, speller)
    elif spec.kind == "json_schema":
        schema = prepare_schema(json.loads(spec.text))
        if not speller.segmenter.cuts_all:
            for literal in literals(schema):
                shown = literal if isinstance(literal, str) else None
                _check_spelling(json.dumps(literal, ensure_ascii=False), speller, shown)
        return _text(schema)
    return spec.text


def checked_schema(schema: Mapping[str, Any], *, strict: bool = True) -> Schema:
    """A caller's schema that becomes a part of a grammar, in the form that :func:`prepare` gives it.

    Args:
        strict: see :func:`~engine.structured.json_schema.prepare_schema`.

    Raises:
        InvalidRequest: it is larger than a schema may be, or llguidance lacks a keyword that it uses.
    """
    reason = oversize(schema)
    spec = StructuredSpec(kind="json_schema", text="" if reason else json.dumps(schema))
    try:
        if reason:
            raise GrammarRefused(reason)
        check_spec(spec)
        prepared = prepare_schema(dict(schema), strict=strict)
        _text(prepared)
    except GrammarRefused as error:
        raise InvalidRequest(refusal(spec, plainer(str(error))), param="structured") from None
    return prepared


def _text(schema: Schema) -> str:
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise GrammarRefused("it holds a number that is no JSON, or too large") from None


def _check_spelling(text: str, speller: Speller, shown: str | None = None) -> None:
    if not speller.segmenter.can_cut(text.encode(errors="surrogatepass")):
        shown = text if shown is None else shown
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise GrammarRefused(f"the tokens of this model's vocabulary can't spell {shown!r}")
