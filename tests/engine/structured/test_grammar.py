"""Structured output with a tiny tokenizer: what masks allow always parses; what is hostile is refused."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from string import ascii_lowercase

import jsonschema
import numpy as np
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.errors import InvalidRequest
from engine.sampling_params import StructuredSpec
from engine.structured.grammar import GrammarCompiler

EOS = (0, 1)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|stop|>", "<|image|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ['{"name": "circle", "count": 12, "tags": [true, false, null]}', "red green blue circle square"]
    tokenizer.train_from_iterator(texts * 20, trainer)
    tokenizer.enable_truncation(8)
    return tokenizer


@pytest.fixture(scope="module")
def vocab_size(tokenizer):
    return tokenizer.get_vocab_size() + 5


@pytest.fixture(scope="module")
def compiler(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, time_limit=20.0)
    yield compiler
    compiler.close()


def allowed(matcher, vocab_size):
    row = np.zeros((vocab_size + 31) // 32, dtype=np.int32)
    matcher.fill_mask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return np.flatnonzero(bits[:vocab_size])


def sample(tokenizer, vocab_size, matcher, seed, temperature=1.5, steps=400):
    """Tokens of a model that knows nothing: random logits, at a high temperature."""
    rng = np.random.default_rng(seed)
    tokens = []
    for _ in range(steps):
        ids = allowed(matcher, vocab_size)
        assert len(ids)
        logits = rng.normal(size=vocab_size)[ids] / temperature + rng.gumbel(size=len(ids))
        token = int(ids[logits.argmax()])
        assert matcher.accept([token])
        if token in EOS:
            assert matcher.is_finished and matcher.is_complete
            return tokenizer.decode(tokens)
        tokens.append(token)
    return None


SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "sqüare", 'tri"angle']},
        "count": {"type": "integer", "minimum": -3, "maximum": 120},
        "label": {"type": "string", "maxLength": 12},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 4},
        "nested": {
            "anyOf": [{"type": "null"}, {"type": "object", "properties": {"ok": {"type": "boolean"}},
             "required": ["ok"], "additionalProperties": False}]
        },
    },
    "required": ["shape", "count", "label", "box", "nested"],
    "additionalProperties": False,
}  # fmt: skip


def test_json_schema_always_parses_and_validates(compiler, tokenizer, vocab_size):
    grammar = compiler.compile(StructuredSpec(kind="json_schema", text=json.dumps(SCHEMA)))
    answers = [sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(60)]
    finished = [answer for answer in answers if answer is not None]
    assert len(finished) > 20
    for answer in finished:
        jsonschema.validate(json.loads(answer), SCHEMA)
    assert {json.loads(answer)["shape"] for answer in finished} == set(SCHEMA["properties"]["shape"]["enum"])


def test_json_object_is_any_object(compiler, tokenizer, vocab_size):
    grammar = compiler.compile(StructuredSpec(kind="json_object"))
    answers = [sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(40)]
    finished = [answer for answer in answers if answer is not None]
    assert finished and all(isinstance(json.loads(answer), dict) for answer in finished)
    matcher = grammar.matcher()
    assert matcher.accept(encode(tokenizer, '{"a": [1, {"b": null}]}')) and matcher.is_finished
    assert not grammar.matcher().accept(encode(tokenizer, "[1]"))


def encode(tokenizer, text):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    return tokenizer.encode(text).ids


@pytest.mark.parametrize("pattern", [r"[a-f]{2,5}-\d+\.(png|jpg)", r"(?i)yes|no", r"héllo (wörld|/end/)"])
def test_regex_matches_whole_answers(compiler, tokenizer, vocab_size, pattern):
    grammar = compiler.compile(StructuredSpec(kind="regex", text=pattern))
    for seed in range(10):
        answer = sample(tokenizer, vocab_size, grammar.matcher(), seed)
        if answer is not None:
            assert re.fullmatch(pattern, answer)


def test_choice_gives_exactly_the_choices(compiler, tokenizer, vocab_size):
    choices = ["red", "red square", 'a"b\\c', "x.*(y)|z", "line\nbreak\t/", "日本 é", "^$#&~ -[]{}"]
    grammar = compiler.compile(StructuredSpec(kind="choice", text=json.dumps(choices)))
    seen = {sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(80)}
    assert seen <= set(choices)
    for choice in choices:
        matcher = grammar.matcher()
        assert matcher.accept(encode(tokenizer, choice)) and matcher.is_complete


def test_grammar_in_lark(compiler, tokenizer, vocab_size):
    text = 'start: expression\nexpression: NUMBER | "(" expression "+" expression ")"\nNUMBER: /[0-9]{1,2}/\n'
    grammar = compiler.compile(StructuredSpec(kind="grammar", text=text))
    answers = [sample(tokenizer, vocab_size, grammar.matcher(), seed) for seed in range(30)]
    finished = [answer for answer in answers if answer is not None]
    assert finished and all(re.fullmatch(r"[0-9()+]+", answer) for answer in finished)
    for answer in finished:
        assert answer.count("(") == answer.count(")") == answer.count("+")


def test_only_eos_follows_a_complete_answer(compiler, tokenizer, vocab_size):
    matcher = compiler.compile(StructuredSpec(kind="regex", text="ab?")).matcher()
    assert not matcher.is_complete
    assert matcher.accept(encode(tokenizer, "a")) and matcher.is_complete and not matcher.is_finished
    assert set(allowed(matcher, vocab_size)) == {*EOS, *encode(tokenizer, "b")}
    assert matcher.accept(encode(tokenizer, "b")) and matcher.is_finished
    assert set(allowed(matcher, vocab_size)) == set(EOS)
    assert matcher.accept([1, 0, 0]) and set(allowed(matcher, vocab_size)) == set(EOS)
    assert not matcher.accept(encode(tokenizer, "a"))


def test_nothing_but_eos_follows_eos(compiler, tokenizer, vocab_size):
    matcher = compiler.compile(StructuredSpec(kind="regex", text="ab?")).matcher()
    assert matcher.accept([*encode(tokenizer, "a"), 0])
    assert set(allowed(matcher, vocab_size)) == set(EOS)
    assert not matcher.accept(encode(tokenizer, "b"))
    matcher.rollback(1)
    assert matcher.accept(encode(tokenizer, "b"))
    assert not compiler.compile(StructuredSpec(kind="regex", text="ab?")).matcher().accept([0])


def test_masks_of_many_are_the_masks_of_each(compiler, tokenizer, vocab_size):
    grammar = compiler.compile(StructuredSpec(kind="regex", text="abc"))
    texts = ["", "a", "ab", "abc", "z", "abc"]
    matchers = [grammar.matcher() for _ in texts]
    for matcher, text in zip(matchers, texts, strict=True):
        matcher.accept(encode(tokenizer, text))
    matchers[-1].accept([1])
    for count in (len(texts), 1):
        rows = [(matcher, 2 * i + 1) for i, matcher in enumerate(matchers[:count])]
        mask = np.full((2 * len(texts), (vocab_size + 31) // 32), -1, dtype=np.int32)
        type(matchers[0]).fill_masks(rows, mask)
        for matcher, row in rows:
            alone = np.zeros_like(mask[row])
            matcher.fill_mask(alone)
            assert (mask[row] == alone).all() and (mask[row - 1] == -1).all()


def test_a_token_that_is_not_allowed_ends_the_sequence_alone(compiler, tokenizer, vocab_size):
    grammar = compiler.compile(StructuredSpec(kind="regex", text="ab?"))
    broken, sound = grammar.matcher(), grammar.matcher()
    assert not broken.accept(encode(tokenizer, "z"))
    assert broken.error and not broken.is_complete and set(allowed(broken, vocab_size)) == set(EOS)
    assert sound.error is None and set(allowed(sound, vocab_size)) == set(encode(tokenizer, "a")) | {
        i for i in range(vocab_size - 5) if tokenizer.decode([i]) == "ab"
    }


def test_rollback_and_clone(compiler, tokenizer, vocab_size):
    matcher = compiler.compile(StructuredSpec(kind="json_schema", text=json.dumps(SCHEMA))).matcher()
    tokens = encode(tokenizer, '{"shape": "circle", "count": 7, "label": "x", "box": [1, 2], "nested": null}')
    masks = []
    for token in tokens:
        masks.append(allowed(matcher, vocab_size).tolist())
        assert matcher.accept([token])
    assert matcher.accept([0, 1])
    other = matcher.clone()
    matcher.rollback(1)
    assert set(allowed(matcher, vocab_size)) == set(EOS)
    matcher.rollback(1)
    assert matcher.is_complete and set(allowed(matcher, vocab_size)) == set(EOS)
    for token, mask in zip(reversed(tokens), reversed(masks), strict=True):
        matcher.rollback(1)
        assert allowed(matcher, vocab_size).tolist() == mask
        assert token in mask
    assert other.is_finished and matcher.accept(tokens)


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
    expected = {"json_schema": "response_format", "regex": "guided_regex"}
    assert caught.value.param == expected.get(spec.kind, f"guided_{spec.kind}")
    assert 20 < len(caught.value.message) < 400
    assert name != "stack overflow" or "too complex" in caught.value.message


SLOW = StructuredSpec(
    kind="json_schema",
    text=json.dumps({"allOf": [{"type": "string", "pattern": f".*{c}.{{20}}.*"} for c in ascii_lowercase]}),
)  # fmt: skip


async def test_what_takes_too_long_is_killed_and_others_pass_meanwhile(tokenizer, vocab_size):
    compiler = GrammarCompiler(tokenizer, vocab_size, EOS, time_limit=3.0)
    await compiler.compile_async(StructuredSpec(kind="json_object"))
    slow = [asyncio.create_task(compiler.compile_async(SLOW)) for _ in range(3)]
    await asyncio.sleep(0)
    quick = await compiler.compile_async(StructuredSpec(kind="regex", text="[0-9]+"))
    assert quick.matcher() is not None
    assert not any(task.done() for task in slow)
    for result in await asyncio.gather(*slow, return_exceptions=True):
        assert isinstance(result, InvalidRequest) and "complex" in result.message
    # Known by now, and refused without another process.
    with pytest.raises(InvalidRequest, match="complex"):
        await asyncio.wait_for(compiler.compile_async(SLOW), 1.0)
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
