"""Masks, bans and penalties against Transformers' processors and against oracles in plain Python."""

import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from engine.kernels.gumbel import mask_tokens
from engine.runner.sampler_processors import (
    add_at,
    forbid_bad_words,
    forbid_early,
    forbid_repeated_ngrams,
    penalize,
)

VOCAB = 50


def random_logits(rows=1):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5)) * 3


def test_repetition_penalty_is_that_of_transformers():
    logits, prompt, output = random_logits(), [1, 1, 5, 49], [2, 5, 7]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    counts = torch.bincount(torch.tensor(output), minlength=VOCAB)[None].int()
    seen = torch.bincount(torch.tensor(prompt), minlength=VOCAB)[None] > 0
    ours = penalize(logits.clone(), counts, seen, torch.tensor([1.7]), torch.zeros(1), torch.zeros(1))
    torch.testing.assert_close(ours, expected)


def test_penalties_follow_their_formulas():
    logits = random_logits(2)
    outputs = [[3, 3, 3, 9], [4]]
    counts = torch.stack([torch.bincount(torch.tensor(o), minlength=VOCAB) for o in outputs]).int()
    seen = torch.zeros(2, VOCAB, dtype=torch.bool)
    ours = penalize(
        logits.clone(), counts, seen, torch.ones(2), torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.0])
    )
    expected = logits.clone()
    expected[0, 3] -= 0.5 + 3 * 0.25
    expected[0, 9] -= 0.5 + 0.25
    torch.testing.assert_close(ours[0], expected[0])
    assert torch.equal(ours[1], logits[1])


def test_mask_keeps_the_tokens_of_its_bits():
    words = torch.randint(-(2**31), 2**31 - 1, (3, 2), dtype=torch.int64).int()
    masked = mask_tokens(random_logits(3), words)
    for row in range(3):
        for token in range(VOCAB):
            bit = (int(words[row, token // 32]) >> (token % 32)) & 1
            assert masked[row, token].isinf() == (bit == 0)


def test_sparse_additions_skip_padding():
    logits = random_logits(2)
    ids = torch.tensor([[1, 49, -1], [-1, -1, -1]])
    ours = add_at(logits.clone(), ids, torch.full((2, 3), 2.0))
    expected = SequenceBiasLogitsProcessor([[[1], 2.0], [[49], 2.0]])(torch.zeros(1, 1).long(), logits[:1])
    torch.testing.assert_close(ours[:1], expected)
    assert torch.equal(ours[1], logits[1])


def test_early_ids_are_masked_until_their_length():
    logits = random_logits(3)
    ids, until = torch.tensor([[4, 7, -1]]).expand(3, 3), torch.tensor([[1, 3, 9]]).expand(3, 3)
    ours = forbid_early(logits.clone(), ids, until, torch.tensor([0, 1, 3]))
    assert [row.isinf().nonzero().flatten().tolist() for row in ours] == [[4, 7], [7], []]
    assert torch.equal(ours[2], logits[2])


def test_repeated_ngrams_are_those_of_transformers():
    """Rows of other sizes and lengths than their neighbours, with ids beyond the vocabulary among them.

    A size may be more than all tokens of a row.
    """
    generator = torch.Generator().manual_seed(1)
    rows, banned = 60, 0
    tokens = torch.randint(0, 4, (rows, 23), generator=generator).int()
    tokens[::7, 3] = VOCAB + 5
    lengths = torch.randint(0, 24, (rows,), generator=generator)
    sizes = torch.tensor([0, 1, 2, 3, 7, 40]).repeat(10)
    logits = random_logits(rows)
    ours = forbid_repeated_ngrams(logits.clone(), tokens, lengths, sizes, 64)
    for row in range(rows):
        expected, ids = logits[row : row + 1], tokens[row : row + 1, : lengths[row]].long()
        if sizes[row] and lengths[row]:
            known = ids.where(ids < VOCAB, VOCAB - 1)
            expected = NoRepeatNGramLogitsProcessor(int(sizes[row]))(known, expected.clone())
            expected[0, VOCAB - 1] = logits[row, VOCAB - 1]
        assert torch.equal(ours[row], expected[0]), (int(sizes[row]), ids.tolist())
        banned += int(expected.isinf().sum())
    assert banned > 40


def test_bad_words_need_their_whole_prefix():
    logits = torch.zeros(1, VOCAB)
    prefixes = torch.tensor([[[-1, -1, 4], [-1, 3, 4], [-1, -1, -1]]], dtype=torch.int32)
    last = torch.tensor([[10, 11, -1]])

    def banned(recent):
        recent = torch.tensor([recent], dtype=torch.int32)
        return (
            forbid_bad_words(logits.clone(), prefixes, last, recent)[0].isinf().nonzero().flatten().tolist()
        )

    assert banned([-2, -2, -2]) == []
    assert banned([-2, -2, 4]) == [10]
    assert banned([9, 3, 4]) == [10, 11]
    assert banned([3, 4, 5]) == []
