"""The reference's results for a prompt: every number that an output of the engine can carry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from tests.engine.families.case import Inputs


class Expected:
    """The reference's numbers for one prompt.

    Args:
        inputs: the prompt as the reference takes it.
        steps: number of answer tokens.

    Attributes:
        ids: of the expanded prompt; None where an embedding row has no id of its own.
    """

    def __init__(self, inputs: Inputs, steps: int) -> None:
        self.inputs, self.steps = inputs, steps
        self.ids = inputs.ids
        self._forced: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        forget(self.inputs.model)
        with torch.inference_mode():
            out = self.inputs.model(**self.inputs.arguments, output_hidden_states=True, use_cache=False)
        return out.logits[0].float().log_softmax(-1), out.hidden_states[-1][0]

    @property
    def prompt_table(self) -> torch.Tensor:
        """Log-probabilities ``(T, vocabulary)``: row ``i`` is about the token after position ``i``."""
        return self._whole[0]

    @property
    def hidden(self) -> torch.Tensor:
        """Hidden states ``(T, hidden)`` after the final norm."""
        return self._whole[1]

    @cached_property
    def tokens(self) -> list[int]:
        """The greedy answer, whatever its tokens are."""
        return self._free[0]

    @cached_property
    def _free(self) -> tuple[list[int], torch.Tensor]:
        return self._generate(self.steps)

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._free[1].shape[1]

    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits ``(n, vocabulary)`` at each token of an answer that goes on with ``tokens``."""
        if list(tokens) == self.tokens[: len(tokens)]:
            return self._free[1][: len(tokens)]
        # Other ways of serving give the same answer.
        if tuple(tokens) not in self._forced:
            self._forced[tuple(tokens)] = self._generate(len(tokens), tokens)[1]
        return self._forced[tuple(tokens)]

    def table(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities at each token, as :meth:`logits`."""
        return self.logits(tokens).log_softmax(-1)

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the prompt's tokens but the first, and of an answer beginning with ``tokens``.

        NaN where an embedding row has no id of its own.
        """
        known = [0 if token is None else token for token in self.ids[1:]]
        table = torch.cat([self.prompt_table[: len(known)], self.table(tokens)])
        found = table.gather(1, torch.tensor([*known, *tokens])[:, None])[:, 0]
        found[[i for i, token in enumerate(self.ids[1:]) if token is None]] = math.nan
        return found

    @property
    def vector(self) -> torch.Tensor:
        """The last hidden state at length 1."""
        return self.hidden[-1] / self.hidden[-1].norm()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens at which the reference ends an answer."""
        stated = self.inputs.model.generation_config.eos_token_id
        return frozenset(stated if isinstance(stated, list) else [stated])

    def differs(self, other: Expected) -> bool:
        """Return whether an output can't be equal to both, be it an answer or a vector."""
        apart = bool((self.vector - other.vector).norm() > 0.01)
        if not hasattr(self.inputs.model, "generate"):
            return apart
        same = self.tokens == other.tokens and torch.allclose(
            self._chosen(), other._chosen(), atol=0.01, rtol=0
        )
        return apart and not same

    def _chosen(self) -> torch.Tensor:
        """Log-probabilities of the greedy answer's tokens."""
        tokens, logits = self._free
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def _generate(self, steps: int, tokens: Sequence[int] | None = None) -> tuple[list[int], torch.Tensor]:
        given = self.inputs.arguments
        forget(self.inputs.model)
        forced: dict[str, Any] = {}
        if tokens is not None:
            start = given["input_ids"].shape[1] if "input_ids" in given else 0
            forced["prefix_allowed_tokens_fn"] = lambda _, ids: [tokens[len(ids) - start]]
        with torch.inference_mode():
            out = self.inputs.model.generate(
                **given,
                max_new_tokens=steps,
                do_sample=False,
                # No token has this id: nothing ends the answer.
                eos_token_id=1 << 30,
                pad_token_id=0,
                use_cache=not _computes_again(self.inputs.model),
                output_logits=True,
                return_dict_in_generate=True,
                **forced,
            )
        return out.sequences[0, -steps:].tolist(), torch.cat(out.logits).float()


def _computes_again(model: torch.nn.Module) -> bool:
    """Return whether an answer may change the frequencies of all tokens before it, as with Phi-3's longrope.

    Some releases of Transformers keep the keys of the former frequencies in their cache.
    """
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return config.model_type == "phi3" and rope.get("rope_type") == "longrope"


def forget(model: torch.nn.Module) -> None:
    """Remove what the model has kept of its last prompt: offsets of positions, and stretched frequencies."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None
        if getattr(module, "rope_type", None) == "dynamic":
            module.inv_freq = module.original_inv_freq.clone()
            module.max_seq_len_cached = module.original_max_seq_len
