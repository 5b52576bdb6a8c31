"""Texts spelled in tokens whose bytes are exactly the text."""

from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.segmentation import Segmenter
from engine.text.spelling import Speller
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

#: Strings that tokenizers read as something else than their bytes.
ODD = [
    "<|im_end|>",
    "<tool_call>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "e\u0301",
    "\u212b",
    "▁",
    " ",
    "\n",
    "\u00a0",
]


@cache
def speller_of(name: str) -> Speller:
    make, config = KINDS[name]
    tokenizer = Tokenizer(make(), config)
    return Speller(tokenizer, tokenizer.vocab_size + 3, frozenset([tokenizer.role_id("eos_token")]))


def joined(speller, ids):
    return b"".join(speller.token_bytes[i] for i in ids)


texts = st.lists(st.sampled_from(ODD) | st.text("the red, blue", max_size=6) | st.text(max_size=3)).map(
    "".join
)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "legacy_fallback"])
def test_the_bytes_of_the_tokens_are_the_text(name):
    speller = speller_of(name)

    @settings(max_examples=150)
    @given(texts)
    def check(text):
        ids = speller.spell(text)
        assert joined(speller, ids) == text.encode()
        assert speller.control_ids.isdisjoint(ids)

    check()


@pytest.mark.parametrize("name", KINDS)
def test_ordinary_text_is_cut_as_the_tokenizer_cuts_it(name):
    speller, tokenizer = speller_of(name), speller_of(name)._tokenizer
    whole = tokenizer.encode("x the red the", add_special_tokens=False)
    rest = speller.spell(" the red the")
    assert rest and whole[-len(rest) :] == rest


def test_an_added_token_that_is_text_is_itself():
    speller = speller_of("byte_level")
    tool_call = speller._tokenizer.token_id("<tool_call>")
    ids = speller.spell("a<tool_call>{")
    assert tool_call in ids and joined(speller, ids) == b"a<tool_call>{"


def test_a_vocabulary_that_lacks_a_character_spells_up_to_it():
    speller = speller_of("unigram")
    assert joined(speller, speller.spell(" the ☃ red")) == b" the "
    assert speller.spell("☃") == []
    assert speller.segmenter.can_cut(b" the red") and not speller.segmenter.can_cut(" the ☃".encode())


def test_long_texts_are_spelled_no_further_than_their_first_token_needs():
    speller = speller_of("byte_level")
    assert len(speller.spell("é" * 100_000)) < 5_000
    assert joined(speller, speller.spell("e\u0301" * 100_000)).startswith("e\u0301e\u0301".encode())


def test_segments_against_all_ways_of_cutting():
    pieces = [b"a", b"ab", b"bc", b"c", b"abcc", b"", b"a"]
    segmenter = Segmenter(pieces)
    filled = [i for i, piece in enumerate(pieces) if piece]
    ways: dict[bytes, int] = {}
    for count in range(5):
        for ids in product(filled, repeat=count):
            ways.setdefault(b"".join(pieces[i] for i in ids), count)
    for letters in product(b"abc", repeat=4):
        data = bytes(letters)
        assert segmenter.can_cut(data) == (data in ways)
        ids = segmenter.fewest(data)
        made = b"".join(pieces[i] for i in ids)
        assert data.startswith(made) and len(ids) == ways[made]
        assert len(made) == max(len(data[:end]) for end in range(5) if data[:end] in ways)
    assert segmenter.can_cut(b"aa", frozenset([6])) and not segmenter.can_cut(b"ab", frozenset([0, 6, 3]))
    assert not segmenter.cuts_all and Segmenter([bytes([b]) for b in range(256)]).cuts_all
