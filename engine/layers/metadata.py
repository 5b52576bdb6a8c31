"""What attention must know about a batch, passed explicitly through every forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """One batch of ``S`` sequences whose ``T`` new tokens are concatenated.

    Attributes:
        block_tables: ``(S, max_blocks)`` int32, KV blocks of each sequence in order; entries beyond its
            length are never read.
        query_start: ``(S + 1,)`` int32, where each sequence's new tokens begin among the ``T``.
        seq_lens: ``(S,)`` int32, tokens of each sequence once this batch is written.
        slot_mapping: ``(T,)`` int64, ``block * block_size + offset`` for each new token; negative is skipped.
        max_query_len: at least the most new tokens of one sequence; a host integer. With 1, each has one.
        max_seq_len: at least the longest of ``seq_lens``; a host integer.
        arrivals: see :func:`~engine.kernels.decode_attention.decode_attention`.
    """

    block_tables: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    max_seq_len: int
    arrivals: torch.Tensor | None = None
