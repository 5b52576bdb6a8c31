"""Computes the tokens that may come next in an answer that follows a grammar."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

import llguidance
import numpy as np

from engine.structured.numbers import DigitBound
from engine.structured.run_odds import RunForecast, RunOdds

#: Seconds of computing masks that other threads don't shorten: to wake them takes milliseconds on a busy
#: host.
_ALONE_S = 2e-3
#: Texts of a grammar that must follow somewhere, of which it is kept how many tokens are taken together.
_MOST_TEXTS = 1024
#: Tokens that are forced in one go, and before the first sampled one. llguidance looks at all of the rest of
#: a text behind each one, so a long text would hold up the engine, or the event loop.
_MOST_FORCED, _MOST_OPENING = 256, 64


class GrammarMatcher:
    """The position of one sequence in a grammar. Not thread-safe.

    Once EOS was accepted, only EOS may follow, and any number of them. After an error nothing may follow, not
    even EOS: an answer that breaks off must not look like a whole one.

    Args:
        grammar: the one that is followed.
        matcher: llguidance's, which becomes this one's own.

    Attributes:
        forecast: whether forced tokens will follow the next one.
    """

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._eos_ids, self._digits = grammar.eos_ids, grammar.digits
        # After each accepted token, as the bound of digits gives it.
        self._states = [0]
        # EOS is counted here, since the library doesn't roll it back like other tokens.
        self._num_eos = 0
        self.forecast = RunForecast(grammar.run_odds)

    @property
    def is_finished(self) -> bool:
        """True if nothing but EOS may follow."""
        return self._num_eos > 0 or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def is_complete(self) -> bool:
        """True if the accepted tokens fulfil the grammar as they stand."""
        return self.error is None and self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why no token may follow (one was not allowed, none can go on, or a limit was hit), or None."""
        return self._matcher.get_error() if self._matcher.is_error() else None

    @property
    def _needs_mask(self) -> bool:
        return not (self._num_eos or self._matcher.is_error())

    def fill_mask(self, row: np.ndarray) -> None:
        """Writes which tokens may come next; none after an error.

        Args:
            row: (ceil(V / 32),) int32, contiguous; bit ``id % 32`` of word ``id // 32``.
        """
        assert row.dtype == np.int32 and row.flags["C_CONTIGUOUS"]
        if self._needs_mask:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._overwrite(row)

    def _overwrite(self, row: np.ndarray) -> None:
        """Narrow a mask to preferred tokens, or write the mask of a sequence that has ended. Computing a mask
        can lead to an error, too; llguidance allows EOS then."""
        if self._needs_mask:
            bound = None if self._digits is None else self._digits.mask(self._states[-1], row)
            if bound is not None:
                _narrow(row, bound)
            if self._grammar.preferred is not None:
                _narrow(row, self._grammar.preferred)
            return
        row[:] = 0
        if not self._matcher.is_error():
            words = row.view(np.uint32)
            for token in self._eos_ids:
                words[token // 32] |= np.uint32(1 << (token % 32))

    @staticmethod
    def fill_masks(matchers: Sequence[tuple[GrammarMatcher, int]], mask: np.ndarray) -> None:
        """:meth:`fill_mask` for some rows of ``mask`` (N, ceil(V / 32)) int32, in parallel on all cores where
        one would take longer than :data:`_ALONE_S`.

        Args:
            matchers: each with the index of its row.
        """
        assert mask.dtype == np.int32 and mask.flags["C_CONTIGUOUS"]
        live = [(matcher._matcher, row) for matcher, row in matchers if matcher._needs_mask]
        start, width, begun = mask.ctypes.data, mask.strides[0], time.perf_counter()
        for index, (matcher, row) in enumerate(live):
            # The rows so far tell how long the others will take.
            if index and (time.perf_counter() - begun) / index * (len(live) - index) > _ALONE_S:
                executor = matchers[0][0]._grammar.executor
                executor.unsafe_compute_mask_ptr(live[index:], start, width, mask.shape[0])
                break
            matcher.unsafe_compute_mask_ptr(start + row * width, width)
        for owner, row in matchers:
            owner._overwrite(mask[row])

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Follows these tokens. False if one of them isn't allowed, which ends the matcher's use."""
        for token in token_ids:
            if token in self._eos_ids and self.is_complete:
                self._num_eos += 1
            elif self._num_eos or not self._matcher.consume_token(token):
                return False
            elif self._digits is not None:
                self._states.append(self._digits.after(self._states[-1], token))
        return True

    def force(self, most: int, excluded: Container[int]) -> list[int]:
        """Accept and return the next tokens, as long as a mask would allow a single one: at most ``most``,
        and none of ``excluded`` or from there on.

        llguidance then leaves no choice between several ways to spell the text that must follow: a mask
        allows the tokens that the tokenizer itself makes of it.
        """
        tokens: list[int] = []
        if not self._needs_mask:
            return tokens
        most = min(most, _MOST_FORCED)
        while len(tokens) < most and (found := self._matcher.compute_ff_tokens()):
            found = found[: most - len(tokens)]
            found = found[: self._num_sure(found)]
            taken = list(takewhile(lambda token: token not in excluded and token not in self._eos_ids, found))
            if not (taken and self._matcher.consume_tokens(taken)):
                break
            if self._digits is not None:
                self._states += accumulate(taken, self._digits.after, initial=self._states.pop())
            tokens += taken
            if len(taken) < len(found):
                break
        return tokens

    def open(self, most: int, excluded: Container[int]) -> list[int]:
        """:meth:`force`, before the first token is sampled."""
        if tokens := self.force(min(most, _MOST_OPENING), excluded):
            self.forecast.sampled(tokens[-1], tokens)
        return tokens

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end the sequence, if no others may follow; none if others may."""
        return self._eos_ids if self.is_finished else frozenset()

    def _num_sure(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens that must follow can be taken together: those that must also follow
        when llguidance is asked again behind each one, as for masks. The tokenizer may cut the rest of a text
        in another way. That depends on the text alone, so the number is kept."""
        kept = self._grammar.sure
        if len(tokens) == 1 or kept is None:
            return 1
        key = (*tokens, self._matcher.compute_ff_bytes())
        # Several threads read and write it.
        known = kept.get(key)
        if known is None:
            if len(kept) >= _MOST_TEXTS:
                kept.clear()
            copy, count = self._matcher.deep_copy(), 1
            while count < len(tokens) and copy.consume_token(tokens[count - 1]):
                if copy.compute_ff_tokens()[:1] != [tokens[count]]:
                    break
                count += 1
            known = kept[key] = count
        return known

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last tokens accepted, all of which were allowed."""
        num_eos = min(num_tokens, self._num_eos)
        self._num_eos -= num_eos
        if num_tokens > num_eos:
            done = self._matcher.rollback(num_tokens - num_eos)
            assert done, "rolled back more tokens than were accepted"
            if self._digits is not None:
                del self._states[num_eos - num_tokens :]

    def clone(self) -> GrammarMatcher:
        """An independent matcher in the same state."""
        copy = GrammarMatcher(self._grammar, self._matcher.deep_copy())
        copy._num_eos, copy._states = self._num_eos, list(self._states)
        return copy


def _narrow(row: np.ndarray, wanted: np.ndarray) -> None:
    """Leave only ``wanted`` tokens in a mask, unless none would be left."""
    if (narrowed := row & wanted).any():
        row[:] = narrowed


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar, shared by all sequences that follow it.

    Attributes:
        start: a matcher at the start.
        eos_ids: tokens that end a sequence.
        executor: computes masks in parallel.
        preferred: a row of a mask: other tokens may come only where none of these may. None for all tokens.
        digits: bounds numbers, where answers are or hold JSON.
        run_odds: learned from the sequences.
        sure: how many tokens of a text that must follow are taken together, learned from them as well; None
            if they are taken one by one.
    """

    start: llguidance.LLMatcher
    eos_ids: frozenset[int]
    executor: llguidance.LLExecutor
    preferred: np.ndarray | None = None
    digits: DigitBound | None = None
    run_odds: RunOdds = field(default_factory=RunOdds)
    sure: dict[tuple, int] | None = field(default_factory=dict)

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start; microseconds."""
        return GrammarMatcher(self, self.start.deep_copy())

    def first_mask(self, vocab_size: int) -> np.ndarray:
        """(ceil(V / 32),) int32: the tokens that an answer may begin with. Milliseconds."""
        mask = np.zeros((vocab_size + 31) // 32, np.int32)
        self.matcher().fill_mask(mask)
        return mask
