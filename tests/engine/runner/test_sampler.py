"""Sampled tokens: distributions against the exact ones, and what must not matter to them."""

import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams, StructuredSpec

VOCAB = 50


def make_sampler(params, *, slots=None, vocab=VOCAB, prompts=None, outputs=None, seeds=None, stop_ids=()):
    """Admits every entry of ``params``, to the slot of its position unless told otherwise."""
    slots = list(range(len(params))) if slots is None else slots
    sampler = Sampler(max(slots) + 2, vocab, "cpu")
    for i, (slot, entry) in enumerate(zip(slots, params, strict=True)):
        sampler.admit(
            slot,
            entry,
            prompts[i] if prompts else [],
            outputs[i] if outputs else [],
            seed=seeds[i] if seeds else i,
            stop_ids=frozenset(stop_ids),
        )
    sampler.flush()
    return sampler, torch.tensor(slots)


def draw(sampler, logits, slots, steps=1, **kwargs):
    plan = sampler.plan(slots.tolist())
    return torch.stack([sampler.sample(logits, slots, plan, **kwargs) for _ in range(steps)])


def exact_distribution(logits, params):
    """The distribution that Transformers samples from; min-p comes first, as in vLLM."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.temperature))])
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    return warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone()).softmax(-1)[0]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(fields):
    params = SamplingParams(**fields)
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    exact = exact_distribution(logits, params).double()
    rows, steps = 500, 40
    sampler, slots = make_sampler([params] * rows)
    tokens = draw(sampler, logits.expand(rows, -1), slots, steps)
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB).double()
    assert not counts[exact == 0].any()
    likely = exact * rows * steps >= 5
    observed = [*counts[likely].tolist(), counts[~likely].sum().item()]
    expected = [*(exact[likely] * rows * steps).tolist(), exact[~likely].sum().item() * rows * steps]
    if expected[-1] < 1e-9:
        observed.pop(), expected.pop()
    if len(expected) > 1:
        assert stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    else:
        assert observed[0] == rows * steps


def test_tokens_of_one_row_are_independent_between_steps():
    sampler, slots = make_sampler([SamplingParams()] * 400, vocab=4)
    tokens = draw(sampler, torch.zeros(400, 4), slots, 26)
    pairs = torch.bincount((tokens[:-1] * 4 + tokens[1:]).flatten(), minlength=16)
    assert stats.chisquare(pairs.tolist()).pvalue > 1e-3
    neighbours = torch.bincount((tokens[:, :-1] * 4 + tokens[:, 1:]).flatten(), minlength=16)
    assert stats.chisquare(neighbours.tolist()).pvalue > 1e-3


FEATURES = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.5, temperature=0.7),
    SamplingParams(min_p=0.2),
    SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=1.0),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(logit_bias={3: 5.0, 4: -100.0}),
    SamplingParams(temperature=0, allowed_token_ids=[0, 31, 32, 49]),
    SamplingParams(bad_words_ids=[[7], [8, 9]]),
    SamplingParams(min_tokens=4),
    SamplingParams(temperature=0, min_tokens=4),
    SamplingParams(no_repeat_ngram_size=2, temperature=0),
    SamplingParams(no_repeat_ngram_size=1, suppress_tokens=[3, 10**6, -1]),
    SamplingParams(begin_suppress_tokens=list(range(3, 49))),
]


def test_a_row_is_the_same_alone_in_any_slot_and_after_preemption():
    steps, count = 8, len(FEATURES)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(steps, count, VOCAB, generator=generator) * 3
    prompts = [[i, i + 1, 2] for i in range(count)]
    seeds = [1000 + i for i in range(count)]

    def setup(order, slots, outputs=None):
        return make_sampler(
            [FEATURES[i] for i in order],
            slots=slots,
            prompts=[prompts[i] for i in order],
            seeds=[seeds[i] for i in order],
            outputs=outputs,
            stop_ids=[0, 1, 2],
        )

    sampler, slots = setup(range(count), list(range(count)))
    plan = sampler.plan(slots.tolist())
    together = torch.stack([sampler.sample(logits[t], slots, plan) for t in range(steps)])
    assert len(set(map(tuple, together.T.tolist()))) == count

    for i in range(count):
        alone, slot = setup([i], [3])
        plan = alone.plan([3])
        tokens = torch.cat([alone.sample(logits[t, i : i + 1], slot, plan) for t in range(steps)])
        assert tokens.tolist() == together[:, i].tolist(), FEATURES[i]

    order = list(reversed(range(count)))
    history = [together[:5, i].tolist() for i in order]
    resumed, slots = setup(order, [2 * i for i in range(count)], outputs=history)
    plan = resumed.plan(slots.tolist())
    tail = torch.stack([resumed.sample(logits[t][order], slots, plan) for t in range(5, steps)])
    assert tail.tolist() == together[5:, order].tolist()


def test_greedy_is_the_lowest_argmax_whatever_its_neighbours():
    logits = torch.randn(len(FEATURES), VOCAB).to(torch.bfloat16)
    logits[0, 11] = logits[0, 40] = 50.0
    alone, slots = make_sampler([SamplingParams(temperature=0)])
    plan = alone.plan([0])
    assert plan.all_greedy and not plan.processes
    assert alone.sample(logits[:1], slots, plan).tolist() == [11]
    params = [SamplingParams(temperature=0), *FEATURES[1:]]
    sampler, slots = make_sampler(params, stop_ids=[11])
    assert sampler.sample(logits, slots, sampler.plan(slots.tolist()))[0] == 11


def test_seeds_decide():
    logits = torch.zeros(6, VOCAB)
    seeds = [5, 5, -5, 5 + (1 << 32), (1 << 63) - 1, 6]
    sampler, slots = make_sampler([SamplingParams()] * 6, seeds=seeds)
    tokens = draw(sampler, logits, slots, 12).T.tolist()
    assert tokens[0] == tokens[1]
    assert len(set(map(tuple, tokens))) == 5


def test_reused_slots_carry_nothing_over():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    best = int(logits.argmax())
    heavy = SamplingParams(
        temperature=0, logit_bias={best: -100.0}, allowed_token_ids=[best, 1], bad_words_ids=[[best], [2, 3]],
        repetition_penalty=2.0, min_tokens=3,
    )  # fmt: skip
    sampler, slots = make_sampler([heavy, heavy], prompts=[[best]] * 2, stop_ids=[best])
    assert draw(sampler, logits.expand(2, -1), slots, 2).tolist() == [[1, 1], [1, 1]]
    sampler.release(0)
    sampler.admit(0, SamplingParams(temperature=0), [best], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    assert draw(sampler, logits.expand(2, -1), slots).tolist() == [[best, 1]]
    # Counts of the first tenant, who took token 1 twice, would keep the second from it.
    params = SamplingParams(temperature=0, presence_penalty=0.5, allowed_token_ids=[1, 2])
    sampler.admit(0, params, [], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    logits[0, 1], logits[0, 2] = 1.0, 0.75
    assert draw(sampler, logits.expand(2, -1), slots)[0, 0] == 1


def test_a_greedy_request_after_a_random_one_is_greedy():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)).expand(2, -1)
    hot = SamplingParams(temperature=50.0)
    sampler, slots = make_sampler([hot, hot])
    assert len(set(draw(sampler, logits, slots, 8)[:, 0].tolist())) > 1
    sampler.release(0)
    # The other row still asks for noise.
    sampler.admit(0, SamplingParams(temperature=0, top_k=5), [], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    tokens = draw(sampler, logits, slots, 8)
    assert set(tokens[:, 0].tolist()) == {int(logits[0].argmax())}
    assert len(set(tokens[:, 1].tolist())) > 1


def test_an_admission_that_cannot_be_written_is_forgotten_with_its_slot():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)).expand(3, -1)
    hot = SamplingParams(temperature=50.0, presence_penalty=1.0)
    sampler, slots = make_sampler([hot, hot, hot])
    sampler.release(0)
    # No such token: the counts of its output can't be written.
    bad = SamplingParams(temperature=0, presence_penalty=1.0)
    sampler.admit(0, bad, [], [VOCAB * 5], seed=0, stop_ids=frozenset())
    with pytest.raises(IndexError):
        sampler.flush()
    sampler.release(0)
    sampler.release(1)
    sampler.admit(1, SamplingParams(temperature=0), [], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    # Nor does the slot keep what its first request had, if a second one was never written.
    for _ in range(2):
        sampler.release(0)
        sampler.admit(0, SamplingParams(temperature=0), [], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    tokens = draw(sampler, logits, slots, 8)
    assert set(tokens[:, :2].flatten().tolist()) == {int(logits[0].argmax())}
    assert len(set(tokens[:, 2].tolist())) > 1


def test_padded_rows_are_harmless():
    sampler, slots = make_sampler(FEATURES, stop_ids=[0])
    other, _ = make_sampler(FEATURES, stop_ids=[0])
    padded = torch.cat([slots, torch.full((4,), sampler.max_slots)])
    logits = torch.randn(len(padded), VOCAB, generator=torch.Generator().manual_seed(4))
    plan = sampler.plan(slots.tolist())
    for _ in range(4):
        tokens = sampler.sample(logits, padded, plan)
        assert tokens[: len(slots)].tolist() == other.sample(logits[: len(slots)], slots, plan).tolist()
        assert tokens[len(slots) :].tolist() == logits[len(slots) :].argmax(-1).tolist()


def test_logits_are_not_changed_and_no_token_comes_where_none_is_allowed():
    sampler, slots = make_sampler(FEATURES, stop_ids=[0])
    logits = torch.randn(len(FEATURES), VOCAB)
    before = logits.clone()
    draw(sampler, logits, slots)
    assert torch.equal(logits, before)
    tokens = draw(sampler, torch.full_like(logits, float("-inf")), slots)
    assert tokens.tolist() == [[-1] * len(FEATURES)]


def test_grammar_masks_rows_of_their_own():
    structured = SamplingParams(structured=StructuredSpec(kind="json_object"))
    sampler, slots = make_sampler([structured, SamplingParams(temperature=0)])
    logits = torch.randn(2, VOCAB)
    mask = torch.full((2, 2), -1, dtype=torch.int32)
    mask[0] = torch.tensor([0, 1 << 5])
    assert sampler.plan([0, 1]).grammar and not sampler.plan([1]).grammar
    assert draw(sampler, logits, slots, grammar_mask=mask).tolist() == [[37, int(logits[1].argmax())]]


def test_plans_are_hashable_unions():
    sampler, _ = make_sampler(FEATURES, stop_ids=[1, 2, 3])
    assert sampler.plan([1]) == sampler.plan([sampler.max_slots])
    assert sampler.plan([0]).random and not sampler.plan([0]).truncates
    union = sampler.plan([0, 5, 7, 9, 10])
    assert union.penalties and union.bitmask
    assert (union.bias_width, union.early_width, union.bad_words_width) == (2, 4, 1)
    assert len({sampler.plan([0, 2]), sampler.plan([2, 0]), sampler.plan([0])}) == 2


def test_penalties_count_what_was_sampled():
    """Greedy under a frequency penalty visits tokens as an oracle that recounts at every step does."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    params = SamplingParams(
        temperature=0, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.1
    )
    prompt, output = [7, 8], [int(logits.argmax())]
    sampler, slots = make_sampler([params], prompts=[prompt], outputs=[output[:]])
    for token in draw(sampler, logits, slots, 30).flatten().tolist():
        row = RepetitionPenaltyLogitsProcessor(1.1)(torch.tensor([prompt + output]), logits.clone())[0]
        for seen in set(output):
            row[seen] -= 0.3 + 0.7 * output.count(seen)
        assert token == int(row.argmax())
        output.append(token)
    assert len(set(output)) > 5


def test_min_tokens_ends_exactly_then():
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 3] = 5.0, 1.0
    sampler, slots = make_sampler([SamplingParams(temperature=0, min_tokens=3)], stop_ids=[9, 10])
    assert draw(sampler, logits, slots, 5).flatten().tolist() == [3, 3, 3, 9, 9]


def test_bad_words_are_those_of_transformers():
    words = [[7], [1, 2], [5, 6, 8], [8, 8, 8, 5]]
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=VOCAB - 1)
    params = SamplingParams(bad_words_ids=words, allowed_token_ids=[1, 2, 5, 6, 7, 8])
    logits = torch.zeros(64, VOCAB)
    sampler, slots = make_sampler([params] * 64)
    outputs = [[] for _ in range(64)]
    banned = 0
    for step in draw(sampler, logits, slots, 40).tolist():
        for output, token in zip(outputs, step, strict=True):
            if output:
                allowed = processor(torch.tensor([output]), torch.zeros(1, VOCAB))[0]
                assert allowed[token] == 0
                banned += int(allowed.isinf().sum()) - 1
            output.append(token)
    assert banned > 100
    pairs = {tuple(output[i : i + 2]) for output in outputs for i in range(39)}
    assert (5, 6) in pairs and (2, 1) in pairs and (1, 2) not in pairs
