"""Chat completions on the wire: OpenAI's fields, and those that vLLM's users know beside them."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.protocol.usage import Usage
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec

#: Fields of OpenAI's that change nothing here; clients send them unasked.
_NO_EFFECT = {
    "metadata",
    "modalities",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
#: Sampling parameters under the same name here and in :class:`SamplingParams`.
_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
)


class JsonSchema(BaseModel):
    """A schema under OpenAI's names; it is always followed strictly."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = ""
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    """``text``, any JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given where type is json_schema, and only there")
        return self


class StructuredOutputs(BaseModel):
    """One constraint, as vLLM's clients give it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(BaseModel):
    """``include_usage`` adds an event with the counts at the end, ``continuous_usage_stats`` to each."""

    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatCompletionRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``.

    ``messages`` stay plain data: :func:`engine.inputs.messages.parse_messages` checks them and says which
    part is wrong. Ranges are checked by :class:`~engine.sampling_params.SamplingParams`.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    messages: list[dict[str, Any]]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    # Beyond OpenAI.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str = Field(default="", max_length=256)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_fields_without_effect(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if data.get("chat_template") is not None:
                raise ValueError(
                    "chat_template can't come with a request; it is set where the model is configured"
                )
            known = cls.model_fields.keys()
            # A field of OpenAI's that we don't have may still be sent as null: nothing is asked for then.
            return {
                k: v
                for k, v in data.items()
                if k not in _NO_EFFECT and k != "chat_template" and (v is not None or k in known)
            }
        return data

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for streams: set stream to true")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs can't be streamed")
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in (self.model_fields_set)
        ):
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """How to sample: what the request says, over the checkpoint's ``defaults``.

        Raises:
            InvalidRequest: naming the field that is out of range.
        """
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        given |= {
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "structured": self.structured(),
        }
        if tokens is not None:
            given["max_tokens"] = tokens
        try:
            return SamplingParams(**{"max_tokens": None, **defaults, **given})
        except InvalidRequest as error:
            if error.param == "max_tokens" and self.max_completion_tokens is not None:
                error.param = "max_completion_tokens"
            raise

    def structured(self) -> StructuredSpec | None:
        """The constraint on the answer's form.

        Raises:
            InvalidRequest: there are several.
        """
        found: list[StructuredSpec] = []
        if self.response_format is not None:
            if self.response_format.json_schema is not None:
                schema = json.dumps(self.response_format.json_schema.json_schema)
                found.append(StructuredSpec(kind="json_schema", text=schema))
            elif self.response_format.type == "json_object":
                found.append(StructuredSpec(kind="json_object"))
        more = self.structured_outputs or StructuredOutputs()
        for schema_or_text in (self.guided_json, more.json_):
            if schema_or_text is not None:
                text = schema_or_text if isinstance(schema_or_text, str) else json.dumps(schema_or_text)
                found.append(StructuredSpec(kind="json_schema", text=text))
        for kind, values in (
            ("regex", (self.guided_regex, more.regex)),
            ("choice", (self.guided_choice, more.choice)),
            ("grammar", (self.guided_grammar, more.grammar)),
        ):
            for value in values:
                if value is not None:
                    text = value if isinstance(value, str) else json.dumps(value)
                    found.append(StructuredSpec(kind=kind, text=text))  # type: ignore[arg-type]
        if more.json_object:
            found.append(StructuredSpec(kind="json_object"))
        if len(found) > 1:
            raise InvalidRequest(
                "Only one of response_format, structured_outputs and guided_* can constrain an answer.",
                param="response_format",
            )
        return found[0] if found else None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    """Response of a request that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
