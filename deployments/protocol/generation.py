"""The fields of every endpoint that generates text: sampling, constraints, thoughts, streams."""

import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from deployments.errors import UnsupportedParameter
from deployments.protocol.base import Part, RequestBody, unsupported
from deployments.tools import ToolUse
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.structured.json_schema import close_objects

#: Sampling parameters under the same name here and in :class:`SamplingParams`.
SAMPLING = (
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
    "logprob_token_ids",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "no_repeat_ngram_size",
    "min_length",
    "max_length",
)
_SAMPLING = frozenset(SAMPLING)

#: Most tokens whose log-probabilities a caller may ask for by their ids; as in vLLM.
MAX_NAMED_TOKENS = 128

#: Most log-probabilities of named tokens that a request may ask for. Each takes a quarter of a kilobyte here,
#: and about 60 bytes of the response.
MAX_NAMED_LOGPROBS = 1 << 20


def check_named_tokens(params: SamplingParams, num_tokens: int) -> None:
    """Check how many log-probabilities ``params.logprob_token_ids`` ask for.

    Args:
        num_tokens: most tokens of all answers to the request.

    Raises:
        InvalidRequest: too many.
    """
    named = len(params.logprob_token_ids)
    if named * num_tokens > MAX_NAMED_LOGPROBS:
        raise InvalidRequest(
            f"logprob_token_ids has {named} tokens, for each of up to {num_tokens} tokens of answers: more "
            f"than {MAX_NAMED_LOGPROBS} log-probabilities. Lower max_tokens or n, or name fewer tokens.",
            param="logprob_token_ids",
        )


_NO_SUCH_SAMPLER = "use temperature, top_p, top_k or min_p"

#: Fields that constrain an answer's form.
_CONSTRAINTS = frozenset(
    {
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    }
)


class JsonSchema(Part):
    """A schema under OpenAI's names.

    Attributes:
        strict: false leaves objects open that don't say whether they may have more properties.
    """

    SILENT: ClassVar[Mapping[str, str]] = {"description": "models are not shown the schema"}

    name: str = ""
    json_schema: dict[str, Any] | bool = Field(alias="schema", default_factory=dict)
    strict: bool = True

    @property
    def text(self) -> str:
        """The schema that answers follow, as JSON."""
        return json.dumps(close_objects(self.json_schema) if self.strict else self.json_schema)


class ResponseFormat(Part):
    """``text``, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_is_there(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given where type is json_schema, and only there")
        return self


class StructuredOutputs(Part):
    """One constraint, as vLLM's clients give it."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "disable_additional_properties": "say additionalProperties: false in the schema",
        "structural_tag": "use json, regex, choice or grammar",
        "whitespace_pattern": "JSON stands on one line; write other forms as a regex or grammar",
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        "disable_any_whitespace": "JSON always stands on one line",
        "disable_fallback": "there is one engine of grammars",
    }

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Part):
    """``include_usage`` adds an event with the counts at the end, ``continuous_usage_stats`` to each.

    ``event_ids`` gives each event of a chat an id, with which the stream can be taken up again.
    """

    SILENT: ClassVar[Mapping[str, str]] = {"include_obfuscation": "events are not padded"}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    event_ids: bool = False


class RepetitionOptions(Part):
    """See :class:`~engine.repetition.RepetitionDetection`."""

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class GenerationBody(RequestBody):
    """Fields that completions and chats share. Ranges are checked by
    :class:`~engine.sampling_params.SamplingParams`."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "best_of": "ask for n answers with their logprobs, and choose one",
        "chat_template": "it is set where the model is configured",
        "custom_logit_processor": "use logit_bias, allowed_token_ids or bad_words",
        "documents": "put their text into a message",
        "dry_multiplier": _NO_SUCH_SAMPLER,
        "dynatemp_range": _NO_SUCH_SAMPLER,
        "ebnf": "use structured_outputs.grammar",
        "ec_transfer_params": "the stages pass embeddings on by themselves",
        "grammar": "use structured_outputs.grammar",
        "guided_whitespace_pattern": "JSON stands on one line; write other forms as a regex or grammar",
        "json_schema": "use response_format",
        "kv_transfer_params": "the stages pass keys and values on by themselves",
        "length_penalty": "beam search is not offered",
        "logits_processors": "use logit_bias, allowed_token_ids or bad_words",
        "logits_processor_pattern": "use logit_bias, allowed_token_ids or bad_words",
        "lora_path": "serve the adapter merged into its model",
        "mirostat": _NO_SUCH_SAMPLER,
        "no_stop_trim": "use include_stop_str_in_output",
        "regex": "use structured_outputs.regex",
        "return_hidden_states": "use /pooling",
        "return_token_offsets": "log-probabilities come with each token's text",
        "return_weight_versions": "weights never change while they are served",
        "stop_regex": "use stop",
        "top_n_sigma": _NO_SUCH_SAMPLER,
        "truncate_prompt_tokens": "shorten the prompt",
        "typical_p": _NO_SUCH_SAMPLER,
        "use_beam_search": "beam search is not offered",
        "vllm_xargs": "there are no extensions that take arguments",
        "watermarking": "answers carry no watermark",
    }
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {
        "best_of": (1,),
        "length_penalty": (1,),
        "top_n_sigma": (-1,),
        "typical_p": (1,),
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        "metadata": "a note for the caller's own records",
        "mm_payload": "answers hold no pixels",
        "prompt_cache_key": "every prompt is cached; cache_salt keeps callers apart",
        "prompt_cache_options": "every prompt is cached",
        "prompt_cache_retention": "the cache keeps what was used last",
        "request_id": "the header x-request-id names a request",
        "return_mm_kwargs": "answers hold no pixels",
        "rid": "the header x-request-id names a request",
        "routed_experts_prompt_start": "answers don't tell the experts of a token",
        "safety_identifier": "a note for the provider's records",
        "session_id": "requests that begin alike find the same cache without it",
        "spaces_between_special_tokens": "tokens spell themselves",
        "store": "chats and completions are never kept",
        "stream_interval": "the configuration says how many tokens an event holds at least",
        "truncation_side": "prompts are never cut",
        "user": "a note for the provider's records",
    }

    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Beyond OpenAI.
    response_format: ResponseFormat | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    logprob_token_ids: list[int] | None = Field(default=None, max_length=MAX_NAMED_TOKENS)
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    no_repeat_ngram_size: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    repetition_detection: RepetitionOptions | None = None
    return_token_ids: bool = False
    include_timings: bool = False
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str = Field(default="", max_length=256)

    @property
    def ends_with_usage(self) -> bool:
        """A stream ends with an event that holds the usage."""
        return self.include_timings or (self.stream_options is not None and self.stream_options.include_usage)

    def check(self) -> None:
        """Refuse fields that don't fit together.

        Raises:
            InvalidRequest: naming the field to change.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is for streams: set stream to true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs can't be streamed.", param="prompt_logprobs")

    def sampling(self, defaults: Mapping[str, Any], **given: Any) -> SamplingParams:
        """Make sampling parameters of the body, over the checkpoint's ``defaults``.

        Args:
            given: parameters that the endpoint spells in its own way; None leaves the default.

        Raises:
            InvalidRequest: naming the parameter that is out of range.
        """
        # Few of them are set, and only those are looked at.
        found = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING}
        found |= given
        if found.get("top_p") == 0:
            # The smallest set of likely tokens is the likeliest alone.
            found |= {"top_p": None, "temperature": 0.0}
        found = {name: value for name, value in found.items() if value is not None}
        if self.repetition_detection is not None:
            found["repetition_detection"] = self.repetition_detection.model_dump()
        found["any_end"] = not (self.return_token_ids or self.include_stop_str_in_output)
        return SamplingParams.from_defaults({"max_tokens": None, **defaults}, **found)

    def constraint(self) -> tuple[StructuredSpec | None, str | None]:
        """The constraint on the answer's form, and the field that asks for it.

        Raises:
            InvalidRequest: there are several.
        """
        found = list(self._constraints()) if self.model_fields_set & _CONSTRAINTS else []
        if len(found) > 1:
            raise InvalidRequest(
                f"Only one field can constrain an answer; {found[0][1]} and {found[1][1]} both do.",
                param=found[1][1],
            )
        return found[0] if found else (None, None)

    def _constraints(self):
        given = self.response_format
        if given is not None and given.json_schema is not None:
            yield StructuredSpec(kind="json_schema", text=given.json_schema.text), "response_format"
        elif given is not None and given.type == "json_object":
            yield StructuredSpec(kind="json_object"), "response_format"
        more = self.structured_outputs or StructuredOutputs()
        for kind, values in (
            ("json_schema", {"guided_json": self.guided_json, "structured_outputs.json": more.json_}),
            ("regex", {"guided_regex": self.guided_regex, "structured_outputs.regex": more.regex}),
            ("choice", {"guided_choice": self.guided_choice, "structured_outputs.choice": more.choice}),
            ("grammar", {"guided_grammar": self.guided_grammar, "structured_outputs.grammar": more.grammar}),
        ):
            for field, value in values.items():
                if value is not None:
                    text = value if isinstance(value, str) else json.dumps(value)
                    yield StructuredSpec(kind=kind, text=text), field  # type: ignore[arg-type]
        if more.json_object:
            yield StructuredSpec(kind="json_object"), "structured_outputs.json_object"


def check_verbosity(value: str | None, field: str) -> None:
    """Refuse a length of answers that no model here knows to keep.

    Raises:
        UnsupportedParameter: it isn't ``medium``, which asks for nothing.
    """
    if value not in (None, "medium"):
        raise unsupported(field, "ask for short answers in the messages")


class ConversationBody(GenerationBody):
    """Fields and answers of every body that asks for the answer to a conversation.

    Without ``include_reasoning`` the model thinks, but its thoughts are left out of the answer. With
    ``enable_thinking`` false it doesn't think, if its chat template knows how.
    ``mm_processor_kwargs`` and ``media_io_kwargs`` hold for all media of it, see
    :func:`engine.inputs.media_options.with_options`.
    """

    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    include_reasoning: bool = True
    enable_thinking: bool | None = None

    def check_one_answer(self) -> None:
        """Refuse several answers, for endpoints that have no place for them.

        Raises:
            UnsupportedParameter: ``n`` is more than 1.
        """
        if self.n not in (None, 1):
            raise UnsupportedParameter(
                "Unsupported parameter: 'n' can only be 1 here; send several requests", param="n"
            )

    def constraint_of(
        self, spec: StructuredSpec | None, field: str
    ) -> tuple[StructuredSpec | None, str | None]:
        """The constraint ``spec`` of this endpoint's own ``field``, or that of the shared fields.

        Raises:
            InvalidRequest: there are several.
        """
        other, other_field = GenerationBody.constraint(self)
        if spec is None or other is None:
            return (other, other_field) if spec is None else (spec, field)
        raise InvalidRequest(
            f"Only one field can constrain an answer; {field} and {other_field} both do.", param=other_field
        )

    def tool_use(self) -> ToolUse:
        """The functions that the answer may call; errors as :func:`deployments.tools.read_tools`."""
        raise NotImplementedError

    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template."""
        asked = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**asked, **(self.chat_template_kwargs or {})}

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the request's sampling parameters; errors as :meth:`sampling`."""
        raise NotImplementedError

    def budget(self) -> int | None:
        """The most tokens of a thought; None if there is no bound."""
        return None
