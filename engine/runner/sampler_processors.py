"""The steps between logits and a sampled token, each a function over a batch of rows.

All can be captured in a CUDA graph: no host synchronisation, shapes known from the arguments' shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = float("-inf")


def add_at(logits: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """Adds ``values`` (N, W) to the logits of ``ids`` (N, W) int64, in place; an id below 0 adds nothing."""
    return logits.scatter_add_(1, ids.clamp(min=0), torch.where(ids < 0, 0.0, values))


def forbid_early(logits: Tensor, ids: Tensor, until: Tensor, output_len: Tensor) -> Tensor:
    """Masks tokens that may only come later in the output, in place.

    Args:
        logits: (N, V) float32.
        ids: (N, W) int64, -1 for none.
        until: (N, W) int64, length of the output from which on each id is allowed.
        output_len: (N,) int64.
    """
    return add_at(logits, ids, torch.where(output_len[:, None] < until, NEVER, 0.0))


def forbid_bad_words(logits: Tensor, prefixes: Tensor, last: Tensor, recent: Tensor) -> Tensor:
    """Masks the last token of every sequence whose other tokens are the row's most recent ones, in place.

    Args:
        logits: (N, V) float32.
        prefixes: (N, W, P) int32, right-aligned, -1 where any token matches.
        last: (N, W) int64, -1 for none.
        recent: (N, P) int32, latest token last, -2 before the first.
    """
    matches = ((prefixes == recent[:, None, :]) | (prefixes == -1)).all(dim=-1)
    return add_at(logits, last, torch.where(matches, NEVER, 0.0))


def forbid_repeated_ngrams(
    logits: Tensor, tokens: Tensor, lengths: Tensor, sizes: Tensor, widest: int
) -> Tensor:
    """Masks every token that would complete a sequence of tokens which is there already, in place.

    Args:
        logits: (N, V) float32.
        tokens: (N, L) int32, each row's prompt and output.
        lengths: (N,) int64, how many of them are known.
        sizes: (N,) int64, tokens of a sequence that must not come twice; 0 for rows without this limit.
        widest: no less than any of ``sizes``.
    """
    rows, longest = tokens.shape
    index = torch.arange(longest, device=tokens.device)[None, :]
    sizes, lengths = sizes[:, None], lengths[:, None]
    # Of a sequence that ends at ``index``; the row's last ``size - 1`` tokens must be those before its end.
    repeats = (sizes > 0) & (index >= sizes - 1) & (index < lengths)
    # A sequence that is longer than the rows can't be in them.
    for back in range(1, min(widest, longest)):
        wanted = tokens.gather(1, (lengths - back).clamp(min=0))
        repeats[:, back:] &= (tokens[:, : longest - back] == wanted) | (back >= sizes)
    # Placeholders of images may lie outside of the vocabulary.
    repeats &= tokens < logits.shape[1]
    return add_at(logits, torch.where(repeats, tokens.long(), -1), logits.new_full((rows, longest), NEVER))


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
