"""Structured specs made ready for llguidance: what it can't do is refused in words that name the field."""

from __future__ import annotations

import json

from engine.sampling_params import StructuredSpec
from engine.structured.checks import GrammarRefused
from engine.structured.json_schema import literals, prepare_schema
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
        try:
            return json.dumps(schema, allow_nan=False)
        except ValueError:
            raise GrammarRefused("it holds a number that is no JSON, or too large") from None
    return spec.text


def _check_spelling(text: str, speller: Speller, shown: str | None = None) -> None:
    if not speller.segmenter.can_cut(text.encode(errors="surrogatepass")):
        shown = text if shown is None else shown
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise GrammarRefused(f"the tokens of this model's vocabulary can't spell {shown!r}")
