#!/usr/bin/env bash
# llguidance: where no token of the vocabulary can go on, the mask allows the tokens that end an answer.
#
# Expected: the mask is empty, since the text so far doesn't fulfil the grammar and no token leads on.
# It holds the end token, as if the answer were complete.
# Why it matters to a server of vision-language models: vocabularies without a token for every byte (unigram models)
# meet texts that they can't spell. Sampling under the mask then gives the end token, and a server reports a cut
# answer as a whole one ("stop"). The matcher knows better: after the mask is_error() is true, is_accepting() is not.
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


small = tokenizer_of([b"a", b"b"])
grammar = llguidance.LLMatcher.grammar_from_lark("start: /a[xy]b/")
print("llguidance", llguidance.__version__)
matcher = llguidance.LLMatcher(small, grammar, log_level=0)
assert matcher.consume_token(0)
mask = np.zeros(1, np.int32)
matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
end = small.eos_token
print("tokens a, b and end; grammar a[xy]b; mask after a", bin(int(mask[0])), "whose end bit is", mask[0] >> end & 1)
print("complete:", matcher.is_accepting(), "error:", matcher.is_error())
assert not matcher.is_accepting()
assert mask[0] >> end & 1, "the mask doesn't hold the end token now"
PY
"$work/venv/bin/python" "$work/probe.py"
