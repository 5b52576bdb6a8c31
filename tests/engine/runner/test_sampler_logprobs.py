import pytest
import torch

from engine.logprobs import compute_logprobs, prompt_logprobs
from engine.runner.sampler import Sampler
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_log_softmax(dtype):
    logits = (torch.randn(9, 70, generator=torch.Generator().manual_seed(6)) * 4).to(dtype)
    tokens = torch.arange(9) * 7
    ours = compute_logprobs(logits, tokens, 5)
    exact = torch.log_softmax(logits.double(), dim=-1)
    torch.testing.assert_close(ours.token_logprobs.double(), exact[range(9), tokens], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.top_logprobs.double(), exact.topk(5).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        exact.gather(1, ours.top_ids), ours.top_logprobs.double(), atol=1e-5, rtol=1e-5
    )
    for row, token in enumerate(tokens.tolist()):
        assert ours.ranks[row] == 1 + sum(x > logits[row, token] for x in logits[row])


def test_prompt_logprobs_are_the_same_in_pieces():
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(7))
    targets = torch.arange(7)
    whole = compute_logprobs(logits, targets, 3)
    for elements in (1, 60, 1000):
        pieces = prompt_logprobs(logits, targets, 3, piece_elements=elements)
        for name in ("token_logprobs", "ranks", "top_ids", "top_logprobs"):
            assert torch.equal(getattr(pieces, name), getattr(whole, name))
    assert prompt_logprobs(logits[:0], targets[:0], 3).top_ids.shape == (0, 3)


def test_plan_says_how_many():
    sampler = Sampler(4, 30, "cpu")
    for slot, k in enumerate([None, 0, 3, 20]):
        sampler.admit(slot, SamplingParams(logprobs=k), [], [], seed=0, stop_ids=frozenset())
    assert [sampler.plan([slot]).num_logprobs for slot in range(4)] == [-1, 0, 5, 20]
    logits, tokens = torch.randn(2, 30), torch.tensor([3, 4])
    assert sampler.logprobs(logits, torch.tensor([0, 0]), tokens, sampler.plan([0])) is None
    found = sampler.logprobs(logits, torch.tensor([0, 2]), tokens, sampler.plan([0, 2]))
    assert found.top_ids.shape == (2, 5) and found.wanted_logprobs is None


def test_each_slot_has_the_log_probabilities_of_the_tokens_that_it_names():
    sampler, named = Sampler(4, 30, "cpu"), {0: [7, 3, 29], 1: [], 2: [5, 5, 0, 8, 9]}
    for slot, ids in named.items():
        params = SamplingParams(logprob_token_ids=ids, logprobs=None if ids else 1)
        sampler.admit(slot, params, [], [], seed=0, stop_ids=frozenset())
    sampler.flush()
    # A slot may have several rows.
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(8))
    slots = torch.tensor([2, 0, 1, 0, 2])
    plan = sampler.plan([0, 1, 2])
    assert (plan.num_logprobs, plan.wanted_width) == (1, 8)
    found = sampler.logprobs(logits, slots, torch.zeros(5, dtype=torch.long), plan)
    exact = torch.log_softmax(logits.double(), dim=-1)
    for row, slot in enumerate(slots.tolist()):
        for place, token in enumerate(named[slot]):
            assert found.wanted_logprobs[row, place].item() == pytest.approx(
                exact[row, token].item(), abs=1e-5
            )
