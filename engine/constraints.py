"""Constraints on a request's tokens: those that contradict each other, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection

import numpy as np

from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

#: Characters of choices that are checked for a way to spell them, in milliseconds.
_CHECKED_CHOICES = 1024


def check_constraints(
    params: SamplingParams,
    vocab_size: int,
    stop_ids: Collection[int],
    eos_ids: Collection[int],
    first_mask: np.ndarray | None = None,
    can_spell: Callable[[str, frozenset[int]], bool] = lambda text, tokens: True,
) -> None:
    """Refuse a request whose constraints leave no token to begin with, or none to end with.

    Constraints can contradict each other later as well, which depends on the answer: see
    :func:`dead_end`.

    Args:
        stop_ids: tokens that ``min_tokens`` holds back.
        eos_ids: tokens that end an answer which follows a grammar.
        first_mask: (ceil(V / 32),) int32, tokens that the grammar lets an answer begin with, if it has one.
        can_spell: whether some of these tokens make up a text.

    Raises:
        InvalidRequest: naming a field.
    """
    allowed = np.full(vocab_size, params.allowed_token_ids is None)
    if params.allowed_token_ids is not None:
        allowed[params.allowed_token_ids] = True
    single = [ids[0] for ids in params.bad_sequences if len(ids) == 1]
    allowed[_inside([*params.suppress_tokens, *single], vocab_size)] = False
    _require(params, allowed, "allow no token at all")
    if params.min_tokens:
        held_back = allowed.copy()
        held_back[_inside(stop_ids, vocab_size)] = False
        _require(params, held_back, "allow no token but those that end the answer", "min_tokens")
    else:
        held_back = allowed
    first = held_back.copy()
    first[_inside(params.begin_suppress_tokens, vocab_size)] = False
    _require(params, first, "allow no token to begin with", "begin_suppress_tokens")
    if first_mask is not None and params.structured is not None:
        bits = np.unpackbits(first_mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)
        _require(params, first & bits, "allow no token that an answer can begin with", "structured")
        ends = np.zeros(vocab_size, bool)
        ends[_inside(eos_ids, vocab_size)] = True
        _require(params, allowed & ends, "allow no token that ends an answer, which a whole one needs")
        if params.structured.kind == "choice" and len(params.structured.text) <= _CHECKED_CHOICES:
            tokens, choices = frozenset(np.flatnonzero(allowed).tolist()), json.loads(params.structured.text)
            possible = np.array([can_spell(choice, tokens) for choice in choices])
            _require(params, possible, "allow none of the choices", "structured")


def dead_end(params: SamplingParams, num_tokens: int) -> str:
    """A sentence for an answer of ``num_tokens`` tokens after which no token may come."""
    names = constraint_names(params)
    if not names:
        return "The model gave no valid logits, so that no token could be chosen."
    words = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return (
        f"The answer can't go on: after {num_tokens} tokens, {words} "
        f"{'together allow' if len(names) > 1 else 'allows'} none that could come next. Relax one of them."
    )


def constraint_names(params: SamplingParams) -> list[str]:
    """The fields of ``params`` that keep tokens from being sampled."""
    names = [] if params.structured is None else ["structured"]
    names += ["allowed_token_ids"] if params.allowed_token_ids is not None else []
    fields = ("bad_words", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
    return names + [name for name in (*fields, "no_repeat_ngram_size", "min_tokens") if getattr(params, name)]


def _inside(tokens: Collection[int], vocab_size: int) -> list[int]:
    return [token for token in tokens if 0 <= token < vocab_size]


def _require(params: SamplingParams, allowed: np.ndarray, fault: str, param: str | None = None) -> None:
    if allowed.any():
        return
    names = constraint_names(params)
    words = ", ".join(names[:-1]) + f" and {names[-1]} together" if len(names) > 1 else names[0]
    raise InvalidRequest(f"{words} {fault}. Change one of them.", param=param or names[0])
