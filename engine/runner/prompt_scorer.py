"""Log-probabilities of prompt tokens."""

from __future__ import annotations

import torch

from engine.layers.decoder import Decoder
from engine.logprobs import LogprobTensors, prompt_logprobs
from engine.scheduling.batch import PrefillChunk

#: Rows whose logits are computed at once.
_ROWS = 512


class PromptScorer:
    """Scores prompt tokens, each from the hidden state of the token before it.

    Args:
        model: computes logits.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model

    def score(self, chunk: PrefillChunk, hidden: torch.Tensor) -> list[tuple[int, LogprobTensors]]:
        """Log-probabilities of the tokens that follow those of ``chunk`` in its request's prompt.

        Args:
            hidden: ``(count, H)``, hidden states of the chunk.

        Returns:
            Pairs of the index of a first token in the prompt and the values from there on.
        """
        request, after = chunk.request, chunk.start + 1
        wanted = request.params.prompt_logprobs
        assert wanted is not None
        targets = torch.tensor(
            request.token_ids[after : min(after + chunk.count, request.num_prompt)], device=hidden.device
        )
        scores = []
        for first in range(0, len(targets), _ROWS):
            ids = targets[first : first + _ROWS]
            logits = self._model.logits(hidden[first : first + len(ids)])
            scores.append((after + first, prompt_logprobs(logits, ids, wanted)))
        return scores
