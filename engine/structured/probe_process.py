"""A process of its own in which grammars of strangers are compiled for the first time.

Compilation can need minutes or gigabytes for a few hundred bytes of schema, and overflow the stack; a process
can be killed for it. Started as a script that imports nothing of the engine. It reads JSON lines from its
standard input, first ``{tokenizer, vocab_size, eos_ids, limits, memory}``, then jobs ``{kind, text, steps}``,
and answers each with a line: ``{"ok": grammar, "rss": KiB}`` or ``{"error": message}``.
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
from typing import Any

import llguidance

# What passes here is compiled and stepped again on threads with stacks of the usual 8 MiB, at least 2 MiB.
STACK_BYTES = 1 << 20

# Between the parts of JSON: nothing, a space, or a new line with its indentation. Models that may write any
# amount of white space sometimes write nothing else until they are cut off.
WHITESPACE = r"( |\n {0,16})?"


def to_grammar(kind: str, text: str) -> str:
    """llguidance's own form of a structured spec. Raises ValueError."""
    if kind in ("json_object", "json_schema"):
        schema = text if kind == "json_schema" else '{"type": "object"}'
        return llguidance.LLMatcher.grammar_from_json_schema(schema, {"whitespace_pattern": WHITESPACE})
    if kind == "regex":
        # Of digits, the ASCII ones: who writes \d in a pattern of answers means 0 to 9.
        return llguidance.LLMatcher.grammar_from_lark(f"start: /{llguidance.regex_to_lark(text, 'd')}/")
    if kind == "choice":
        return llguidance.LLMatcher.grammar_from_regex("|".join(map(escape, json.loads(text))))
    return llguidance.grammar_from("grammar", text)


def escape(text: str) -> str:
    """A regex that matches ``text`` alone."""
    return "".join(f"\\x{{{ord(c):X}}}" if c < "0" or c in ":;<=>?@[\\]^_`{|}~\x7f" else c for c in text)


def walk(matcher: llguidance.LLMatcher, eos_ids: list[int], steps: int) -> None:
    """Follows the grammar for some random tokens, so that its first masks are paid for and proved here."""
    choose = random.Random(0)
    for _ in range(steps):
        if matcher.is_error() or matcher.is_stopped():
            return
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        for token in eos_ids:
            mask &= ~(1 << token)
        if not mask:
            return
        bits = bin(mask)[:1:-1]
        token = bits.find("1", choose.randrange(len(bits)))
        if not matcher.consume_token(token):
            return


def compile_one(
    setup: dict[str, Any], tokenizer: llguidance.LLTokenizer, job: dict[str, Any]
) -> dict[str, Any]:
    try:
        grammar = to_grammar(job["kind"], job["text"])
    except ValueError as error:
        return {"error": str(error)}
    limits = llguidance.LLParserLimits(**setup["limits"])
    matcher = llguidance.LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
    walk(matcher, setup["eos_ids"], job["steps"])
    if matcher.is_error():
        return {"error": matcher.get_error()}
    return {"ok": grammar, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def serve(jobs: queue.SimpleQueue[str]) -> None:
    setup = json.loads(jobs.get())
    size, eos_ids = setup["vocab_size"], setup["eos_ids"]
    tokenizer = llguidance.LLTokenizer(setup["tokenizer"], n_vocab=size, eos_token=eos_ids)
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
