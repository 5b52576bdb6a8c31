"""Hidden states to one vector per request, one per token, or a score."""

from __future__ import annotations

import torch

from engine.layers.decoder import Decoder
from engine.scheduling.batch import PrefillChunk


class Pooler:
    """Pools hidden states *after* the decoder's final norm, in float32, over all chunks of a prompt.

    See :class:`engine.pooling_params.PoolingParams`.

    Args:
        model: projects hidden states, if it has vectors of a width of its own.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._partial: dict[int, torch.Tensor] = {}

    @property
    def slots(self) -> set[int]:
        """Slots whose prompts are pooled in part."""
        return set(self._partial)

    def release(self, slot: int) -> None:
        """Forget the partial result of a preempted or aborted request."""
        self._partial.pop(slot, None)

    def add(self, chunk: PrefillChunk, hidden: torch.Tensor) -> torch.Tensor | None:
        """Take in the chunk's hidden states ``(count, H)``.

        Returns:
            Once complete, the float32 vector ``(W,)``; with ``all`` the vectors ``(tokens, W)``. ``W`` is
            the model's hidden size or ``projected_width``, or 1 for a score.
        """
        params = chunk.request.pooling
        assert params is not None
        if params.between is not None:
            return self._model.logit_gap(hidden[-1:], *params.between)[0] if chunk.completes else None
        vector = self._vector(chunk, hidden, params.pooling)
        if vector is not None and params.normalize:
            vector = torch.nn.functional.normalize(vector, dim=-1)
        return vector

    def _vector(self, chunk: PrefillChunk, hidden: torch.Tensor, kind: str) -> torch.Tensor | None:
        if kind == "last":
            return self._model.vectors(hidden[-1:])[0].float() if chunk.completes else None
        hidden = self._model.vectors(hidden)
        # Copies: the hidden states are the step's own.
        if kind == "all":
            states = hidden.to(torch.float32, copy=True)
            self._partial[chunk.slot] = (
                states if chunk.start == 0 else torch.cat([self._partial[chunk.slot], states])
            )
        elif kind == "cls":
            if chunk.start == 0:
                self._partial[chunk.slot] = hidden[0].to(torch.float32, copy=True)
        else:
            total = hidden.float().sum(dim=0)
            if chunk.start > 0:
                total += self._partial[chunk.slot]
            self._partial[chunk.slot] = total
        if not chunk.completes:
            return None
        vector = self._partial.pop(chunk.slot)
        return vector / (chunk.start + chunk.count) if kind == "mean" else vector
