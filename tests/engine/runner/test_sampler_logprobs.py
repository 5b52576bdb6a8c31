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
    assert sampler.logprobs(logits, tokens, sampler.plan([0])) is None
    assert sampler.logprobs(logits, tokens, sampler.plan([0, 2])).top_ids.shape == (2, 5)
