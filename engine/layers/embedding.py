"""Token embedding and output projection; their tables are split over ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Container

import torch
import torch.nn.functional as F
from torch import nn

from engine.kernels.dispatch import linear
from engine.kernels.shard_rows import shard_rows
from engine.layers.build import BuildContext, WeightSlot

#: So low that a token's probability is 0 at any temperature of use; finite, as JSON has no other numbers.
NEVER = -1e30


class VocabTable(nn.Module):
    """This rank's rows of a ``(vocab_size, width)`` table, from ``rank * rows`` on; zero beyond its end.

    Args:
        apart: trailing rows that the checkpoint may hold in a tensor of their own, ``further``, or that it
            lacks.
    """

    def __init__(self, vocab_size: int, width: int, build: BuildContext, *, apart: int = 0) -> None:
        super().__init__()
        self.tp = build.tp
        self.vocab_size, self.apart = vocab_size, apart
        self.rows = -(-vocab_size // build.tp.size)
        self.start = min(build.tp.rank * self.rows, vocab_size)
        self.count = min(self.rows, vocab_size - self.start)
        self.weight = build.parameter(self.rows, width)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        whole = self.vocab_size - self.apart
        self.weight.data[max(0, min(self.count, whole - self.start)) :].zero_()
        slots = [self._slot(prefix + "weight", 0, whole)]
        if prefix + "further" in names:
            slots.append(self._slot(prefix + "further", whole, self.apart))
        return slots

    def _slot(self, source: str, first: int, count: int) -> WeightSlot:
        """The slot of a tensor with ``count`` rows of the table, from ``first`` on."""
        stop, width = first + count, self.weight.shape[1]
        begin = min(max(self.start, first), stop)
        end = max(begin, min(self.start + self.count, stop))
        region = slice(begin - first, end - first), slice(0, width)
        target = self.weight.data[begin - self.start : end - self.start]
        return WeightSlot(source, (count, width), [(region, target)])


class VocabEmbedding(VocabTable):
    """Maps token ids ``(T,)`` to embeddings ``(T, width)``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        return self.tp.all_reduce(shard_rows(self.weight, ids, self.start, self.count))


class LMHead(VocabTable):
    """Maps hidden states ``(N, width)`` to logits ``(N, vocab_size)`` on every rank, in the model's dtype.

    Args:
        tied: the embedding whose table is used; None for a table of its own.
        unpredicted: trailing tokens that no answer has: their logits are :data:`NEVER`, or the least
            number of the dtype.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        build: BuildContext,
        *,
        tied: VocabEmbedding | None = None,
        unpredicted: int = 0,
    ) -> None:
        super().__init__(0 if tied else vocab_size, width, build, apart=unpredicted)
        self.vocab_size = vocab_size
        self.tied = tied is not None
        if tied is not None:
            self.weight = tied.weight
            self.rows, self.start, self.count = tied.rows, tied.start, tied.count

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self.weight)
        if self.tp.size > 1:
            logits = self.tp.all_gather(logits)[..., : self.vocab_size]
        if self.apart:
            logits[..., self.vocab_size - self.apart :] = max(NEVER, torch.finfo(logits.dtype).min)
        return logits

    def gap(self, hidden: torch.Tensor, first: int, second: int) -> torch.Tensor:
        """The logit of the token ``first`` minus that of ``second``, float32 ``(N, 1)`` on every rank.

        Only the two tokens' rows of the table are read. Their difference is formed before the product, as the
        scripts of Qwen's rerankers do.
        """
        row = torch.zeros_like(hidden[0], dtype=torch.float32)
        for token, sign in ((first, 1.0), (second, -1.0)):
            local = token - self.start
            if 0 <= local < self.count:
                row += sign * self.weight[local].float()
        gap = hidden.float() @ row[:, None]
        return gap if self.tp.size == 1 else self.tp.all_reduce(gap)

    def weight_slots(self, prefix: str, names: Container[str]) -> list[WeightSlot]:
        return [] if self.tied else super().weight_slots(prefix, names)
