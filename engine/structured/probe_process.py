"""A process of its own in which callers' grammars are compiled for the first time.

Compilation can need minutes or gigabytes for a few hundred bytes of schema, and overflow the stack; a process
can be killed for it. Started as a script that imports little of the engine. It reads JSON lines from its
standard input: first ``{token_bytes, control, eos_ids, limits, memory}``, then jobs ``{kind, text, steps}``.
It answers each with a line: ``{"ok": grammar, "lacks_escapes": bool, "rss": KiB}`` or ``{"error": message}``.
"""

from __future__ import annotations

import json
import os
import queue
import random
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import llguidance

# The engine beside this file, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.structured.json_escapes import escape_options, lacks_escapes
from engine.structured.vocabulary import Vocabulary

# What passes here is compiled and stepped again on threads with stacks of the usual 8 MiB, at least 2 MiB.
STACK_BYTES = 1 << 20

# Between the parts of JSON: nothing, a space, or a new line with its indentation. A model that may write any
# amount of white space sometimes writes nothing else until its answer is cut off.
WHITESPACE = r"( |\n {0,16})?"


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
        grammar = llguidance.grammar_from("grammar", text)
    elif kind in ("json_object", "json_schema"):
        schema = json.loads(text) if kind == "json_schema" else {"type": "object"}
        escapes = escape_options(schema)
        lacks = lacks_escapes(escapes)
        options = {"whitespace_pattern": WHITESPACE, **escapes}
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


def compile_one(
    setup: dict[str, Any], tokenizer: llguidance.LLTokenizer, job: dict[str, Any]
) -> dict[str, Any]:
    try:
        grammar, lacks = to_grammar(job["kind"], job["text"], forces=setup["complete"])
    except ValueError as error:
        return {"error": str(error)}
    limits = llguidance.LLParserLimits(**setup["limits"])
    matcher = llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
    if reason := walk(matcher, setup["eos_ids"], job["steps"]):
        return {"error": reason}
    return {"ok": grammar, "lacks_escapes": lacks, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def serve(jobs: queue.SimpleQueue[str]) -> None:
    setup = json.loads(jobs.get())
    tokenizer = Vocabulary.from_json(setup).for_llguidance()
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + setup["memory"], used + setup["memory"]))
    answer = {"ok": "", "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        answer = compile_one(setup, tokenizer, json.loads(jobs.get()))


def work(jobs: queue.SimpleQueue[str]) -> None:
    try:
        serve(jobs)
    finally:
        # The main thread waits for input and would never learn that nobody answers any more.
        os._exit(1)


def main() -> None:
    # Ctrl-C goes to the whole process group; this process ends with its parent's pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=work, args=(jobs,), daemon=True).start()
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
