"""A tiny byte-level tokenizer, and a compiler on it."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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


def encode(tokenizer, text):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    return tokenizer.encode(text).ids
