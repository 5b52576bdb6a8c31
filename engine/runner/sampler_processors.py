"""The steps between logits and a sampled token, each a function over a batch of rows.

All are capturable in a CUDA graph: no host synchronisation, shapes known from the arguments' shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


def mask_tokens(logits: Tensor, bitmask: Tensor) -> Tensor:
    """``-inf`` where a token's bit is 0.

    Args:
        logits: (N, V) float32, changed in place.
        bitmask: (N, ceil(V / 32)) int32; bit ``id % 32`` of word ``id // 32``.
    """
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    banned = ((bitmask[:, :, None] >> bits) & 1) == 0
    return logits.masked_fill_(banned.flatten(1)[:, : logits.shape[1]], NEVER)


def add_at(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds ``values`` (N, W) to the logits of ``ids`` (N, W) int64, in place; an id below 0 adds nothing."""
    return logits.scatter_add_(1, ids.clamp(min=0), torch.where(ids < 0, 0.0, values))


def forbid_stops(logits: Tensor, stop_ids: Tensor, too_early: Tensor) -> Tensor:
    """Masks ``stop_ids`` (N, W) int64, -1 for none, in the rows where ``too_early`` (N,) bool; in place."""
    values = torch.where(too_early, NEVER, 0.0)[:, None].expand(stop_ids.shape)
    return add_at(logits, stop_ids, values)


def forbid_bad_words(logits: Tensor, prefixes: Tensor, last: Tensor, recent: Tensor) -> Tensor:
    """Masks the last token of every sequence whose other tokens are the row's most recent ones; in place.

    Args:
        logits: (N, V) float32.
        prefixes: (N, W, P) int32, right-aligned, -1 where any token matches.
        last: (N, W) int64, -1 for none.
        recent: (N, P) int32, latest output token last, -2 where there is none yet.
    """
    matches = ((prefixes == recent[:, None, :]) | (prefixes == -1)).all(dim=-1)
    return add_at(logits, last, torch.where(matches, NEVER, 0.0))


def penalize(
    logits: Tensor,
    counts: Tensor,
    prompt_seen: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Repetition (over prompt and output, Keskar et al. 2019), then presence and frequency (over the output,
    OpenAI's formula).

    Args:
        logits: (N, V) float32, changed in place.
        counts: (N, V) int32, occurrences in the output.
        prompt_seen: (N, V) bool.
        repetition, presence, frequency: (N,) float32; 1, 0 and 0 leave a row bit-identical.
    """
    in_output = counts > 0
    factor = torch.where(in_output | prompt_seen, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * in_output
    return logits
