"""The helper process that compiles callers' grammars first. It imports little of the engine.

Compilation can need minutes or gigabytes for a few hundred bytes of schema, and overflow the stack; a process
can be killed for it. The first message is ``{token_bytes, control, eos_ids, limits, memory}``, answered by
``{"rss": KiB}``. Each further one is a grammar ``{kind, text, steps}``, answered by
``{"ok": grammar, "lacks_escapes": bool, "rss": KiB}`` or ``{"error": message}``.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance

# The engine beside this file, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.helpers.child import limit_memory, serve
from engine.structured.json_escapes import escape_options, lacks_escapes, with_escapes
from engine.structured.json_schema import LAYOUT
from engine.structured.vocabulary import Vocabulary

# What passes here is compiled and stepped again on threads with stacks of the usual 8 MiB, at least 2 MiB.
STACK_BYTES = 1 << 20

_NO_FORCING = '%llguidance {"no_forcing": true}\n'
_DEAD_END = "the tokens of this model's vocabulary can't spell any whole answer"


def to_grammar(kind: str, text: str, *, forces: bool) -> tuple[str, bool]:
    """llguidance's own form of a structured spec, and whether its JSON strings lack some escapes.

    Args:
        forces: text that must come is cut into tokens as the tokenizer does it. Otherwise any tokens that
            spell it may come, and only such that lead on.

    Raises:
        ValueError: it can't be converted.
    """
    lacks = False
    if kind == "grammar":
        grammar = llguidance.grammar_from("grammar", with_escapes(text))
    elif kind in ("json_object", "json_schema"):
        schema = json.loads(text) if kind == "json_schema" else {"type": "object"}
        escapes = escape_options(schema)
        lacks = lacks_escapes(escapes)
        options = {**LAYOUT, **escapes}
        grammar = "start: %json " + json.dumps({"x-guidance": options, **schema})
    else:
        # ``\d`` in a pattern of answers means the ASCII digits, 0 to 9.
        regex = text if kind == "regex" else "|".join(map(escape, json.loads(text)))
        grammar = f"start: /{llguidance.regex_to_lark(regex, 'd')}/"
    return llguidance.LLMatcher.grammar_from_lark(grammar if forces else _NO_FORCING + grammar), lacks


def escape(text: str) -> str:
    """A regex that matches ``text`` alone."""
    return "".join(f"\\x{{{ord(c):X}}}" if c < "0" or c in ":;<=>?@[\\]^_`{|}~\x7f" else c for c in text)


def walk(matcher: llguidance.LLMatcher, eos_ids: list[int], steps: int) -> str | None:
    """Follow the grammar for some random tokens, so that its first masks are paid for and proved here.

    Returns:
        Why the grammar can't be used, or None: a limit was hit, or the only tokens that may come lead to a
        place where none may.
    """
    choose, forced = random.Random(0), True
    for _ in range(steps):
        if matcher.is_error() or matcher.is_stopped():
            break
        forced = forced and not matcher.is_accepting()
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error():
            break
        for token in eos_ids:
            mask &= ~(1 << token)
        if not mask:
            break
        forced = forced and mask & (mask - 1) == 0
        bits = bin(mask)[:1:-1]
        matcher.consume_token(bits.find("1", choose.randrange(len(bits))))
    if not matcher.is_error():
        return None
    if not matcher.get_error().startswith("NoExtensionBias"):
        return matcher.get_error()
    # A random walk ends where no token fits, if the vocabulary lacks one; a model may take another way.
    return _DEAD_END if forced else None


class Prober:
    """Compiles grammars for the vocabulary of the first message."""

    def __init__(self) -> None:
        self._setup: dict[str, Any] | None = None

    def answer(self, message: dict[str, Any], _: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Answer one message, see above."""
        if self._setup is None:
            self._setup = message
            self._tokenizer = Vocabulary.from_json(message).for_llguidance()
            limit_memory(message["memory"])
            return {"rss": _peak()}, []
        return self._compile(self._setup, message), []

    def _compile(self, setup: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        try:
            grammar, lacks = to_grammar(job["kind"], job["text"], forces=setup["complete"])
        except ValueError as error:
            return {"error": str(error)}
        limits = llguidance.LLParserLimits(**setup["limits"])
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, limits=limits, log_level=0)
        if reason := walk(matcher, setup["eos_ids"], job["steps"]):
            return {"error": reason}
        return {"ok": grammar, "lacks_escapes": lacks, "rss": _peak()}


def _peak() -> int:
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    serve(Prober().answer, stack_bytes=STACK_BYTES)
