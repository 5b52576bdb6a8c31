"""Numbers in JSON answers end."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampling_params import StructuredSpec
from engine.structured.json_schema import LAYOUT
from engine.structured.numbers import MAX_DIGITS, advance, advance_within
from tests.engine.structured.conftest import EOS, encode
from tests.engine.structured.test_grammar import allowed

LONG = "7" * 3 * MAX_DIGITS


def matcher_of(compiler, schema):
    return compiler.compile(StructuredSpec(kind="json_schema", text=json.dumps(schema))).matcher()


def stubborn(matcher, tokenizer, vocab_size, steps=200) -> str | None:
    """Answer of a model that writes a digit wherever it may; None if it finds no end."""
    tokens = []
    for _ in range(steps):
        ids = allowed(matcher, vocab_size).tolist()
        texts = {token: tokenizer.decode([token]) for token in ids if token not in EOS}
        digits = [token for token, text in texts.items() if text.isdigit()]
        token = (digits or [token for token in ids if token in EOS] or list(texts))[-1]
        assert matcher.accept([token])
        if token in EOS:
            return tokenizer.decode(tokens)
        tokens.append(token)
    return None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer"},
        {"type": "number"},
        {"type": "integer", "minimum": 5},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    ],
)
def test_numbers_end(compiler, tokenizer, vocab_size, schema):
    text = stubborn(matcher_of(compiler, schema), tokenizer, vocab_size)
    assert text is not None
    json.loads(text)
    assert max(map(len, re.findall(r"\d+", text))) == MAX_DIGITS


def test_a_number_that_needs_more_digits_has_them(compiler, tokenizer, vocab_size):
    matcher = matcher_of(compiler, {"type": "integer", "multipleOf": 7})
    text = stubborn(matcher, tokenizer, vocab_size)
    assert text is not None and len(text) >= MAX_DIGITS and int(text) % 7 == 0


def test_digits_of_strings_and_exponents_are_free(compiler, tokenizer, vocab_size):
    matcher = matcher_of(compiler, {"type": "string"})
    for token in encode(tokenizer, f'"{LONG}'):
        assert token in allowed(matcher, vocab_size)
        assert matcher.accept([token])
    matcher = matcher_of(compiler, {"type": "number"})
    for token in encode(tokenizer, "-12.5e-300"):
        assert token in allowed(matcher, vocab_size)
        assert matcher.accept([token])


@pytest.mark.parametrize(
    ("text", "more"), [("1e", 2), ("2.5E+", 2), ("1e-", 3), ("1e1", 1), ("-7e-30", 1), ("1e99", 0)]
)
def test_an_exponent_keeps_numbers_within_a_double(compiler, tokenizer, vocab_size, text, more):
    matcher = matcher_after(matcher_of(compiler, {"type": "number"}), tokenizer, text)
    texts = [tokenizer.decode([token]) for token in allowed(matcher, vocab_size).tolist()]
    lengths = {len(found) for found in texts if found.isdigit()}
    assert max(lengths, default=0) <= more and bool(lengths) == bool(more)


def test_the_bound_follows_rollback_and_copies(compiler, tokenizer, vocab_size):
    matcher = matcher_of(compiler, {"type": "number"})
    free = allowed(matcher_after(matcher.clone(), tokenizer, "7" * 4), vocab_size).tolist()
    bound = matcher_after(matcher.clone(), tokenizer, "7" * MAX_DIGITS)
    barred = allowed(bound, vocab_size).tolist()
    digits = [token for token in free if tokenizer.decode([token]).isdigit()]
    assert digits and not set(digits) & set(barred) and set(barred) < set(free)
    copy = bound.clone()
    bound.rollback(2)
    assert set(digits) <= set(allowed(bound, vocab_size).tolist())
    assert allowed(copy, vocab_size).tolist() == barred


def matcher_within(compiler, schema):
    """Of an answer that is any text and a value behind it."""
    laid_out = json.dumps(schema | {"x-guidance": LAYOUT})
    lark = f'start: head %json {laid_out}\nhead[lazy]: /(.|\\n)*/ "value: "'
    return compiler.compile(StructuredSpec(kind="grammar", text=lark, holds_json=True)).matcher()


@pytest.mark.parametrize(
    ("schema", "begun"),
    [
        ({"type": "number"}, ""),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0."),
        ({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}, "[0.5, "),
    ],
)
def test_numbers_within_an_answer_end(compiler, tokenizer, vocab_size, schema, begun):
    head = f'"{LONG}.{LONG}e{LONG} value: {begun}'
    matcher = matcher_after(matcher_within(compiler, schema), tokenizer, head)
    text = stubborn(matcher, tokenizer, vocab_size)
    assert text is not None
    json.loads(begun + text)
    assert max(map(len, re.findall(r"\d+", text))) == MAX_DIGITS


@pytest.mark.parametrize(("text", "more"), [("1e", 2), ("2.5E+", 2), ("1e-", 3), ("-7e-30", 1), ("1e99", 0)])
def test_exponents_within_an_answer(compiler, tokenizer, vocab_size, text, more):
    within = matcher_within(compiler, {"type": "number"})
    matcher = matcher_after(within, tokenizer, f"1.5e-7 value: {text}")
    texts = [tokenizer.decode([token]) for token in allowed(matcher, vocab_size).tolist()]
    lengths = {len(found) for found in texts if found.isdigit()}
    assert max(lengths, default=0) <= more and bool(lengths) == bool(more)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({}, f'"{LONG}"'),
        ({"pattern": "^[0-9]+$"}, f'"{LONG}"'),
        ({"pattern": "^[0-9]{24,}$"}, f'"{LONG}"'),
        ({"pattern": "^[0-9].[0-9]{30}$"}, f'"1.{LONG[:30]}"'),
        ({"pattern": "^[0-9A-F]{30}$"}, f'"1E{LONG[:28]}"'),
        ({"pattern": "^[A-HJ-NPR-Z0-9]{17}$"}, f'"1E{LONG[:15]}"'),
        ({"pattern": "^[0-9]E[0-9]{3,6}[XYZ]$"}, f'"2E{LONG[:5]}Y"'),
    ],
)
def test_texts_of_digits_within_an_answer_are_free(compiler, tokenizer, vocab_size, schema, text):
    matcher = matcher_within(compiler, {"type": "string", **schema})
    for token in encode(tokenizer, f"value: {text}"):
        assert token in allowed(matcher, vocab_size)
        assert matcher.accept([token])


def matcher_after(matcher, tokenizer, text):
    assert matcher.accept(encode(tokenizer, text))
    return matcher


@given(st.lists(st.sampled_from(['"', "\\", "1", "23", "e", "-", "+", ".", ",", '\\"'])), st.data())
@pytest.mark.parametrize("advance", [advance, advance_within])
def test_every_cut_of_a_text_is_followed_to_the_same_state(advance, parts, data):
    text = "".join(parts).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    state = 0
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        state = advance(state, text[start:end])
    assert state == advance(0, text)
