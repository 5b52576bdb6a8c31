"""Choosing the next token of every row: all parameters vectorised over the batch, all state on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from engine.kernels.gumbel import argmax, gumbel_argmax, mask_tokens
from engine.kernels.truncation import truncation_threshold
from engine.logprobs import LogprobTensors, compute_logprobs
from engine.runner import sampler_state as state
from engine.runner.draft_rows import DraftRows
from engine.runner.sampler_processors import (
    add_at,
    forbid_bad_words,
    forbid_early,
    forbid_repeated_ngrams,
    penalize,
)
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """The sampling steps that a set of slots needs, a union over its members. Hashable: a key of CUDA graphs.

    Attributes:
        random: some row isn't greedy.
        truncates: some random row has top-k, top-p or min-p.
        penalties: some row has a repetition, presence or frequency penalty.
        bitmask: some row bans tokens for its whole output.
        grammar: some row follows a grammar, so that :meth:`Sampler.sample` needs a mask.
        bias_width: most biased tokens of a row, rounded up to a power of two; 0 for none.
        early_width: most ids of a row that may come only later in its output, rounded up alike.
        bad_words_width: most bad words of several tokens of a row, rounded up alike.
        ngram_width: most tokens of the sequences that a row must not repeat, rounded up alike.
        num_logprobs: alternatives per token, rounded up to 0, 1, 5 or 20; -1 if no row wants any.
        wanted_width: most tokens whose log-probabilities a row wants by id, rounded up to a power of two.
    """

    random: bool = False
    truncates: bool = False
    penalties: bool = False
    bitmask: bool = False
    grammar: bool = False
    bias_width: int = 0
    early_width: int = 0
    bad_words_width: int = 0
    ngram_width: int = 0
    num_logprobs: int = -1
    wanted_width: int = 0

    @property
    def all_greedy(self) -> bool:
        return not self.random

    @property
    def processes(self) -> bool:
        """True if logits are changed before a token is taken: what a grammar bans is left out then, unless
        the thresholds of truncation depend on it."""
        return bool(
            self.penalties
            or self.bitmask
            or (self.grammar and self.truncates)
            or self.bias_width
            or self.early_width
            or self.bad_words_width
            or self.ngram_width
        )

    def __or__(self, other: SamplingPlan) -> SamplingPlan:
        return SamplingPlan(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


_PLAIN = SamplingPlan()


class Sampler:
    """Samples for slots that were admitted.

    State lives in rows of device tables, so that steady decode uploads nothing. Slot ``max_slots`` is for
    padded rows: greedy, without any feature. Counters advance on the device with every :meth:`sample`, hence
    a slot's tokens must be sampled in their order.

    Args:
        max_slots: slots are ``0 .. max_slots - 1``.
        vocab_size: width of the logits.
        device: where the logits are.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device | str) -> None:
        self.max_slots, self.vocab_size = max_slots, vocab_size
        self._states = state.SlotStates(max_slots, vocab_size, torch.device(device))
        # Plans are interned: a step of many rows must not hash a dataclass per row.
        self._plan_ids: dict[SamplingPlan, int] = {}
        self._plan_list: list[SamplingPlan] = []
        self._slot_plans = [self._intern(SamplingPlan())] * (max_slots + 1)
        self._unions: dict[frozenset[int], SamplingPlan] = {}

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        *,
        seed: int,
        stop_ids: frozenset[int],
    ) -> None:
        """Takes a slot for a sequence; uploaded by the next :meth:`flush`.

        Args:
            output_ids: what it has already generated, after a preemption.
            seed: int64; equal seeds give equal tokens.
            stop_ids: EOS and stop token ids, which ``min_tokens`` holds back.
        """
        assert 0 <= slot < self.max_slots
        self._states.write(slot, params, prompt_ids, output_ids, seed, stop_ids)
        self._slot_plans[slot] = self._intern(_plan_of(params, stop_ids, self.vocab_size))

    def release(self, slot: int) -> None:
        """Forgets a slot; it costs the device nothing."""
        self._states.forget(slot)
        self._slot_plans[slot] = self._slot_plans[self.max_slots]

    def flush(self) -> None:
        """Uploads the rows of all admissions since the last flush, one copy per table touched."""
        self._states.flush()

    def plan(self, slots: Sequence[int]) -> SamplingPlan:
        """The steps that these slots need."""
        members = frozenset([self._slot_plans[slot] for slot in slots])
        if members not in self._unions:
            if len(self._unions) >= 4096:
                self._unions.clear()
            self._unions[members] = reduce(
                SamplingPlan.__or__, [self._plan_list[i] for i in members], SamplingPlan()
            )
        return self._unions[members]

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        plan: SamplingPlan,
        *,
        grammar_mask: Tensor | None = None,
        drafts: DraftRows | None = None,
    ) -> Tensor:
        """One token per row, without host synchronisation; capturable in a CUDA graph.

        The order is vLLM's: masks (allowed and bad words, grammar, repeated sequences), bias, ``min_tokens``,
        penalties, temperature, min-p, top-k, top-p. Transformers applies min-p last.

        Args:
            logits: (N, V) float of any dtype; not changed.
            slots: (N,) int64 on the device.
            plan: :meth:`plan` of at least these slots.
            grammar_mask: (N, ceil(V / 32)) int32, all ones for rows without a grammar; given iff
                ``plan.grammar``.
            drafts: rows that verify drafts, several of a slot; for slots without bad words and without limits
                of repeated sequences. Only the tokens that hold are counted.

        Returns:
            (N,) int64; -1 where nothing is allowed.
        """
        assert logits.shape[1] == self.vocab_size and (grammar_mask is not None) == plan.grammar
        if plan.all_greedy and not (plan.processes or plan.grammar):
            return argmax(logits)
        floats, ints = self._states.floats.tensor[slots], self._states.ints.tensor[slots]
        if drafts is not None:
            ints[:, state.OUTPUT_LEN] += drafts.offsets
        if plan.processes:
            logits = self._process(logits, slots, plan, floats, ints, grammar_mask, drafts)
        if plan.all_greedy:
            tokens = argmax(logits, grammar_mask)
        else:
            temperature, threshold = floats[:, state.TEMPERATURE], None
            if plan.truncates:
                top_k, top_p, min_p = ints[:, state.TOP_K], floats[:, state.TOP_P], floats[:, state.MIN_P]
                threshold = truncation_threshold(logits, temperature, top_k, top_p, min_p)
            seeds, index = ints[:, state.SEED], ints[:, state.OUTPUT_LEN]
            tokens = gumbel_argmax(logits, temperature, seeds, index, threshold, grammar_mask)
        self._advance(slots, tokens, plan, drafts)
        return tokens

    def count(self, slots: Tensor, tokens: Tensor, plan: SamplingPlan) -> None:
        """Takes over ``tokens`` (N,) of outputs that were not sampled, by their ``slots``, both int64; a slot
        may come several times.

        For slots without bad words and without limits of repeated sequences.

        Args:
            plan: of the next tokens.
        """
        if plan.random or plan.early_width:
            self._states.ints.tensor[:, state.OUTPUT_LEN].index_add_(0, slots, torch.ones_like(slots))
        if plan.penalties:
            self._states.penalties.advance(slots, tokens, torch.ones_like(slots))

    def logprobs(
        self, logits: Tensor, slots: Tensor, sampled: Tensor, plan: SamplingPlan
    ) -> LogprobTensors | None:
        """Log-probabilities of raw ``logits`` (N, V), with ``plan.num_logprobs`` alternatives per row; other
        arguments as for :meth:`sample`, whose result is ``sampled``."""
        if plan.num_logprobs < 0:
            return None
        wanted = None
        if plan.wanted_width:
            wanted = self._states.wanted_ids.tensor[:, : plan.wanted_width][slots]
        return compute_logprobs(logits, sampled, plan.num_logprobs, wanted)

    def _process(
        self,
        logits: Tensor,
        slots: Tensor,
        plan: SamplingPlan,
        floats: Tensor,
        ints: Tensor,
        grammar_mask: Tensor | None,
        drafts: DraftRows | None,
    ) -> Tensor:
        states = self._states
        logits = logits.to(torch.float32, copy=True)
        if plan.bitmask:
            mask_tokens(logits, states.allowed.tensor[slots])
        if plan.bad_words_width:
            prefixes = states.bad_prefixes.tensor[:, : plan.bad_words_width][slots]
            last = states.bad_last.tensor[:, : plan.bad_words_width][slots]
            forbid_bad_words(logits, prefixes, last, states.recent.tensor[slots])
        if plan.bias_width:
            ids = states.bias_ids.tensor[:, : plan.bias_width][slots]
            add_at(logits, ids, states.bias_values.tensor[:, : plan.bias_width][slots])
        if plan.early_width:
            early_ids = states.early_ids.tensor[:, : plan.early_width][slots]
            until = states.early_until.tensor[:, : plan.early_width][slots]
            forbid_early(logits, early_ids, until, ints[:, state.OUTPUT_LEN])
        if plan.ngram_width:
            forbid_repeated_ngrams(logits, *states.history.of(slots), plan.ngram_width)
        if grammar_mask is not None and plan.truncates:
            mask_tokens(logits, grammar_mask)
        if plan.penalties:
            counts, seen = states.penalties.counts, states.penalties.prompt_seen
            assert counts is not None and seen is not None
            repetition, presence = floats[:, state.REPETITION], floats[:, state.PRESENCE]
            counts = counts[slots]
            if drafts is not None:
                counts.scatter_add_(1, *drafts.before)
            penalize(logits, counts, seen[slots], repetition, presence, floats[:, state.FREQUENCY])
        return logits

    def _advance(self, slots: Tensor, tokens: Tensor, plan: SamplingPlan, drafts: DraftRows | None) -> None:
        # Counters of slots that don't use a feature are never read, so skipping their update is safe.
        states = self._states
        amounts = torch.ones_like(slots) if drafts is None else drafts.held(tokens).long()
        if plan.random or plan.early_width:
            states.ints.tensor[:, state.OUTPUT_LEN].index_add_(0, slots, amounts)
        if not (plan.penalties or plan.bad_words_width or plan.ngram_width):
            return
        # A row without a token ends here; its index must stay inside its own row until then.
        tokens = tokens.clamp(min=0)
        if plan.penalties:
            states.penalties.advance(slots, tokens, amounts)
        if plan.ngram_width:
            states.history.advance(slots, tokens)
        if plan.bad_words_width:
            recent = states.recent.tensor
            shifted = torch.cat([recent[slots][:, 1:], tokens[:, None].to(recent.dtype)], dim=1)
            recent.index_copy_(0, slots, shifted)

    def _intern(self, plan: SamplingPlan) -> int:
        index = self._plan_ids.setdefault(plan, len(self._plan_list))
        if index == len(self._plan_list):
            self._plan_list.append(plan)
        return index


def _plan_of(params: SamplingParams, stop_ids: frozenset[int], vocab_size: int) -> SamplingPlan:
    early = state.early_tokens(params, stop_ids, vocab_size)
    if state.is_plain(params, early) and params.structured is None and params.logprobs is None:
        return _PLAIN
    random = not params.greedy
    return SamplingPlan(
        random=random,
        truncates=random and bool(params.top_k or params.top_p < 1.0 or params.min_p),
        penalties=state.penalizes(params),
        bitmask=state.has_bitmask(params),
        grammar=params.structured is not None,
        bias_width=_round_up(len(params.logit_bias)),
        early_width=_round_up(len(early)),
        bad_words_width=_round_up(len(state.long_bad_words(params))),
        ngram_width=_round_up(params.no_repeat_ngram_size),
        num_logprobs=-1
        if params.logprobs is None
        else next(k for k in (0, 1, 5, 20) if k >= params.logprobs),
        wanted_width=_round_up(len(params.logprob_token_ids)),
    )


def _round_up(width: int) -> int:
    return 1 << (width - 1).bit_length() if width else 0
