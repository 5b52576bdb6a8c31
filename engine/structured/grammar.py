"""Compiles a JSON schema, regex, list of choices or grammar to the tokens that may come next."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import llguidance
import numpy as np
import tokenizers

from engine.errors import InvalidRequest, Overloaded
from engine.sampling_params import StructuredSpec
from engine.structured.checks import GrammarRefused, check_spec, refusal
from engine.structured.json_escapes import within_escape
from engine.structured.json_schema import literals, plainer
from engine.structured.matcher import Grammar
from engine.structured.numbers import DigitBound, DigitBoundWithin
from engine.structured.prepare import prepare
from engine.structured.prober import LIMITS, GrammarProber
from engine.structured.vocabulary import Vocabulary
from engine.text.spelling import Speller
from engine.text.tokenizer import Tokenizer

_REFUSAL_SECONDS = 60.0
_MAX_PENDING = 64


class GrammarCompiler:
    """Compiles structured specs, within limits of size, time and memory, and keeps the latest.

    A grammar that isn't in the cache is first tried out in a helper process that is killed when it exceeds
    its limits, so that no spec can slow down, bloat or crash this process.

    Masks are over the true bytes of tokens. Control tokens may come only where a grammar names them: their
    strings, where an answer must hold them, are spelled with other tokens. Special tokens are control tokens.
    In Lark grammars, which can name tokens, so are all others that the tokenizer adds to its vocabulary, such
    as ``<tool_call>``; for the other specs those are text.

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
        tokenizer: tokenizers.Tokenizer | str,
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
        self._parts: dict[bool, _VocabularyParts] = {}
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

    def warm_up(self) -> Future[Grammar]:
        """Set up the vocabulary and a helper process on a thread, so that the first request with a grammar
        doesn't wait for them: seconds for a large vocabulary. What fails is reported with that request."""
        return self._submit(StructuredSpec(kind="json_object", text=""))

    def can_spell(self, text: str, tokens: frozenset[int]) -> bool:
        """Return True if ``tokens`` can spell ``text``. Takes seconds until a grammar was compiled."""
        segmenter = self._set_up(added_are_control=False).speller.segmenter
        return segmenter.can_cut(text.encode(), tokens)

    def close(self) -> None:
        """Ends threads and helper processes."""
        self._threads.shutdown(wait=True)
        for parts in set(self._parts.values()):
            parts.prober.close()

    def _lookup(self, spec: StructuredSpec) -> Grammar | None:
        with self._lock:
            if spec in self._cache:
                self._cache.move_to_end(spec)
                return self._cache[spec]
            refused_at, message = self._refusals.get(spec, (0.0, ""))
        # What was too slow on a busy machine may pass later.
        if message and time.monotonic() - refused_at < _REFUSAL_SECONDS:
            raise InvalidRequest(message, param="structured")
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
            message = refusal(spec, plainer(str(error)))
            self._keep(self._refusals, spec, (time.monotonic(), message))
            raise InvalidRequest(message, param="structured") from None
        else:
            self._keep(self._cache, spec, grammar)
            return grammar
        finally:
            with self._lock:
                self._pending.pop(spec, None)

    def _build(self, spec: StructuredSpec) -> Grammar:
        check_spec(spec)
        if not self._eos_ids:
            raise GrammarRefused("this model has no end token, so that no answer could end after it is whole")
        parts = self._set_up(spec.kind == "grammar")
        text = prepare(spec, parts.speller)
        probed = parts.prober.probe(spec.kind, text)
        limits = llguidance.LLParserLimits(**LIMITS)
        matcher = llguidance.LLMatcher(parts.tokenizer, probed.text, limits=limits, log_level=0)
        if matcher.is_error():
            raise GrammarRefused(matcher.get_error())
        whole = probed.lacks_escapes and parts.can_spell_literals(json.loads(text))
        digits = parts.digits if spec.is_json else parts.digits_within if spec.holds_json else None
        return Grammar(
            matcher,
            self._eos_ids,
            self._executor,
            parts.whole_escapes if whole else None,
            digits,
            # What must follow depends on a count of tokens, too.
            sure=None if "max_tokens" in probed.text else {},
        )

    def _keep(self, entries: OrderedDict, spec: StructuredSpec, value: object) -> None:
        with self._lock:
            entries[spec] = value
            while len(entries) > self._cache_size:
                entries.popitem(last=False)

    def _set_up(self, added_are_control: bool) -> _VocabularyParts:
        """Seconds for a large vocabulary, hence only when structured output is first asked for."""
        with self._setup_lock:
            if added_are_control not in self._parts:
                text = self._backend if isinstance(self._backend, str) else self._backend.to_str()
                tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text), {})
                if tokenizer.special_ids.issuperset(tokenizer.added_tokens):
                    self._parts[True] = self._parts[False] = self._make_parts(tokenizer, self._eos_ids)
                else:
                    added = frozenset(tokenizer.added_tokens if added_are_control else ())
                    self._parts[added_are_control] = self._make_parts(tokenizer, self._eos_ids | added)
            return self._parts[added_are_control]

    def _make_parts(self, tokenizer: Tokenizer, control_ids: frozenset[int]) -> _VocabularyParts:
        speller = Speller(tokenizer, self._vocab_size, control_ids)
        vocabulary = Vocabulary(
            speller.token_bytes,
            {
                token: tokenizer.backend.id_to_token(token) or f"<token {token}>"
                for token in sorted(speller.control_ids)
                if token < self._vocab_size
            },
            sorted(self._eos_ids),
            speller.spell,
            speller.segmenter.cuts_all,
        )
        prober = GrammarProber(vocabulary, processes=self._processes, time_limit=self._time_limit)
        return _VocabularyParts(speller, vocabulary.for_llguidance(), prober, self._vocab_size)


class _VocabularyParts:
    """Objects that are built once per vocabulary.

    Args:
        vocab_size: width of the logits.
    """

    def __init__(
        self, speller: Speller, tokenizer: llguidance.LLTokenizer, prober: GrammarProber, vocab_size: int
    ) -> None:
        self.speller, self.tokenizer, self.prober = speller, tokenizer, prober
        self._vocab_size = vocab_size

    @cached_property
    def _whole_ids(self) -> frozenset[int]:
        return frozenset(i for i, piece in enumerate(self.speller.token_bytes) if not within_escape(piece))

    @cached_property
    def whole_escapes(self) -> np.ndarray:
        """(ceil(V / 32),) int32: a mask of the tokens that don't end within an escape of a JSON string."""
        bits = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        bits[list(self._whole_ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

    @cached_property
    def digits(self) -> DigitBound:
        return DigitBound(self.speller.token_bytes, -(-self._vocab_size // 32))

    @cached_property
    def digits_within(self) -> DigitBoundWithin:
        return DigitBoundWithin(self.speller.token_bytes, -(-self._vocab_size // 32))

    def can_spell_literals(self, schema: Any) -> bool:
        """Return whether :attr:`whole_escapes` can spell every value and key that ``schema`` spells out."""
        spelled = (json.dumps(literal, ensure_ascii=False) for literal in literals(schema))
        cut = self.speller.segmenter.can_cut
        return all("\\" not in text or cut(text.encode(), self._whole_ids) for text in spelled)
