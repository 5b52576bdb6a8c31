"""Selects the escapes that strings of JSON answers may hold.

Once a model has begun an escape, the grammar must not force it to a character that it didn't mean.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import llguidance

from engine.structured.json_schema import literals, schemas_in

#: Strings that hold a character which JSON can only write as an escape; all but five of them as ``\u00XX``.
_ESCAPED = r"[\x00-\x1f\x7f]"

#: What ``\`` may be followed by where strings follow a pattern: no ``u``.
_SHORT_ESCAPES = 'nrbtf\\"'

_OPTIONS = {"json_allowed_escapes", "json_allow_general_unicode_escapes"}

#: A string, a comment or a regex of a Lark grammar, none of which can hold a schema, or what precedes one.
#: Those without an end, which llguidance refuses, are read as far as they go: no character is read twice.
_LARK = re.compile(
    r"""
    "(?:\\.|[^"\\\n])*+"? | (?://|\#)[^\n]* | /(?:\\.|[^/\\])++/? | (?P<json>%json\s*+(?={))
    """,
    re.VERBOSE,
)

#: Bounds the search for such a character to milliseconds.
_FUEL = 200_000


def escape_options(schema: Any) -> dict[str, Any]:
    r"""llguidance's options for the escapes of a JSON schema's strings.

    Left alone, llguidance lets a string begin ``\u00`` and then only end in a control character: a model that
    writes ``\u00e9`` is led to ``\u0000``. It can allow all ``\uXXXX``, but not in strings that follow a
    pattern. Where no pattern allows an escaped character, nothing can be begun there, and all are allowed
    elsewhere. Otherwise no ``\u`` is ever begun: a character that needs one can't come then. For the short
    escapes that are left see :func:`within_escape`.
    """
    patterns = list(dict.fromkeys(_patterns(schema)))
    if patterns and _may_hold_escapes(patterns) and not _names_escapes(schema):
        return {"json_allowed_escapes": _SHORT_ESCAPES}
    return {"json_allow_general_unicode_escapes": True}


def lacks_escapes(options: dict[str, Any]) -> bool:
    """Return whether an escape that was begun can't become any escape, under :func:`escape_options`."""
    return "json_allowed_escapes" in options


def with_escapes(lark: str) -> str:
    r"""``lark``, a Lark grammar, with :func:`escape_options` in each JSON schema that it embeds.

    Schemas that state options of either kind keep theirs. Where a schema lacks escapes, those that can be
    begun are not barred as :func:`within_escape` says: the text around it may need a lone ``\``.
    """
    parts, end = [], 0
    for found in _LARK.finditer(lark):
        if found["json"] is None or found.start() < end:
            continue
        try:
            schema, behind = json.JSONDecoder().raw_decode(lark, found.end())
        except (ValueError, RecursionError):
            # The grammar's own compilation says what is wrong.
            break
        own = schema.get("x-guidance", {})
        if isinstance(own, dict) and not _OPTIONS & own.keys():
            schema["x-guidance"] = {**own, **escape_options(schema)}
            parts += [lark[end : found.end()], json.dumps(schema)]
            end = behind
    return "".join([*parts, lark[end:]])


def within_escape(token: bytes) -> bool:
    r"""Return whether ``token`` begins an escape and doesn't end it: it ends in an odd number of ``\``.

    A model may mean ``\u00e9`` and spell it with a lone ``\`` first. It must not choose that token where only
    short escapes may follow. Tokens such as ``\n`` and ``\"`` are whole escapes.
    """
    return (len(token) - len(token.rstrip(b"\\"))) % 2 == 1


def _patterns(schema: Any) -> Iterator[str]:
    """Regexes that strings or keys anywhere in ``schema`` must follow."""
    for node in schemas_in(schema):
        if isinstance(node.get("pattern"), str):
            yield node["pattern"]
        if isinstance(node.get("patternProperties"), dict):
            yield from node["patternProperties"]


def _names_escapes(schema: Any) -> bool:
    """Return whether a value that ``schema`` spells out needs ``\\u``."""
    text = json.dumps(list(literals(schema)), ensure_ascii=False)
    return "\\u00" in text or "\x7f" in text


def _may_hold_escapes(patterns: list[str]) -> bool:
    """Return whether a string that follows one of ``patterns`` may hold a character that JSON must escape."""
    options = [{"type": "string", "allOf": [{"pattern": p}, {"pattern": _ESCAPED}]} for p in patterns]
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps({"anyOf": options}))
    limits = llguidance.LLParserLimits(initial_lexer_fuel=_FUEL, verbose_errors=False)
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
    # Of a pattern that is wrong in itself the schema's own compilation tells.
    return not (is_error and messages[0].startswith("Unsatisfiable schema"))
