"""Texts and bytes of single tokens, which join up to the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.token_texts import TokenTexts
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TOKENIZERS = {name: Tokenizer(make(), config) for name, (make, config) in KINDS.items()}


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_texts_and_bytes_join_up_to_the_text(name, skip):
    tokenizer = TOKENIZERS[name]
    alphabet = "the red 你😀é\n" if name != "unigram" else "the red"
    parts = st.sampled_from(["<s>", "</s>", "<|im_end|>", "<tool_call>"]) | st.text(alphabet, max_size=6)

    @settings(max_examples=80)
    @given(st.lists(parts, max_size=6).map("".join))
    def check(text):
        ids = tokenizer.encode(text)
        texts = TokenTexts(tokenizer, at_start=True, skipped=tokenizer.special_ids if skip else frozenset())
        rows = []
        for token in ids:
            seen = texts.look(token)
            rows.append(texts.take(token))
            assert rows[-1] == seen
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert b"".join(piece for _, piece in rows) == whole.encode()
        assert "".join(part for part, piece in rows if piece) == whole

    check()


def test_parts_of_a_character_have_no_text_until_it_is_whole():
    tokenizer = TOKENIZERS["byte_fallback"]
    texts = TokenTexts(tokenizer)
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "你".encode()]
    assert [texts.take(token) for token in ids] == [("", b"\xe4"), ("", b"\xbd"), ("你", b"\xa0")]


def test_an_alternative_is_read_after_the_same_tokens():
    tokenizer = TOKENIZERS["byte_fallback"]
    texts = TokenTexts(tokenizer, skipped=tokenizer.special_ids)
    texts.take(tokenizer.token_id("<0xC3>"))
    assert texts.look(tokenizer.token_id("<0xA9>")) == ("é", b"\xa9")
    assert texts.look(tokenizer.token_id("<0xA8>")) == ("è", b"\xa8")
    assert texts.look(tokenizer.token_id("</s>")) == ("</s>", b"")
    assert texts.look(tokenizer.token_id("▁the")) == ("\ufffd the", b" the")
    assert texts.take(tokenizer.token_id("<0xA9>")) == ("é", b"\xa9")


def test_a_leading_space_is_dropped_where_the_decoder_drops_it():
    tokenizer = TOKENIZERS["legacy_fallback"]
    the = tokenizer.token_id("▁the")
    begun, going_on = TokenTexts(tokenizer, at_start=True), TokenTexts(tokenizer)
    assert [begun.take(the)[0], begun.take(the)[0]] == ["the", " the"]
    assert going_on.take(the)[0] == " the"
