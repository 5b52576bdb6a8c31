from types import MappingProxyType

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import IncrementalDetokenizer, StopSearch
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TOKENIZERS: dict[str, Tokenizer] = {name: Tokenizer(make(), config) for name, (make, config) in KINDS.items()}
LEVEL = TOKENIZERS["byte_level"]


def run(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    parts = []
    for token in ids:
        if detokenizer.stop_reason is None:
            parts.append(detokenizer.append([token]))
    parts.append(detokenizer.finish())
    return parts, detokenizer


def streams(name):
    last = TOKENIZERS[name].vocab_size - 1
    tokens = st.integers(0, last)
    if name in ("byte_fallback", "legacy_fallback"):  # bytes alone never spell valid text; see below
        tokens = st.integers(0, 2) | st.integers(259, last)
    return st.lists(tokens, max_size=30)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_joined_text_is_that_of_decoding_everything(name, skip):
    tokenizer = TOKENIZERS[name]

    @settings(max_examples=60)
    @given(streams(name))
    def check(ids):
        parts, _ = run(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)

    check()


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=12), cut=st.integers(0, 20))
@settings(max_examples=40)
def test_text_goes_on_from_the_prompt(name, text, cut):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("the red 😀" + text, add_special_tokens=False)
    cut = min(cut + 1, len(ids))
    parts, _ = run(tokenizer, ids[cut:], prompt_tail=ids[:cut])
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
    assume("\ufffd" not in before)
    assert "".join(parts) == whole[len(before) :]


def test_a_character_that_the_prompt_began_is_finished():
    ids = [LEVEL.token_id(c) for c in "ðŁĺĢ"]
    parts, _ = run(LEVEL, ids[2:], prompt_tail=ids[:2])
    assert "".join(parts) == "😀"


@given(text=st.text(min_size=1, max_size=20))
@settings(max_examples=60)
def test_byte_tokens_spell_text(text):
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [3 + byte for byte in text.encode()]
    parts, _ = run(tokenizer, ids, prompt_tail=[1, 300])
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


def test_half_a_character_waits():
    ids = LEVEL.encode("😀", add_special_tokens=False)
    ids = ids if len(ids) > 1 else [LEVEL.token_id(c) for c in "ðŁĺĢ"]
    parts, _ = run(LEVEL, ids)
    assert parts[:-2] == [""] * (len(parts) - 2)
    assert "".join(parts) == "😀"
    broken, _ = run(LEVEL, ids[:-1])
    assert broken[-1] == "\ufffd"


def naive(pieces, stops, include, min_tokens):
    """Look at the text after every character for a complete stop string, the longest of several."""
    text, consumed = "", 0
    for piece in pieces:
        consumed += 1
        for character in piece:
            text += character
            if consumed <= min_tokens:
                continue
            found = [stop for stop in stops if text.endswith(stop)]
            if found:
                stop = max(found, key=len)
                return text if include else text[: -len(stop)], stop, consumed
    return text, None, consumed


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("ab", min_size=1, max_size=4), max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=9), max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 5),
)
def test_stop_strings_are_those_of_a_naive_search(pieces, stops, include, min_tokens):
    tokenizer = _Pieces(pieces)
    parts, detokenizer = run(
        tokenizer, range(len(pieces)), stop=stops, include_stop=include, min_tokens=min_tokens
    )
    text, reason, consumed = naive(pieces, stops, include, min_tokens)
    assert ("".join(parts), detokenizer.stop_reason, detokenizer.num_tokens_consumed) == (
        text,
        reason,
        consumed,
    )
    together = IncrementalDetokenizer(
        tokenizer, stop=stops, include_stop=include, min_tokens=min_tokens, skip_special_tokens=True
    )
    assert together.append(range(len(pieces))) + together.finish() == text


class _Pieces:
    """A tokenizer whose i-th token is the i-th given string."""

    special_ids = frozenset()
    ascii_texts = MappingProxyType({})

    def __init__(self, pieces):
        self._pieces = [piece.encode() for piece in pieces]

    def token_bytes(self, token_id):
        return self._pieces[token_id]

    first_token_bytes = token_bytes


def test_only_a_possible_stop_string_is_held_back():
    parts, detokenizer = run(_Pieces(["ab", "c ST", "O", "x", "yST", "OP", "z"]), range(7), stop=["STOP"])
    assert parts == ["ab", "c ", "", "STOx", "y", "", ""]
    assert detokenizer.stop_reason == "STOP"
    assert detokenizer.num_tokens_consumed == 6


def test_no_more_is_kept_than_may_become_a_stop_string():
    detokenizer = IncrementalDetokenizer(_Pieces(["abcdefgh", "x"]), stop=["xyz", "hxhxhx"])
    for _ in range(100):
        assert detokenizer.append([0]) in ("abcdefg", "habcdefg", "hxabcdefg")
        assert detokenizer._held == "h"
        assert detokenizer.append([1]) == ""
        assert detokenizer._held == "hx"


class _Counted(str):
    """A text that counts the characters that are looked at."""

    looked_at = 0

    def __getitem__(self, index):
        _Counted.looked_at += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("stop", ["a" * 500 + "b" * 500, "a" * 500 + "b" + "a" * 500])
def test_each_character_costs_little_whatever_the_stop_string(monkeypatch, stop):
    """A caller chooses the string, and can have the model write what almost is one."""
    monkeypatch.setattr(_Counted, "looked_at", 0)
    search = StopSearch(_Counted(stop))
    pieces = ["a" * 700, *["a"] * 500, "b" + "a" * 400 + "b", "a" * 499, "c"]
    assert [search.feed(_Counted(piece), True) for piece in pieces] == [None] * len(pieces)
    assert search.matched == 0
    # Of the string, whose table is made first, and of the text.
    assert _Counted.looked_at < 3 * (len(stop) + 2 * sum(map(len, pieces)))
    assert search.feed("c" + stop + "d", True) == len(stop) + 1
