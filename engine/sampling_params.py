"""Sampling parameters with the names that vLLM and OpenAI use, and the bounds of every field."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ContextLengthExceeded, InvalidRequest

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy: noise would be lost in the rounding of ``logit / temperature``."""

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_LENGTH = 128
MAX_BAD_WORD_TOKENS = 16
MAX_STRUCTURED_TEXT = 256 * 1024
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredSpec:
    """A grammar that the whole answer must follow. ``text`` is a JSON schema, a regex, a JSON list of choices
    or a Lark grammar, by ``kind``; empty for ``json_object``."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    text: str = ""


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request, checked when made (:class:`InvalidRequest` names the field).

    What depends on the model is checked by :meth:`verify`. Lists may be given as None, ``stop`` as one string
    and the keys of ``logit_bias`` as decimal strings; they are normalised.

    Attributes:
        n: completions per prompt, 1 to 128.
        temperature: 0 is greedy; there is no upper bound but finiteness.
        top_p: nucleus in (0, 1]; 1 keeps all.
        top_k: keep the k likeliest; 0 or -1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest, in [0, 1].
        presence_penalty: subtracted from the logit of every token of the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        repetition_penalty: divides positive and multiplies negative logits of prompt and output tokens, in
            (0, 10].
        logit_bias: token id to addend in [-100, 100], at most 1024 of them.
        allowed_token_ids: no other id is ever sampled.
        bad_words: words that never appear in the output; needs :meth:`resolve_bad_words`.
        bad_words_ids: token sequences of ``bad_words``, at most 64 of at most 16 tokens.
        seed: int64; the same seed gives the same tokens. None takes the engine's.
        stop: at most 16 strings of at most 1024 characters.
        stop_token_ids: ids that end the output like EOS.
        min_tokens: EOS and stop ids are masked until the output has this many tokens.
        max_tokens: None goes on to the end of the context.
        logprobs: alternatives returned per token (0: the sampled one alone; None: none), at most 20.
        prompt_logprobs: the same for the tokens of the prompt.
        structured: a grammar that the whole answer follows; not together with ``min_tokens`` or
            ``ignore_eos``.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
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
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredSpec | None = None

    def __post_init__(self) -> None:
        self._check_scalars()
        self._check_stops()
        self._check_token_lists()
        if self.structured is not None:
            if (length := len(self.structured.text)) > MAX_STRUCTURED_TEXT:
                message = f"The grammar has {length} characters; the limit is {MAX_STRUCTURED_TEXT}."
                raise InvalidRequest(message, param=structured_param(self.structured))
            if self.min_tokens:
                message = (
                    "min_tokens cannot be combined with structured output: the grammar decides where to end."
                )
                raise InvalidRequest(message, param="min_tokens")
            if self.ignore_eos:
                message = (
                    "ignore_eos cannot be combined with structured output: nothing may follow a whole answer."
                )
                raise InvalidRequest(message, param="ignore_eos")

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def verify(self, vocab_size: int, max_model_len: int) -> None:
        """Checks what depends on the model: ids inside the vocabulary, lengths inside the context.

        Raises:
            InvalidRequest: naming the field.
        """
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("bad_words", [token for word in self.bad_words_ids for token in word]),
        ):
            _check_vocabulary(name, ids, vocab_size)
        for name, length in (("max_tokens", self.max_tokens), ("min_tokens", self.min_tokens)):
            if length is not None and length > max_model_len:
                message = f"{name} is {length}, but the model's context is {max_model_len} tokens."
                raise ContextLengthExceeded(message, param=name)
        if len(self.bad_words_ids) < len(self.bad_words):
            raise InvalidRequest("bad_words were not tokenized.", param="bad_words")

    def resolve_bad_words(self, encode: Callable[[str], list[int]]) -> None:
        """Fills ``bad_words_ids``: each word as it is tokenized at the start of a text and after a space.

        Args:
            encode: text to token ids, without special tokens.
        """
        sequences: dict[tuple[int, ...], None] = {}
        for word in self.bad_words:
            for text in (word, " " + word.lstrip()):
                if ids := encode(text):
                    sequences[tuple(ids)] = None
        self.bad_words_ids = [list(ids) for ids in sequences]
        self._check_token_lists()

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **given: Any) -> SamplingParams:
        """Parameters with a checkpoint's ``generation_config.json`` as defaults; ``given`` fields win."""
        return cls(**{**generation_defaults(config), **given})

    def _check_scalars(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _check_int("top_k", self.top_k, -1, _INT64 - 1)
        self.top_k = max(self.top_k, 0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_below=True)
        for name, limit in (("logprobs", MAX_LOGPROBS), ("prompt_logprobs", MAX_LOGPROBS)):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, limit)
        if self.seed is not None:
            _check_int("seed", self.seed, -_INT64, _INT64 - 1)
        _check_int("min_tokens", self.min_tokens, 0, _INT64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, _INT64 - 1)
            if self.min_tokens > self.max_tokens:
                message = f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})."
                raise InvalidRequest(message, param="min_tokens")

    def _check_stops(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        _check_count("stop", self.stop, MAX_STOP_STRINGS)
        for text in self.stop:
            _check_text("stop", text, MAX_STOP_LENGTH)
        self.bad_words = list(self.bad_words or ())
        _check_count("bad_words", self.bad_words, MAX_BAD_WORDS)
        for text in self.bad_words:
            _check_text("bad_words", text, MAX_BAD_WORD_LENGTH)

    def _check_token_lists(self) -> None:
        self.stop_token_ids = list(self.stop_token_ids or ())
        _check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidRequest("allowed_token_ids must not be empty.", param="allowed_token_ids")
        _check_count("logit_bias", self.logit_bias or (), MAX_LOGIT_BIAS)
        self.logit_bias = {_token_id(key): bias for key, bias in (self.logit_bias or {}).items()}
        for bias in self.logit_bias.values():
            _check_number("logit_bias", bias, -100.0, 100.0)
        # Twice the words: each is banned at the start of a text and after a space.
        _check_count("bad_words", self.bad_words_ids, 2 * MAX_BAD_WORDS)
        for word in self.bad_words_ids:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                message = f"A bad word has {len(word)} tokens; the limit is {MAX_BAD_WORD_TOKENS}."
                raise InvalidRequest(message, param="bad_words")


def generation_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`SamplingParams` that a ``generation_config.json`` sets, like vLLM's.

    ``max_new_tokens`` becomes ``max_tokens``, and an explicit ``do_sample: false`` temperature 0, which is
    what Transformers makes of it. Nulls and everything else are left out.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("max_new_tokens") is not None:
        defaults["max_tokens"] = config["max_new_tokens"]
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def structured_param(spec: StructuredSpec) -> str:
    """The request field that carries this kind of grammar."""
    if spec.kind in ("json_object", "json_schema"):
        return "response_format"
    return {"regex": "guided_regex", "choice": "guided_choice", "grammar": "guided_grammar"}[spec.kind]


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be an integer, got {_shown(value)}.", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low}, {high}], got {_shown(value)}.", param=name)


def _check_number(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a number, got {_shown(value)}.", param=name)
    # A large integer overflows float32 as surely as infinity does.
    if not (low <= value <= high) or abs(value) > 1e30 or (open_below and value == low):
        interval = f"{'(' if open_below else '['}{low:g}, {high:g}]"
        raise InvalidRequest(
            f"{name} must be a finite number in {interval}, got {_shown(value)}.", param=name
        )


def _check_count(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(f"{name} has {len(values)} entries; the limit is {limit}.", param=name)


def _check_text(name: str, text: Any, limit: int) -> None:
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must hold strings, got {_shown(text)}.", param=name)
    if not 1 <= len(text) <= limit:
        message = f"Each entry of {name} must have 1 to {limit} characters, got {len(text)}."
        raise InvalidRequest(message, param=name)


def _check_vocabulary(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            message = f"{name}: {_shown(token)} is not a token id; the vocabulary has {vocab_size} tokens."
            raise InvalidRequest(message, param=name)


def _token_id(key: Any) -> int:
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        return int(key)
    raise InvalidRequest(f"logit_bias: {_shown(key)} is not a token id.", param="logit_bias")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 128 else "a huge integer"
    return text if len(text) <= 40 else text[:37] + "..."
