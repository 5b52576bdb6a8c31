"""How tokens are chosen, as vLLM's and OpenAI's users know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredSpec:
    """A grammar that the whole answer must follow. ``text`` is a JSON schema, a regex, a JSON list of choices
    or a Lark grammar, by ``kind``; empty for ``json_object``."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    text: str = ""


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request.

    ``temperature`` 0 is greedy. ``max_tokens`` None goes on to the end of the context. ``logprobs`` is the
    number of alternatives returned per token (0: the sampled one alone; None: none).
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
