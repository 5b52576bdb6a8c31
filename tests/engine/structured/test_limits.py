"""Malformed, oversized and hostile specs are refused in bounded time and don't affect other requests."""

import asyncio
import json
import subprocess
import sys
import threading
from string import ascii_lowercase

import psutil
import pytest

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from engine.structured import grammar
from engine.structured.grammar import GrammarCompiler
from tests.engine.structured.conftest import EOS, encode

REFUSED = {
    "no JSON": StructuredSpec(kind="json_schema", text="{"),
    "no object": StructuredSpec(kind="json_schema", text="[]"),
    "unknown type": StructuredSpec(kind="json_schema", text='{"type": "strnig"}'),
    "unsatisfiable": StructuredSpec(
        kind="json_schema", text='{"type": "object", "properties": {"a": false}, "required": ["a"]}'
    ),
    "remote reference": StructuredSpec(kind="json_schema", text='{"$ref": "http://127.0.0.1:9/schema.json"}'),
    "endless reference": StructuredSpec(kind="json_schema", text='{"$ref": "#"}'),
    "nested deeply": StructuredSpec(kind="json_schema", text='{"items":' * 100 + "{}" + "}" * 100),
    "nested beyond the parser": StructuredSpec(kind="json_schema", text="[" * 100_000),
    "10 MB": StructuredSpec(kind="json_schema", text='{"const": "' + "x" * 10_000_000 + '"}'),
    "too many nodes": StructuredSpec(kind="json_schema", text=json.dumps({"enum": list(range(20_001))})),
    "bad regex": StructuredSpec(kind="regex", text="(["),
    "look-ahead": StructuredSpec(kind="regex", text="(?=a)b"),
    "empty regex": StructuredSpec(kind="regex", text=""),
    "explosive repetition": StructuredSpec(kind="regex", text="(" * 30 + "a?" + "){0,9}" * 30),
    "huge alternation": StructuredSpec(
        kind="regex", text="|".join(f"[^{chr(97 + i % 26)}]{{{i + 1}}}" for i in range(1000))
    ),
    "no choices": StructuredSpec(kind="choice", text="[]"),
    "empty choice": StructuredSpec(kind="choice", text='["a", ""]'),
    "choices of numbers": StructuredSpec(kind="choice", text="[1]"),
    "lone surrogate": StructuredSpec(kind="choice", text='["\\ud800"]'),
    "unknown rule": StructuredSpec(kind="grammar", text="start: nowhere\n"),
    # 5000 rules in a chain overflow the compiler's stack.
    "stack overflow": StructuredSpec(
        kind="grammar",
        text="start: r0\n" + "\n".join(f'r{i}: "x" r{(i + 1) % 5000} | "y{i}"' for i in range(5000)),
    ),
    "exponential references": StructuredSpec(
        kind="json_schema",
        text=json.dumps(
            {"allOf": [{"anyOf": [{"required": [f"p{i}{j}"]} for i in range(6)]} for j in range(9)]}
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(compiler, name):
    spec = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(spec)
    assert caught.value.param == "structured"
    assert 20 < len(caught.value.message) < 400
    assert name != "stack overflow" or "too complex" in caught.value.message


SLOW = StructuredSpec(
    kind="json_schema",
    text=json.dumps({"allOf": [{"type": "string", "pattern": f".*{c}.{{20}}.*"} for c in ascii_lowercase]}),
)  # fmt: skip


async def test_what_takes_too_long_is_killed_and_others_pass_meanwhile(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, time_limit=3.0)
    # Both processes start now, so that only grammars take time below.
    await asyncio.gather(*(compiler.compile_async(StructuredSpec(kind="regex", text=text)) for text in "ab"))
    slow = [asyncio.create_task(compiler.compile_async(SLOW)) for _ in range(3)]
    await asyncio.sleep(0)
    quick = await compiler.compile_async(StructuredSpec(kind="regex", text="[0-9]+"))
    assert quick.matcher() is not None
    assert not any(task.done() for task in slow)
    for result in await asyncio.gather(*slow, return_exceptions=True):
        assert isinstance(result, InvalidRequest) and "complex" in result.message
    compiler.close()
    # Known by now, and refused without another process.
    with pytest.raises(InvalidRequest, match="complex"):
        await compiler.compile_async(SLOW)


def test_after_a_warm_up_the_vocabulary_is_there(tokenizer, vocab_size, monkeypatch):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, time_limit=20.0)
    compiler.warm_up().result(60)
    monkeypatch.delattr(grammar, "Speller")
    assert compiler.compile(StructuredSpec(kind="regex", text="a+")).matcher().accept(encode(tokenizer, "a"))
    compiler.close()


async def test_a_caller_that_goes_away_takes_no_other_with_it(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, time_limit=20.0)
    spec = StructuredSpec(kind="regex", text="a+")
    free = threading.Event()
    for _ in range(4):
        compiler._threads.submit(free.wait)
    first, second = (asyncio.create_task(compiler.compile_async(spec)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    free.set()
    assert (await second).matcher().accept(encode(tokenizer, "a"))
    compiler.close()


def test_the_cache_is_bounded_and_used(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, cache_size=3, time_limit=20.0)
    specs = [StructuredSpec(kind="regex", text=f"a{{{i}}}") for i in range(1, 6)]
    grammars = [compiler.compile(spec) for spec in specs]
    assert compiler.compile(specs[4]) is grammars[4]
    assert compiler.compile(specs[2]) is grammars[2]
    assert compiler.compile(specs[0]) is not grammars[0]
    assert len(compiler._cache) == 3
    compiler.close()


def test_helper_processes_end_with_their_parent(tokenizer):
    script = (
        "import sys, time\n"
        "from engine.structured.grammar import GrammarCompiler\n"
        "from engine.sampling_params import StructuredSpec\n"
        "compiler = GrammarCompiler(sys.argv[1], 400, [0])\n"
        "compiler.compile(StructuredSpec(kind='regex', text='a'))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, tokenizer.to_str()], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    helpers = psutil.Process(parent.pid).children(recursive=True)
    assert len(helpers) == 1
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(helpers, timeout=60)
    assert not alive
