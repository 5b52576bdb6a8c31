import json
import os
import shutil
import subprocess
import sys
import unicodedata

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TEXTS = [
    "",
    "Hello the red world",
    "  leading, trailing  ",
    "güzel 你好 😀\n\n\tx",
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>hi<|im_end|>\n<tool_call>",
    "<s>USER: <image>\nthe red <|end|>  x  <|user|> y</s>",
    "e\u0301 combining",
]


@pytest.fixture(params=KINDS)
def both(request, checkpoints):
    folder = checkpoints[request.param]
    return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_and_text_are_those_of_transformers(both, add_special_tokens):
    ours, theirs = both
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_named_tokens(both):
    ours, theirs = both
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert ours.role_id(role) == getattr(theirs, f"{role}_id")
    assert ours.vocab_size == len(theirs)


def test_plain_text_holds_no_special_token_and_reads_the_same(both):
    ours, _ = both
    for text in TEXTS:
        ids = ours.encode_plain(text)
        assert ours.special_ids - {ours.token_id("<unk>")} & set(ids) == set()
        if ours.token_id("▁the") is None:
            assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_plain_text_without_special_strings_is_encoded_as_ever(both):
    ours, _ = both
    for text in ["Hello the red world", "  two  spaces", "güzel 你好 😀\n"]:
        assert ours.encode_plain(text) == ours.encode(text, add_special_tokens=False)


def test_special_strings_in_plain_text_survive(checkpoints):
    for name in ("byte_fallback", "legacy_fallback", "unigram"):
        tokenizer = Tokenizer.load(checkpoints[name])
        ids = tokenizer.encode_plain("the <s> red")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the <s> red"


def test_plain_text_inside_of_a_prompt_has_no_space_put_before_it(checkpoints):
    tokenizer = Tokenizer.load(checkpoints["byte_fallback"])
    whole = tokenizer.encode("<s>the red", add_special_tokens=False)
    assert [1, *tokenizer.encode_plain("the red", at_start=False)] == whole
    assert [1, *tokenizer.encode_plain("the red")] != whole
    legacy = Tokenizer.load(checkpoints["legacy_fallback"])
    assert [1, *legacy.encode_plain("the red", at_start=False)] == legacy.encode(
        "<s>the red", add_special_tokens=False
    )


def test_with_special_tokens(both):
    ours, _ = both
    ids = ours.encode("the red", add_special_tokens=False)
    assert ours.with_special_tokens(ids) == ours.encode("the red", add_special_tokens=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("special", [True, False])
def test_texts_are_cut_as_transformers_does(both, side, special):
    ours, theirs = both
    first, last = map(ours.backend.id_to_token, (0, 1))
    for backend in (ours.backend, theirs.backend_tokenizer):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}", special_tokens=[(first, 0), (last, 1)]
        )
    ours.config["truncation_side"] = theirs.truncation_side = side
    ids = ours.encode("Hello the red world", add_special_tokens=special)
    for most in range(len(ours.with_special_tokens([])) + 1, len(ids) + 2):
        cut = theirs.encode(
            "Hello the red world", add_special_tokens=special, truncation=True, max_length=most
        )
        assert ours.truncated(ids, most, special=special) == cut


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"extra_special_tokens": ["<|extra|>"]},
        {"added_tokens_decoder": {"999": {"content": "<|late|>", "special": True, "normalized": False}}},
        {"bos_token": "<|begin|>", "add_bos_token": True},
        {"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": True, "special": True}},
    ],
)
def test_what_the_configuration_adds(checkpoints, tmp_path, config):
    folder = tmp_path / "tokenizer"
    shutil.copytree(checkpoints["byte_fallback"], folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ["the red", "<|extra|>the <|late|><|begin|> x", "a </s> b"]:
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(text, add_special_tokens=add)


def test_padding_and_truncation_in_the_file_are_not_applied(checkpoints, tmp_path):
    backend = KINDS["byte_level"][0]()
    backend.enable_truncation(3)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    plain = Tokenizer.load(checkpoints["byte_level"])
    text = "describe this image in detail"
    assert ours.encode(text, add_special_tokens=True) == plain.encode(text, add_special_tokens=True)


def test_bytes_of_tokens(checkpoints):
    level = Tokenizer.load(checkpoints["byte_level"])
    text = "güzel 你好 😀 x"
    assert b"".join(map(level.token_bytes, level.encode(text, add_special_tokens=False))).decode() == text
    fallback = Tokenizer.load(checkpoints["byte_fallback"])
    ids = fallback.encode(text, add_special_tokens=False)
    assert b"".join(map(fallback.token_bytes, ids)).decode() == " " + text
    assert fallback.first_token_bytes(ids[0]) == b""
    assert fallback.token_bytes(10**7) == b""


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=tmp_path.name):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "package sentencepiece, which is not installed"),
        (
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}},
            "which is never run",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_refused_by_what_to_do(tmp_path, monkeypatch, config, reason):
    monkeypatch.setattr("engine.text.tokenizer.find_spec", lambda name: None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=rf"{reason}\. Put a tokenizer\.json there") as refused:
        Tokenizer.load(tmp_path)
    assert "trust_remote_code" not in str(refused.value)


def test_imports_are_light_and_change_no_environment_and_a_replica_starts_no_threads_for_texts(checkpoints):
    code = f"""if True:
        import os, sys
        before = dict(os.environ)
        import engine.inputs.builder, engine.text.detokenizer
        from engine.text.tokenizer import Tokenizer
        tokenizer = Tokenizer.load({str(checkpoints["byte_level"])!r})
        assert not {{"transformers", "torch"}} & set(sys.modules), "heavy import"
        assert dict(os.environ) == before, "environment"
        from deployments.ray_serve.process import prepare_process
        prepare_process()
        threads = os.listdir("/proc/self/task")
        tokenizer.encode("Hello the red world")
        assert os.listdir("/proc/self/task") == threads, "threads"
    """
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
