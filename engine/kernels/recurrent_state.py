"""The states of gated delta nets and short convolutions, which a request has beside keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from engine.kernels.paged import AttentionMetadata


@dataclass(frozen=True, slots=True)
class StateCache:
    """The states of one layer; one row per sequence that runs, in any order.

    It is built once, when the states are allocated, so launches need not check the layout. A sequence whose
    first new token is its first token starts from zero, whatever its row holds: rows are never cleared.

    Attributes:
        conv: ``(rows, conv_width - 1, channels)`` contiguous, in the model's dtype: the last inputs of the
            causal convolution, oldest first; zeros before a sequence's first token.
        recurrent: ``(rows, value_heads, key_dim, value_dim)`` contiguous float32: the sum that stands for all
            keys and values of a gated delta net; no value heads with a convolution alone.
    """

    conv: torch.Tensor
    recurrent: torch.Tensor
    #: As of :class:`~engine.kernels.paged.KVCache`.
    group: ClassVar[int] = 0

    def __post_init__(self) -> None:
        assert self.conv.is_contiguous() and self.recurrent.is_contiguous()
        assert len(self.conv) == len(self.recurrent) and self.recurrent.dtype == torch.float32


def first_tokens(meta: AttentionMetadata) -> torch.Tensor:
    """Mark the sequences whose new tokens begin with their first token: bool ``(S,)``."""
    return meta.seq_lens == meta.query_start.diff()
