"""Compares constraints that keep tokens from being sampled with the logits processors of Transformers."""

import pytest
import torch
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

from engine.sampling_params import SamplingParams
from tests.engine.runner.test_sampler import make_sampler

#: Greedy requests, each with the processors that Transformers has for the same.
PROCESSORS = [
    ({"no_repeat_ngram_size": 2}, lambda prompt: [NoRepeatNGramLogitsProcessor(2)]),
    ({"no_repeat_ngram_size": 1}, lambda prompt: [NoRepeatNGramLogitsProcessor(1)]),
    (
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
        lambda prompt: [RepetitionPenaltyLogitsProcessor(1.2), NoRepeatNGramLogitsProcessor(3)],
    ),
    ({"bad_words_ids": [[4], [2, 4], [3, 3, 1]]}, lambda prompt: [_no_bad_words([[4], [2, 4], [3, 3, 1]])]),
    # The prompt ends in 2: what it begins may not be finished.
    ({"bad_words_ids": [[2, 0], [5, 2, 1]]}, lambda prompt: [_no_bad_words([[2, 0], [5, 2, 1]])]),
    ({"suppress_tokens": [0, 3, 999]}, lambda prompt: [SuppressTokensLogitsProcessor([0, 3])]),
    (
        {"begin_suppress_tokens": [0, 1, 2]},
        lambda prompt: [SuppressTokensAtBeginLogitsProcessor([0, 1, 2], len(prompt))],
    ),
    (
        {"begin_suppress_tokens": [0, 7], "min_tokens": 9},
        lambda prompt: [
            MinNewTokensLengthLogitsProcessor(len(prompt), 9, [7]),
            SuppressTokensAtBeginLogitsProcessor([0, 7], len(prompt)),
        ],
    ),
    (
        {"logit_bias": {1: 1.5, 4: -2.0}, "repetition_penalty": 0.8},
        lambda prompt: [
            SequenceBiasLogitsProcessor([[[1], 1.5], [[4], -2.0]]),
            RepetitionPenaltyLogitsProcessor(0.8),
        ],
    ),
    ({}, lambda prompt: []),
]


def _no_bad_words(words):
    return NoBadWordsLogitsProcessor(words, eos_token_id=7)


@pytest.mark.parametrize("resumed", [0, 11], ids=["together", "after a preemption"])
def test_greedy_tokens_are_those_of_the_processors_of_transformers(resumed):
    vocab, steps, prompts = 8, 40, [[5, 2, 6, 2, i % 8, 5, 2] for i in range(len(PROCESSORS))]
    all_logits = torch.randn(steps, len(PROCESSORS), vocab, generator=torch.Generator().manual_seed(8)) * 2
    expected = []
    for row, (_, make) in enumerate(PROCESSORS):
        ids, processors = list(prompts[row]), LogitsProcessorList(make(prompts[row]))
        for step in range(steps):
            scores = processors(torch.tensor([ids]), all_logits[step, row : row + 1].clone())
            if scores.isinf().all():
                break
            ids.append(int(scores.argmax()))
        expected.append(ids[len(prompts[row]) :])
    assert len({tuple(tokens) for tokens in expected}) == len(PROCESSORS)
    params = [SamplingParams(temperature=0, **fields) for fields, _ in PROCESSORS]
    rows = [row for row in range(len(params)) if len(expected[row]) > resumed]
    sampler, slots = make_sampler(
        [params[row] for row in rows],
        prompts=[prompts[row] for row in rows],
        outputs=[expected[row][:resumed] for row in rows],
        stop_ids=[7],
        vocab=vocab,
    )
    plan, found = sampler.plan(slots.tolist()), []
    for step in range(resumed, steps):
        found.append(sampler.sample(all_logits[step][rows], slots, plan).tolist())
    for row, tokens in zip(rows, zip(*found, strict=True), strict=True):
        wanted = expected[row][resumed:]
        assert list(tokens[: len(wanted)]) == wanted, PROCESSORS[row][0]
        # Where nothing was left, there is no token.
        assert len(wanted) == steps - resumed or tokens[len(wanted)] == -1
