"""Text completions on the wire: OpenAI's older endpoint."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from deployments.errors import UnsupportedParameter
from deployments.protocol.generation import GenerationBody
from deployments.protocol.usage import UsageBody
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

#: Most prompts of one request.
MAX_PROMPTS = 128
_DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationBody):
    """Body of ``POST /v1/completions``. ``prompt`` is one text or token list, or a list of either."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"prompt": "a red", "max_tokens": 8}
    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationBody.REFUSED,
        "media_io_kwargs": "prompts hold no media; use /v1/chat/completions",
        "messages": "use /v1/chat/completions",
        "mm_processor_kwargs": "prompts hold no media; use /v1/chat/completions",
        "prompt_embeds": "send text or token ids",
        "thinking_token_budget": "use /v1/chat/completions",
        "return_prompt_text": "it is the prompt that was sent",
        "suffix": "write both texts into the prompt, in the form that the model was trained on",
        "tools": "use /v1/chat/completions",
    }

    prompt: str | list[str] | list[int] | list[list[int]] = Field(default_factory=lambda: [""])
    echo: bool = False
    logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        if self.stream_options is not None and self.stream_options.event_ids:
            raise UnsupportedParameter(
                "Unsupported parameter: events have ids in /v1/chat/completions only.",
                param="stream_options.event_ids",
            )
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequest(
                f"prompt must have 1 to {MAX_PROMPTS} entries, not {len(self.prompts)}.", param="prompt"
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 unless echo is true.", param="max_tokens")

        if self.logprob_token_ids and (self.logprobs is None or self.echo):
            raise InvalidRequest("logprob_token_ids needs logprobs, and no echo.", param="logprob_token_ids")

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def only_echo(self) -> bool:
        """True if the prompt is to be given back without a completion."""
        return self.max_tokens == 0

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the request's sampling parameters; errors as :meth:`sampling`."""
        tokens = _DEFAULT_MAX_TOKENS if self.max_tokens is None else max(1, self.max_tokens)
        given: dict[str, Any] = {"max_tokens": tokens, "logprobs": self.logprobs}
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return self.sampling(defaults, **given)


class CompletionLogprobs(BaseModel):
    """Log-probabilities in their older form: a list each, one entry per token.

    Attributes:
        text_offset: where a token's text begins in the choice's text, in characters.
        token_logprobs, top_logprobs: None for the first token of a prompt, which nothing precedes.
        top_logprobs: of the likeliest tokens, of ``logprob_token_ids``, and of the token itself where it is
            none of them.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One continuation.

    Attributes:
        prompt_logprobs: for each token of the prompt its log-probability and those of the likeliest tokens in
            its place, by token id; None for the first.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None


class Completion(BaseModel):
    """A whole response, or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
    system_fingerprint: str | None = None
