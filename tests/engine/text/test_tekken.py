import json

import pytest
import tokenizers
from tokenizers import Regex, pre_tokenizers

from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer
from tests.engine.text.tekken_file import NUM_SPECIAL, SPECIALS, TEXTS, VOCAB_SIZE, recorded, write_tekken


@pytest.mark.parametrize("listed", [True, False])
def test_ids_are_those_of_mistral_common(tmp_path, listed):
    write_tekken(tmp_path, listed=listed)
    ours = Tokenizer.load(tmp_path)
    for text, expected in zip(TEXTS, recorded(), strict=True):
        assert ours.encode_plain(text) == expected
        if "[" not in text:
            assert ours.encode(text) == [ours.role_id("bos_token"), *expected]
        assert ours.decode(expected) == text


def test_ids_are_those_of_transformers_with_special_tokens_inside(tmp_path):
    module = pytest.importorskip("transformers.integrations.mistral.tokenizer")
    theirs = module.MistralConverter(str(write_tekken(tmp_path))).converted()
    ours = Tokenizer.load(tmp_path)
    for text in [*TEXTS, "<s>[INST]the ere[/INST]where</s>", "<SPECIAL_25>[ARGS]", " [IMG] a"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text).ids


def test_special_tokens_have_the_first_ids_and_roles(tmp_path):
    write_tekken(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert [ours.token_id(text) for text in SPECIALS] == list(range(len(SPECIALS)))
    assert ours.special_ids == frozenset(range(NUM_SPECIAL))
    assert [ours.role_id(f"{role}_token") for role in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 11]
    assert ours.token_id("//") is None and ours.vocab_size == VOCAB_SIZE


def test_tokenizer_json_splits_by_the_pattern_of_the_file_beside_it(tmp_path):
    write_tekken(tmp_path)
    backend = Tokenizer.load(tmp_path).backend
    wrong = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([wrong, level])
    backend.save(str(tmp_path / "tokenizer.json"))
    published = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    for text, expected in zip(TEXTS, recorded(), strict=True):
        assert ours.encode_plain(text) == expected
    assert [published.encode(text, add_special_tokens=False).ids for text in TEXTS] != recorded()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": {}, "vocab": []}'])
@pytest.mark.parametrize("beside", [True, False])
def test_a_broken_file_is_named(tmp_path, content, beside):
    if beside:
        write_tekken(tmp_path)
        Tokenizer.load(tmp_path).backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tekken\.json"):
        Tokenizer.load(tmp_path)


def test_ids_beyond_the_models_vocabulary_are_left_out(tmp_path):
    file = write_tekken(tmp_path)
    content = json.loads(file.read_text())
    content["config"]["default_vocab_size"] -= 20
    file.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).vocab_size == content["config"]["default_vocab_size"]
