"""The sampler's state by slot: tables on the device, of which each admission writes a few rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.runner.token_history import TokenHistory
from engine.sampling_params import (
    MAX_BAD_SEQUENCES,
    MAX_BAD_WORD_TOKENS,
    MAX_BEGIN_SUPPRESS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from engine.transfers import upload_together

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
SEED, OUTPUT_LEN, TOP_K = range(3)

# EOS and stop ids under ``min_tokens``, and tokens that the output may not begin with.
EARLY_WIDTH = 2 * MAX_STOP_TOKEN_IDS + MAX_BEGIN_SUPPRESS
BAD_PREFIX = MAX_BAD_WORD_TOKENS - 1


class SlotTensor:
    """A device tensor with one row per slot whose rows are written from the host, all pending ones at once.

    Allocated when the first row is flushed and never moved after, so that captured graphs may point to it.
    """

    def __init__(self, num_rows: int, row: np.ndarray, device: torch.device) -> None:
        """``row`` is what a slot holds unless written, and gives the shape and dtype of rows."""
        self._num_rows, self._default, self._device = num_rows, row, device
        self._pending: dict[int, np.ndarray] = {}
        self._written: set[int] = set()
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """(num_rows, *row.shape); something must have been flushed."""
        assert self._tensor is not None
        return self._tensor

    def write(self, slot: int, row: np.ndarray) -> None:
        """Set a row; a shorter ``row`` is padded with the default."""
        full = self._default.copy()
        full[tuple(slice(0, size) for size in row.shape)] = row
        self._pending[slot] = full
        self._written.add(slot)

    def reset(self, slot: int) -> None:
        """Set a row back to the default; does nothing if the row was never written."""
        if slot in self._written:
            self._pending[slot] = self._default
            self._written.discard(slot)

    def forget(self, slot: int) -> None:
        """Drop a pending row; the device's row is reset later."""
        if self._pending.pop(slot, None) is not None:
            self._written.add(slot)

    def flush(self) -> None:
        if not self._pending:
            return
        if self._tensor is None:
            default = torch.from_numpy(self._default).to(self._device)
            self._tensor = default.expand(self._num_rows, *default.shape).clone()
        written = np.fromiter(self._pending, dtype=np.int64), np.stack(list(self._pending.values()))
        slots, rows = upload_together(written, self._device)
        self._tensor.index_copy_(0, slots, rows)
        self._pending.clear()


class PenaltyCounts:
    """Tokens in each slot's prompt, and their counts in its output, ``(num_slots, V)`` each.

    Allocated at the first use.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_rows, vocab_size), device
        self._pending: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.counts: Tensor | None = None
        self.prompt_seen: Tensor | None = None

    def write(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        prompt = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        output, counts = np.unique(np.asarray(output_ids, dtype=np.int64), return_counts=True)
        # Placeholders of images may lie outside of the vocabulary; they have no logit to penalise.
        prompt = prompt[(prompt >= 0) & (prompt < self._shape[1])]
        self._pending[slot] = prompt, output, counts.astype(np.int32)

    def forget(self, slot: int) -> None:
        """Drop what waits to be written for a slot."""
        self._pending.pop(slot, None)

    def flush(self) -> None:
        if not self._pending:
            return
        if self.counts is None or self.prompt_seen is None:
            self.counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self.prompt_seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        prompt, output, counts = [], [], []
        for slot, (prompt_ids, output_ids, output_counts) in self._pending.items():
            prompt.append(slot * self._shape[1] + prompt_ids)
            output.append(slot * self._shape[1] + output_ids)
            counts.append(output_counts)
        written = (np.fromiter(self._pending, dtype=np.int64), *map(np.concatenate, (prompt, output, counts)))
        slots, prompt_at, output_at, given = upload_together(written, self._device)
        self.counts.index_fill_(0, slots, 0)
        self.prompt_seen.index_fill_(0, slots, False)
        self.prompt_seen.view(-1).index_fill_(0, prompt_at, True)
        self.counts.view(-1).index_copy_(0, output_at, given)
        self._pending.clear()

    def advance(self, slots: Tensor, tokens: Tensor, amounts: Tensor) -> None:
        """Counts output tokens (N,) of slots (N,), each ``amounts`` (N,) times; all int64."""
        assert self.counts is not None
        self.counts.view(-1).index_add_(0, slots * self._shape[1] + tokens, amounts.int())


class SlotStates:
    """All tables of the sampler. Rows ``0 .. max_slots - 1`` are slots, the last one is for padded rows.

    Attributes:
        floats: (R, 6) float32, columns by the constants of this module; temperature 0 is greedy.
        ints: (R, 3) int64.
        early_ids, early_until: (R, 384) int64, see ``forbid_early``; -1 and 0 where there is none.
        bias_ids, bias_values: (R, 1024) int64, -1 where there is none, and float32.
        allowed: (R, ceil(V / 32)) int32 bitmask.
        bad_prefixes, bad_last: (R, 128, 15) int32 and (R, 128) int64, see ``forbid_bad_words``.
        recent: (R, 15) int32, latest tokens of the slots that have bad words.
        wanted_ids: (R, 512) int64, tokens whose log-probabilities are wanted; 0 where there is none.
    """

    def __init__(self, max_slots: int, vocab_size: int, device: torch.device) -> None:
        rows = max_slots + 1
        self.vocab_size = vocab_size

        def table(*shape: int, fill: float, dtype: type) -> SlotTensor:
            return SlotTensor(rows, np.full(shape, fill, dtype=dtype), device)

        self.floats = SlotTensor(rows, np.array([0, 1, 0, 1, 0, 0], dtype=np.float32), device)
        self.ints = table(3, fill=0, dtype=np.int64)
        self.early_ids = table(EARLY_WIDTH, fill=-1, dtype=np.int64)
        self.early_until = table(EARLY_WIDTH, fill=0, dtype=np.int64)
        self.bias_ids = table(MAX_LOGIT_BIAS, fill=-1, dtype=np.int64)
        self.bias_values = table(MAX_LOGIT_BIAS, fill=0, dtype=np.float32)
        self.allowed = table((vocab_size + 31) // 32, fill=-1, dtype=np.int32)
        self.bad_prefixes = table(MAX_BAD_SEQUENCES, BAD_PREFIX, fill=-1, dtype=np.int32)
        self.bad_last = table(MAX_BAD_SEQUENCES, fill=-1, dtype=np.int64)
        self.recent = table(BAD_PREFIX, fill=-2, dtype=np.int32)
        self.wanted_ids = table(MAX_LOGPROB_TOKEN_IDS, fill=0, dtype=np.int64)
        self.penalties = PenaltyCounts(rows, vocab_size, device)
        self.history = TokenHistory(rows, device)
        # Slots whose rows may differ from those of a greedy request, and slots whose rows wait for a flush.
        self._special: set[int] = set()
        self._waiting: set[int] = set()
        self._tables = (
            *(self.floats, self.ints, self.early_ids, self.early_until, self.bias_ids, self.bias_values),
            *(self.allowed, self.bad_prefixes, self.bad_last, self.recent, self.wanted_ids),
            *(self.penalties, self.history),
        )
        # The padded row, and every slot before its first admission, must exist.
        self.floats.write(max_slots, np.empty(0, dtype=np.float32))
        self.ints.write(max_slots, np.empty(0, dtype=np.int64))
        self._waiting.add(max_slots)
        self.flush()

    def write(
        self,
        slot: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        seed: int,
        stop_ids: frozenset[int],
    ) -> None:
        """Buffers everything of one admission."""
        early = early_tokens(params, stop_ids, self.vocab_size)
        if is_plain(params, early):
            if slot not in self._special:
                return
            self._special.discard(slot)
        else:
            self._special.add(slot)
        self._waiting.add(slot)
        if params.greedy and not early and not penalizes(params):
            # Only the temperature of such rows is read.
            self.floats.reset(slot)
            self.ints.reset(slot)
        else:
            temperature = 0.0 if params.greedy else params.temperature
            floats = [temperature, params.top_p, params.min_p, params.repetition_penalty]
            floats += [params.presence_penalty, params.frequency_penalty]
            self.floats.write(slot, np.array(floats, dtype=np.float32))
            top_k = params.top_k if 0 < params.top_k < self.vocab_size else 0
            self.ints.write(slot, np.array([seed, len(output_ids), top_k], dtype=np.int64))
        if early:
            self.early_ids.write(slot, np.array(list(early), dtype=np.int64))
            self.early_until.write(slot, np.array(list(early.values()), dtype=np.int64))
        else:
            self.early_ids.reset(slot)
        self._write_bias(slot, params)
        self._write_allowed(slot, params)
        if params.logprob_token_ids:
            self.wanted_ids.write(slot, np.array(params.logprob_token_ids, dtype=np.int64))
        tokens = [*prompt_ids, *output_ids] if params.no_repeat_ngram_size else ()
        self.history.write(slot, params.no_repeat_ngram_size, tokens)
        self._write_bad_words(slot, params, [*prompt_ids[-BAD_PREFIX:], *output_ids[-BAD_PREFIX:]])
        if penalizes(params):
            self.penalties.write(slot, prompt_ids, output_ids)

    def flush(self) -> None:
        """Write all admissions since the last flush, one copy per table touched."""
        if not self._waiting:
            return
        for table in self._tables:
            table.flush()
        self._waiting.clear()

    def forget(self, slot: int) -> None:
        """Drop what waits to be written for a slot, because of a flush that raised."""
        if slot not in self._waiting:
            return
        self._waiting.discard(slot)
        self._special.add(slot)
        for table in self._tables:
            table.forget(slot)

    def _write_bias(self, slot: int, params: SamplingParams) -> None:
        if not params.logit_bias:
            self.bias_ids.reset(slot)
            self.bias_values.reset(slot)
            return
        self.bias_ids.write(slot, np.array(list(params.logit_bias), dtype=np.int64))
        self.bias_values.write(slot, np.array(list(params.logit_bias.values()), dtype=np.float32))

    def _write_allowed(self, slot: int, params: SamplingParams) -> None:
        if not has_bitmask(params):
            self.allowed.reset(slot)
            return
        bits = np.zeros(((self.vocab_size + 31) // 32) * 32, dtype=np.uint8)
        bits[: self.vocab_size] = params.allowed_token_ids is None
        if params.allowed_token_ids is not None:
            bits[params.allowed_token_ids] = 1
        banned = [token for token in suppressed_tokens(params) if 0 <= token < self.vocab_size]
        bits[banned] = 0
        self.allowed.write(slot, np.packbits(bits, bitorder="little").view(np.int32))

    def _write_bad_words(self, slot: int, params: SamplingParams, latest: Sequence[int]) -> None:
        words = long_bad_words(params)
        if not words:
            self.bad_prefixes.reset(slot)
            self.bad_last.reset(slot)
            return
        prefixes = np.full((len(words), BAD_PREFIX), -1, dtype=np.int32)
        for row, word in zip(prefixes, words, strict=True):
            row[BAD_PREFIX - len(word) + 1 :] = word[:-1]
        self.bad_prefixes.write(slot, prefixes)
        self.bad_last.write(slot, np.array([word[-1] for word in words], dtype=np.int64))
        recent = np.full(BAD_PREFIX, -2, dtype=np.int32)
        if tail := list(latest[-BAD_PREFIX:]):
            recent[-len(tail) :] = tail
        self.recent.write(slot, recent)


def is_plain(params: SamplingParams, early: dict[int, int]) -> bool:
    """Return True for a greedy request whose tokens nothing but the logits decides: it reads no table.

    Args:
        early: its :func:`early_tokens`.
    """
    limited = early or params.logit_bias or params.bad_sequences or params.no_repeat_ngram_size
    return params.greedy and not (
        limited or params.logprob_token_ids or has_bitmask(params) or penalizes(params)
    )


def penalizes(params: SamplingParams) -> bool:
    """Return True if any penalty is on."""
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def has_bitmask(params: SamplingParams) -> bool:
    """Return True if some ids are banned for the whole output."""
    if params.allowed_token_ids is not None or params.suppress_tokens:
        return True
    return any(len(word) == 1 for word in params.bad_sequences)


def suppressed_tokens(params: SamplingParams) -> list[int]:
    """Ids that are banned for the whole output; some may lie outside of the vocabulary."""
    return [*params.suppress_tokens, *(word[0] for word in params.bad_sequences if len(word) == 1)]


def early_tokens(params: SamplingParams, stop_ids: Collection[int], vocab_size: int) -> dict[int, int]:
    """Ids that may come only later, each with the length of the output from which on it may."""
    early = {token: 1 for token in params.begin_suppress_tokens if 0 <= token < vocab_size}
    if params.min_tokens:
        early |= dict.fromkeys(sorted(stop_ids), params.min_tokens)
    return early


def long_bad_words(params: SamplingParams) -> list[list[int]]:
    """Bad words whose ban depends on the tokens before."""
    return [word for word in params.bad_sequences if len(word) > 1]
