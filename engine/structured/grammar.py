"""From a JSON schema, regex, list of choices or grammar to the tokens that may come next."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np
from tokenizers import Tokenizer

from engine.errors import InvalidRequest, Overloaded
from engine.sampling_params import StructuredSpec, structured_param
from engine.structured.checks import check_spec, refusal
from engine.structured.prober import LIMITS, GrammarProber, GrammarRefused

_REFUSAL_SECONDS = 60.0
_MAX_PENDING = 64


class GrammarMatcher:
    """How far one sequence has followed a grammar. Not thread-safe.

    Once EOS was accepted, only EOS may follow, and any number of them.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, eos_ids: frozenset[int], executor: llguidance.LLExecutor
    ) -> None:
        self._matcher, self._eos_ids, self._executor = matcher, eos_ids, executor
        # EOS is counted here, since the library doesn't roll it back like other tokens.
        self._num_eos = 0

    @property
    def is_finished(self) -> bool:
        """Whether nothing but EOS may follow."""
        return self._num_eos > 0 or self._matcher.is_stopped()

    @property
    def _ended(self) -> bool:
        return self._num_eos > 0 or self._matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """Whether what was accepted fulfils the grammar as it stands."""
        return self.error is None and self._matcher.is_accepting()

    @property
    def error(self) -> str | None:
        """Why masks can't be computed any more (a token was not allowed, or a limit was hit), or None."""
        return self._matcher.get_error() if self._matcher.is_error() else None

    def fill_mask(self, row: np.ndarray) -> None:
        """Writes which tokens may come next.

        Args:
            row: (ceil(V / 32),) int32, contiguous; bit ``id % 32`` of word ``id // 32``. After an error only
                EOS is set, so that the sequence ends.
        """
        assert row.dtype == np.int32 and row.flags["C_CONTIGUOUS"]
        if not self._ended:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        # Computing a mask can hit a limit, too.
        if self._ended:
            words = row.view(np.uint32)
            words[:] = 0
            for token in self._eos_ids:
                words[token // 32] |= np.uint32(1 << (token % 32))

    @staticmethod
    def fill_masks(matchers: Sequence[tuple[GrammarMatcher, int]], mask: np.ndarray) -> None:
        """:meth:`fill_mask` for some rows of ``mask`` (N, ceil(V / 32)) int32, in parallel on all cores.

        Args:
            matchers: each with the index of its row.
        """
        assert mask.dtype == np.int32 and mask.flags["C_CONTIGUOUS"]
        live = [(matcher._matcher, row) for matcher, row in matchers if not matcher._ended]
        if len(live) > 1:
            executor = matchers[0][0]._executor
            executor.unsafe_compute_mask_ptr(live, mask.ctypes.data, mask.strides[0], mask.shape[0])
        for matcher, row in matchers:
            if len(live) <= 1 or matcher._ended:
                matcher.fill_mask(mask[row])

    def accept(self, token_ids: Sequence[int]) -> bool:
        """Follows these tokens. False if one of them isn't allowed, which ends the matcher's use: only EOS is
        ever allowed after that."""
        for token in token_ids:
            if token in self._eos_ids and self.is_complete:
                self._num_eos += 1
            elif self._num_eos or not self._matcher.consume_token(token):
                return False
        return True

    def rollback(self, num_tokens: int) -> None:
        """Forgets the last tokens accepted, all of which were allowed."""
        num_eos = min(num_tokens, self._num_eos)
        self._num_eos -= num_eos
        if num_tokens > num_eos:
            done = self._matcher.rollback(num_tokens - num_eos)
            assert done, "rolled back more tokens than were accepted"

    def clone(self) -> GrammarMatcher:
        """An independent matcher in the same state."""
        copy = GrammarMatcher(self._matcher.deep_copy(), self._eos_ids, self._executor)
        copy._num_eos = self._num_eos
        return copy


class Grammar:
    """A compiled grammar, shared by all sequences that follow it."""

    def __init__(
        self, matcher: llguidance.LLMatcher, eos_ids: frozenset[int], executor: llguidance.LLExecutor
    ) -> None:
        self._initial, self._eos_ids, self._executor = matcher, eos_ids, executor

    def matcher(self) -> GrammarMatcher:
        """A matcher at the start; microseconds."""
        return GrammarMatcher(self._initial.deep_copy(), self._eos_ids, self._executor)


class GrammarCompiler:
    """Compiles structured specs, within limits of size, time and memory, and keeps the latest.

    A grammar that isn't in the cache is first tried out in a helper process that is killed when it exceeds
    its limits, so that no spec can slow down, bloat or crash this process.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``, or the JSON of one.
        vocab_size: width of the logits; ids without a token are never allowed.
        eos_ids: tokens that end a sequence; they may follow a complete answer only.
        cache_size: compiled grammars kept.
        time_limit: seconds that one grammar may take.
        processes: grammars compiled at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | str,
        vocab_size: int,
        eos_ids: Iterable[int],
        *,
        cache_size: int = 128,
        time_limit: float = 5.0,
        processes: int = 2,
    ) -> None:
        self._backend = tokenizer
        self._vocab_size, self._eos_ids = vocab_size, frozenset(eos_ids)
        self._cache_size, self._time_limit, self._processes = cache_size, time_limit, processes
        self._cache: OrderedDict[StructuredSpec, Grammar] = OrderedDict()
        self._refusals: OrderedDict[StructuredSpec, tuple[float, str]] = OrderedDict()
        self._pending: dict[StructuredSpec, Future[Grammar]] = {}
        self._executor = llguidance.LLExecutor()
        self._lock, self._setup_lock = threading.Lock(), threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._prober: GrammarProber | None = None
        # Threads wait for helper processes; some more of them, so that the checks of sizes never do.
        self._threads = ThreadPoolExecutor(processes + 2, thread_name_prefix="grammar")

    def compile(self, spec: StructuredSpec) -> Grammar:
        """The grammar of ``spec``; waits unless it is in the cache.

        Raises:
            InvalidRequest: the spec is malformed, unsupported, too large or too complex.
            Overloaded: too many others are being compiled.
        """
        return self._lookup(spec) or self._submit(spec).result()

    async def compile_async(self, spec: StructuredSpec) -> Grammar:
        """Like :meth:`compile`, without blocking the event loop."""
        if grammar := self._lookup(spec):
            return grammar
        # Others may wait for the same future, hence it outlives a caller that goes away.
        return await asyncio.shield(asyncio.wrap_future(self._submit(spec)))

    def close(self) -> None:
        """Ends threads and helper processes."""
        self._threads.shutdown(wait=True)
        if self._prober is not None:
            self._prober.close()

    def _lookup(self, spec: StructuredSpec) -> Grammar | None:
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
                return self._cache[spec]
            refused_at, message = self._refusals.get(spec, (0.0, ""))
        # What was too slow on a busy machine may pass later.
        if message and time.monotonic() - refused_at < _REFUSAL_SECONDS:
            raise InvalidRequest(message, param=structured_param(spec))
        return None

    def _submit(self, spec: StructuredSpec) -> Future[Grammar]:
        with self._lock:
            if spec in self._pending:
                return self._pending[spec]
            if len(self._pending) >= _MAX_PENDING:
                raise Overloaded("Too many grammars are being compiled; try again later.")
            future = self._pending[spec] = self._threads.submit(self._compile, spec)
            return future

    def _compile(self, spec: StructuredSpec) -> Grammar:
        try:
            grammar = self._build(spec)
        except InvalidRequest as error:
            self._keep(self._refusals, spec, (time.monotonic(), error.message))
            raise
        except GrammarRefused as error:
            message = refusal(spec, str(error))
            self._keep(self._refusals, spec, (time.monotonic(), message))
            raise InvalidRequest(message, param=structured_param(spec)) from None
        else:
            self._keep(self._cache, spec, grammar)
            return grammar
        finally:
            with self._lock:
                self._pending.pop(spec, None)

    def _build(self, spec: StructuredSpec) -> Grammar:
        check_spec(spec)
        tokenizer, prober = self._set_up()
        text = prober.probe(spec.kind, spec.text)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(tokenizer, text, limits=limits, log_level=0)
        if matcher.is_error():
            raise GrammarRefused(matcher.get_error())
        return Grammar(matcher, self._eos_ids, self._executor)

    def _keep(self, entries: OrderedDict, spec: StructuredSpec, value: object) -> None:
        with self._lock:
            entries[spec] = value
            while len(entries) > self._cache_size:
                entries.popitem(last=False)

    def _set_up(self) -> tuple[llguidance.LLTokenizer, GrammarProber]:
        """Seconds for a large vocabulary, hence only when structured output is first asked for."""
        with self._setup_lock:
            if self._tokenizer is None or self._prober is None:
                text = self._backend if isinstance(self._backend, str) else self._backend.to_str()
                settings = {**json.loads(text), "padding": None, "truncation": None}
                text, eos_ids = json.dumps(settings), sorted(self._eos_ids)
                self._tokenizer = llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=eos_ids)
                self._prober = GrammarProber(
                    text, self._vocab_size, eos_ids, processes=self._processes, time_limit=self._time_limit
                )
            return self._tokenizer, self._prober
