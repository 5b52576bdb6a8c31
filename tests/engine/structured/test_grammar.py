"""Structured output with a tiny tokenizer: what masks allow always parses; what is hostile is refused."""

import json
import re

import jsonschema
import numpy as np
import pytest

from engine.sampling_params import StructuredSpec
from engine.structured import matcher as matcher_module
from tests.engine.structured.conftest import EOS, encode


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


@pytest.mark.parametrize("alone", [0.0, 100.0])
def test_masks_of_many_are_the_masks_of_each(compiler, tokenizer, vocab_size, monkeypatch, alone):
    """By one thread, and by one for the first and by all for the others."""
    monkeypatch.setattr(matcher_module, "_ALONE_S", alone)
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
    assert broken.error and not broken.is_complete and not len(allowed(broken, vocab_size))
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
