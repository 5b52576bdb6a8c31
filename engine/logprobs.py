"""Log-probabilities of sampled and prompt tokens, from raw logits: before penalties, masks, temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of N tokens, with k alternatives each.

    Attributes:
        token_logprobs: (N,) float32.
        ranks: (N,) int64, 1 for the likeliest; equals share the best rank.
        top_ids: (N, k) int64, likeliest first.
        top_logprobs: (N, k) float32.
        wanted_logprobs: (N, w) float32, of tokens that the caller names; None if no row has any.
    """

    token_logprobs: Tensor
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor
    wanted_logprobs: Tensor | None = None


def compute_logprobs(logits: Tensor, tokens: Tensor, k: int, wanted: Tensor | None = None) -> LogprobTensors:
    """Log-probabilities of one token per row.

    Args:
        logits: (N, V) of any float dtype.
        tokens: (N,) int64; where a row has none, -1, its values mean nothing.
        k: alternatives per row.
        wanted: (N, w) int64, further tokens of each row.
    """
    logits = logits.float()
    chosen = logits.gather(1, tokens.clamp(min=0)[:, None])
    normaliser = logits.logsumexp(dim=1, keepdim=True)
    ranks = (logits > chosen).sum(dim=1) + 1
    top, top_ids = logits.topk(min(k, logits.shape[1]), dim=1)
    found = (chosen - normaliser)[:, 0], ranks, top_ids, top - normaliser
    if wanted is None:
        return LogprobTensors(*found)
    return LogprobTensors(*found, logits.gather(1, wanted) - normaliser)


def prompt_logprobs(
    logits: Tensor, targets: Tensor, k: int, *, piece_elements: int = 16 << 20
) -> LogprobTensors:
    """Log-probabilities of the tokens that follow each position of a chunk of the prompt.

    Args:
        logits: (T, V), any float dtype, of T consecutive positions.
        targets: (T,) int64, the next token of each position.
        k: alternatives per position.
        piece_elements: logits converted to float32 at a time; a whole chunk of a large vocabulary would
            outgrow what the step has left.
    """
    rows = max(1, piece_elements // logits.shape[1])
    parts = [
        compute_logprobs(logits[i : i + rows], targets[i : i + rows], k)
        for i in range(0, max(len(targets), 1), rows)
    ]
    return LogprobTensors(
        torch.cat([p.token_logprobs for p in parts]),
        torch.cat([p.ranks for p in parts]),
        torch.cat([p.top_ids for p in parts]),
        torch.cat([p.top_logprobs for p in parts]),
    )
