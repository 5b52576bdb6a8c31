"""Sampling parameters with the names that vLLM and OpenAI use, and the bounds of every field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.param_checks import (
    check_count,
    check_flag,
    check_int,
    check_list,
    check_number,
    check_text,
    check_vocabulary,
    shown,
    token_id,
)
from engine.repetition import RepetitionDetection

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: noise would be lost in the rounding of ``logit / temperature``."""

MAX_N = 128
MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 512
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_BEGIN_SUPPRESS = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 128
MAX_BAD_WORD_TOKENS = 16
MAX_BAD_SEQUENCES = 2 * MAX_BAD_WORDS
MAX_NGRAM = 64
MAX_STRUCTURED_TEXT = 256 * 1024
MAX_REGEX_LENGTH = 16 * 1024
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredSpec:
    """A grammar that the whole answer must follow. ``text`` is a JSON schema, a regex, a JSON list of choices
    or a Lark grammar, by ``kind``; empty for ``json_object``.

    Attributes:
        holds_json: a grammar is that of a text of which JSON is a part.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    text: str = ""
    holds_json: bool = False

    @property
    def is_json(self) -> bool:
        """The whole answer is JSON."""
        return self.kind in ("json_object", "json_schema")


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request, checked when made (:class:`InvalidRequest` names the field).

    :meth:`verify` checks what depends on the model. Lists may be given as None, ``stop`` as one string and
    the keys of ``logit_bias`` as decimal strings; they are normalised.

    Attributes:
        n: completions per prompt, 1 to 128.
        temperature: 0 is greedy; any finite number is allowed.
        top_p: nucleus in (0, 1]; 1 keeps all.
        top_k: keep the k likeliest; 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest, in [0, 1].
        presence_penalty: subtracted from the logit of every token of the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of prompt and output tokens, in
            (0, 10].
        no_repeat_ngram_size: no sequence of this many tokens appears twice in prompt and output together, as
            in Transformers; at most 64. 0 allows all.
        logit_bias: token id to addend in [-100, 100], at most 1024 of them.
        allowed_token_ids: no other id is ever sampled.
        suppress_tokens: ids that are never sampled; ids outside the vocabulary have no effect.
        begin_suppress_tokens: likewise for the first token of the output; at most 128.
        bad_words: words that never appear in the output; needs :meth:`resolve_bad_words`.
        bad_words_ids: token sequences that never appear, as in Transformers: their beginning may lie in the
            prompt. Of those of several tokens at most 128, of at most 16 tokens.
        seed: int64; the same seed gives the same tokens. None takes the engine's.
        stop: at most 16 strings of at most 1024 characters.
        stop_token_ids: ids that end the output like EOS.
        min_tokens: EOS and stop ids are masked until the output has this many tokens.
        max_tokens: most tokens of the output. A request whose prompt leaves too little room is refused. None
            goes on to the end of the context.
        logprobs: alternatives returned per token (0: the sampled one alone; None: none), at most 20.
        logprob_token_ids: ids whose log-probabilities are returned beside those of ``logprobs``, which is 0
            then if it is None; at most 512. They have no ranks.
        prompt_logprobs: the same as ``logprobs`` for the tokens of the prompt.
        structured: a grammar that the whole answer follows; not together with ``min_tokens`` or
            ``ignore_eos``.
        default_max_tokens: where ``max_tokens`` is None, the output ends after this many tokens or at the end
            of the context.
        max_length: likewise, after this many tokens of prompt and output. A prompt that long is no fault; it
            has no limit but the context.
        min_length: EOS and stop ids are masked until prompt and output have this many tokens.
        repetition_detection: ends the output with the reason ``repetition`` once it repeats itself, but not
            before ``min_tokens``; its fields may be given by name.
        any_end: where a grammar allows nothing but several tokens that end the answer, one is taken without a
            step that samples it: for those who see texts, in which none of them stands.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    suppress_tokens: list[int] = field(default_factory=list)
    begin_suppress_tokens: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    bad_words_ids: list[list[int]] = field(default_factory=list)
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    logprob_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredSpec | None = None
    default_max_tokens: int | None = None
    max_length: int | None = None
    min_length: int = 0
    repetition_detection: RepetitionDetection | None = None
    any_end: bool = False
    _bad_sequences: list[list[int]] | None = field(default=None, repr=False)
    _from_checkpoint: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    def __post_init__(self) -> None:
        self._yield_defaults()
        self._check_scalars()
        self._check_lengths()
        self._check_texts()
        self._check_token_lists()
        self.repetition_detection = RepetitionDetection.of(self.repetition_detection)
        if self.structured is not None:
            self._check_structured(self.structured)

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def bad_sequences(self) -> list[list[int]]:
        """Token sequences of ``bad_words``, once resolved, and ``bad_words_ids``."""
        return self.bad_words_ids if self._bad_sequences is None else self._bad_sequences

    @classmethod
    def from_defaults(cls, defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
        """Parameters of a request over a checkpoint's ``defaults``.

        A default never makes a request fail that would be right without it: defaults that keep an answer from
        ending, or cut it, yield to a grammar, and ``min_tokens`` yields to ``max_tokens``.
        """
        return cls(**{**defaults, **given, "_from_checkpoint": frozenset(defaults.keys() - given.keys())})

    def for_prompt(self, num_prompt: int, context: int) -> SamplingParams:
        """These parameters with ``min_tokens`` and ``max_tokens`` for a prompt of ``num_prompt`` tokens.

        Args:
            context: most tokens of prompt and output.
        """
        longest, room = self.max_tokens, context - num_prompt
        if longest is None and room > 0:
            limits = [room]
            if self.default_max_tokens is not None:
                limits.append(self.default_max_tokens)
            elif self.max_length is not None and self.max_length > num_prompt:
                limits.append(self.max_length - num_prompt)
            longest = min(limits) if len(limits) > 1 else None
        shortest = max(self.min_tokens, self.min_length - num_prompt)
        if longest is not None:
            shortest = min(shortest, longest)
        if (shortest, longest) == (self.min_tokens, self.max_tokens):
            return self
        return dataclasses.replace(self, min_tokens=shortest, max_tokens=longest)

    def verify(self, vocab_size: int, max_model_len: int) -> None:
        """Checks what depends on the model: ids inside the vocabulary, lengths inside the context.

        Raises:
            InvalidRequest: naming the field.
        """
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logprob_token_ids", self.logprob_token_ids),
            ("bad_words_ids", [token for word in self.bad_words_ids for token in word]),
            ("bad_words", [token for word in self.bad_sequences for token in word]),
        ):
            check_vocabulary(name, ids, vocab_size)
        for name, length in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if length is not None and length > max_model_len:
                message = (
                    f"This model's maximum context length is {max_model_len} tokens. However, {name} is "
                    f"{length}: lower it."
                )
                raise ContextLengthExceeded(message, param=name)
        if self.bad_words and self._bad_sequences is None:
            raise InvalidRequest("bad_words were not tokenized.", param="bad_words")

    def resolve_bad_words(
        self, encode: Callable[[str], list[int]], eos_ids: Collection[int] = frozenset()
    ) -> None:
        """Tokenizes ``bad_words``: each as at the start of a text and after a space.

        Args:
            encode: text to token ids, without special tokens.
            eos_ids: tokens that end an answer. A sequence of one of them alone is not forbidden, as in
                Transformers.
        """
        texts = [text for word in self.bad_words for text in (word, " " + word.lstrip())]
        words = [ids for text in texts if (ids := encode(text))]
        _check_sequences("bad_words", words)
        sequences = dict.fromkeys(tuple(ids) for ids in [*words, *self.bad_words_ids])
        self._bad_sequences = [list(s) for s in sequences if len(s) > 1 or s[0] not in eos_ids]

    def _yield_defaults(self) -> None:
        default = self._from_checkpoint
        if self.structured is not None:
            for name in {"min_tokens", "min_length", "no_repeat_ngram_size"} & default:
                setattr(self, name, 0)
            if "stop" in default:
                self.stop = []
        if "min_tokens" in default and self.max_tokens is not None:
            self.min_tokens = min(self.min_tokens, self.max_tokens)

    def _check_scalars(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        check_number("temperature", self.temperature, 0.0, math.inf)
        check_number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        check_int("top_k", self.top_k, -1, _INT64 - 1)
        self.top_k = max(self.top_k, 0)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_below=True)
        check_int("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, MAX_NGRAM)
        for name, limit in (("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_LOGPROBS)):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, limit)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_flag(name, getattr(self, name))
        if self.seed is not None:
            check_int("seed", self.seed, -_INT64, _INT64 - 1)

    def _check_lengths(self) -> None:
        for name in ("min_tokens", "min_length"):
            check_int(name, getattr(self, name), 0, _INT64 - 1)
        for name in ("max_tokens", "default_max_tokens", "max_length"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, _INT64 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            message = f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})."
            raise InvalidRequest(message, param="min_tokens")

    def _check_texts(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else check_list("stop", self.stop)
        check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            check_text("stop", text, MAX_STOP_LENGTH)
        self.bad_words = check_list("bad_words", self.bad_words)
        check_count("bad_words", self.bad_words, MAX_BAD_WORDS)
        for text in self.bad_words:
            check_text("bad_words", text, MAX_BAD_WORD_LENGTH)

    def _check_token_lists(self) -> None:
        self.stop_token_ids = check_list("stop_token_ids", self.stop_token_ids)
        check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = check_list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise InvalidRequest("allowed_token_ids must not be empty.", param="allowed_token_ids")
        self.logprob_token_ids = check_list("logprob_token_ids", self.logprob_token_ids)
        check_count("logprob_token_ids", self.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS)
        if self.logprob_token_ids and self.logprobs is None:
            self.logprobs = 0
        biases = self.logit_bias or {}
        if not isinstance(biases, Mapping):
            raise InvalidRequest("logit_bias must have a number for each token id.", param="logit_bias")
        check_count("logit_bias", biases, MAX_LOGIT_BIAS)
        self.logit_bias = {token_id(key): bias for key, bias in biases.items()}
        for bias in self.logit_bias.values():
            check_number("logit_bias", bias, -100.0, 100.0)
        self.suppress_tokens = check_list("suppress_tokens", self.suppress_tokens)
        self.begin_suppress_tokens = check_list("begin_suppress_tokens", self.begin_suppress_tokens)
        check_count("begin_suppress_tokens", self.begin_suppress_tokens, MAX_BEGIN_SUPPRESS)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            for token in getattr(self, name):
                check_int(name, token, -_INT64, _INT64 - 1)
        self.bad_words_ids = check_list("bad_words_ids", self.bad_words_ids)
        _check_sequences("bad_words_ids", self.bad_words_ids)

    def _check_structured(self, spec: StructuredSpec) -> None:
        if not isinstance(spec, StructuredSpec):
            raise InvalidRequest("structured must be a StructuredSpec.", param="structured")
        if len(spec.text) > MAX_STRUCTURED_TEXT:
            message = f"The grammar has {len(spec.text)} characters; the limit is {MAX_STRUCTURED_TEXT}."
            raise InvalidRequest(message, param="structured")
        for name, reason in (
            ("min_tokens", "the grammar decides where the answer ends"),
            ("min_length", "the grammar decides where the answer ends"),
            ("ignore_eos", "nothing may follow a whole answer"),
        ):
            if getattr(self, name):
                message = f"{name} cannot be combined with the parameter structured: {reason}."
                raise InvalidRequest(message, param=name)


def _check_sequences(name: str, sequences: list[list[int]]) -> None:
    for ids in sequences:
        if not isinstance(ids, list | tuple):
            raise InvalidRequest(f"{name} must hold lists of token ids, got {shown(ids)}.", param=name)
    check_count(name, [ids for ids in sequences if len(ids) > 1], MAX_BAD_SEQUENCES)
    for ids in sequences:
        if not 1 <= len(ids) <= MAX_BAD_WORD_TOKENS:
            message = f"An entry of {name} has {len(ids)} tokens; the limit is {MAX_BAD_WORD_TOKENS}."
            raise InvalidRequest(message, param=name)
