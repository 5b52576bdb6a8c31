#!/usr/bin/env bash
# llguidance: LLTokenizer takes n_vocab and ignores it for a wrapped tokenizer.
#
# Expected: LLTokenizer(TokenizerWrapper(...), n_vocab=64) makes masks of 64 tokens, for a model whose logits are wider
# than its vocabulary; a number that can't be is refused.
# The vocabulary stays as large as the list of tokens, without an error.
# Why it matters to a server of vision-language models: their logits are nearly always padded (Qwen2-VL: 151936 or
# 152064 logits for 151657 tokens). Masks of another width than the logits leave the padding's bits undefined.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q llguidance==1.9.1 numpy
cat > "$work/probe.py" <<'PY'
import json

import llguidance
import numpy as np


class Vocabulary:
    """The tokens given, and one that ends answers."""

    bos_token_id = None

    def __init__(self, tokens):
        self.tokens = [*tokens, b"<end>"]
        self.eos_token_id = len(tokens)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text):
        if not isinstance(text, str):
            raise TypeError("a text, not bytes")
        single = [bytes([byte]) for byte in text.encode()]
        return [self.tokens.index(byte) for byte in single if byte in self.tokens]


def tokenizer_of(tokens, **options):
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokens)), **options)


def after(tokenizer, grammar, tokens):
    """The tokens that may follow ``tokens``; None if those may not come themselves."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
    if not all(matcher.consume_token(token) for token in tokens):
        return None
    mask = np.zeros((tokenizer.vocab_size + 31) // 32, np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


print("llguidance", llguidance.__version__)
sizes = [tokenizer_of([b"a", b"b"], **options).vocab_size for options in ({}, {"n_vocab": 64})]
print("tokens: 3; vocab_size without n_vocab and with 64:", sizes)
assert sizes == [3, 3], "n_vocab counts now"
PY
"$work/venv/bin/python" "$work/probe.py"
