"""Constraints and penalties of drawn requests, and the processors that Transformers has for the same."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from engine import SamplingParams

#: The variation that some requests of a case have them.
CONSTRAINTS = "constraints"
#: Those that go together with few allowed tokens: none of the others may ban the last of these.
_BESIDE_FEW = ("repetition_penalty", "logit_bias")


def draw_constraints(
    rng: random.Random, tokens: Sequence[int], most: int, vocab_size: int, ends: Collection[int]
) -> dict[str, Any]:
    """Some fields of :class:`SamplingParams`, which change the answer.

    Args:
        tokens: the answer without them.
        most: tokens of an answer.
        ends: tokens that may end one.
    """
    others = [token for token in range(vocab_size) if token not in ends]
    drawn: dict[str, Any] = {
        "repetition_penalty": rng.choice((0.3, 1.5, 8.0)),
        # One is longer than most prompts with their answers.
        "no_repeat_ngram_size": rng.choice((1, 2, 3, 64)),
        "bad_words_ids": [[rng.choice(tokens)], list(tokens[:2])],
        "suppress_tokens": [rng.choice(tokens), vocab_size + 3],
        "begin_suppress_tokens": [tokens[0]],
        "logit_bias": {rng.choice(tokens): -6.0, rng.randrange(vocab_size): 6.0},
        "min_tokens": rng.randint(1, most),
        "allowed_token_ids": rng.sample(others, 3),
    }
    names = rng.sample(list(drawn), rng.randint(1, 3))
    if "allowed_token_ids" in names:
        names = [name for name in names if name in ("allowed_token_ids", *_BESIDE_FEW)]
    return {name: drawn[name] for name in names}


def processors_of(
    params: SamplingParams, vocab_size: int, num_prompt: int, ends: Collection[int]
) -> LogitsProcessorList:
    """What Transformers makes of the logits of a greedy request, in the order of :class:`.Sampler`.

    Args:
        ends: tokens that end an answer, unless ``params`` say otherwise.
    """
    found = LogitsProcessorList()
    banned = [token for token in params.suppress_tokens if token < vocab_size]
    if params.allowed_token_ids is not None:
        banned += set(range(vocab_size)).difference(params.allowed_token_ids)
    if banned:
        found.append(SuppressTokensLogitsProcessor(banned))
    if params.begin_suppress_tokens:
        found.append(SuppressTokensAtBeginLogitsProcessor(params.begin_suppress_tokens, num_prompt))
    if params.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(params.bad_words_ids, eos_token_id=sorted(ends)))
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
    if params.logit_bias:
        found.append(
            SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias.items()])
        )
    stops = sorted({*params.stop_token_ids, *(() if params.ignore_eos else ends)})
    if params.min_tokens and stops:
        found.append(MinNewTokensLengthLogitsProcessor(num_prompt, params.min_tokens, stops))
    if params.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    return found
