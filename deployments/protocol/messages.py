"""Anthropic's Messages API on the wire: its request, as parameters of a conversation."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.protocol.base import Part
from deployments.protocol.content_blocks import ChatMessages
from deployments.protocol.generation import ConversationBody, GenerationBody, JsonSchema
from deployments.tools import ToolUse, read_flat_tools
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec

#: Values of OpenAI's ``tool_choice`` by the type of Anthropic's.
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(Part):
    """A switch for thinking first, and the tokens that it may take.

    Attributes:
        display: ``omitted`` leaves the text of thoughts out of the answer.
    """

    type: Literal["enabled", "disabled", "adaptive"] = "disabled"
    budget_tokens: int | None = Field(default=None, ge=0)
    display: Literal["summarized", "omitted"] = "summarized"


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(Part):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(Part):
    effort: str | None = None
    format: OutputFormat | None = None


class MessagesBody(ConversationBody):
    """Fields of a conversation in Anthropic's form, without those of its answer.

    ``messages``, ``system`` and ``tools`` stay plain data: :mod:`deployments.protocol.content_blocks` and
    :mod:`deployments.tools` check them.

    Attributes:
        FIELD_NAMES: fields of this body by the name under which the engine knows what they ask for.
        output_format: ``output_config.format`` under the name that it had in its beta.
    """

    FIELD_NAMES: ClassVar[Mapping[str, str]] = {
        "prompt": "messages",
        "default_max_tokens": "max_tokens",
        "stop": "stop_sequences",
        "thinking_budget": "thinking.budget_tokens",
    }

    messages: list[Any]
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking = Thinking()
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None

    def check(self) -> None:
        super().check()
        self.check_one_answer()
        if self.output_format is not None and self.output_config.format is not None:
            raise InvalidRequest("Give output_config.format alone.", param="output_format")

    def chat_messages(self) -> ChatMessages:
        """The conversation in OpenAI's form.

        Raises:
            InvalidRequest, UnsupportedParameter: naming the block that can't be used.
        """
        chat = ChatMessages()
        if self.system:
            chat.add({"role": "system", "content": self.system}, "system")
        for index, message in enumerate(self.messages):
            chat.add(message, f"messages[{index}]")
        return chat

    def tool_use(self) -> ToolUse:
        """The functions that may be called; tools that would run on the server are refused by name."""
        given = self.tool_choice
        choice: Any = None
        if given is not None:
            choice = _CHOICES.get(given.type) or {"type": "tool", "name": given.name}
        parallel = given is None or not given.disable_parallel_tool_use
        tools = [_without_kind(tool) for tool in self.tools or ()]
        return read_flat_tools(tools, choice, parallel, parameters="input_schema")

    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template. Thoughts are off unless they are asked for."""
        options: dict[str, Any] = {"enable_thinking": self.thinking.type != "disabled"}
        if self.output_config.effort is not None:
            options["reasoning_effort"] = self.output_config.effort
        return {**options, **super().template_options()}


class MessagesRequest(MessagesBody):
    """Body of ``POST /v1/messages``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 32,
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationBody.REFUSED,
        "container": "tools that run on the server are not offered",
        "context_management": "send the messages that the model should see",
        "logprob_token_ids": "use /v1/chat/completions",
        "repetition_detection": "use /v1/chat/completions",
        "return_prompt_text": "/tokenize with return_token_strs shows the prompt",
        "mcp_servers": "tools that run on the server are not offered",
        "prompt_logprobs": "use /v1/chat/completions or /v1/completions",
        "return_token_ids": "use /v1/chat/completions or /v1/completions",
    }
    #: No thought is taken out of the messages here, which agents ask for with every request.
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {
        **GenerationBody.DEFAULTS,
        "context_management": (
            {"edits": []},
            *(
                {"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
                for keep in ("all", {"type": "all"})
            ),
        ),
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        **GenerationBody.SILENT,
        "cache_control": "every prompt is cached",
        "diagnostics": "the usage says what was cached",
        "inference_geo": "the model runs where it is served",
        "service_tier": "there is one tier",
        "speed": "there is one speed",
        "user_profile_id": "a note for the provider's records",
        "workspace_id": "a note for the provider's records",
    }

    max_tokens: int
    stop_sequences: list[str] | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the request's sampling parameters; errors as :meth:`sampling`.

        ``max_tokens`` may be more than the context has room for: clients send one value with every request.
        """
        stop = self.stop if self.stop_sequences is None else self.stop_sequences
        given = {"max_tokens": None, "default_max_tokens": self.max_tokens, "stop": stop, "n": 1}
        return self.sampling(defaults, **given)

    def constraint(self) -> tuple[StructuredSpec | None, str | None]:
        field, wanted, spec = "output_config.format", self.output_config.format, None
        if self.output_format is not None:
            field, wanted = "output_format", self.output_format
        if wanted is not None:
            spec = StructuredSpec(kind="json_schema", text=JsonSchema(schema=wanted.json_schema).text)
        return self.constraint_of(spec, field)

    def budget(self) -> int | None:
        """The most tokens of a thought."""
        return self.thinking.budget_tokens if self.thinking.type == "enabled" else None


class CountTokensRequest(MessagesBody):
    """Body of ``POST /v1/messages/count_tokens``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"messages": [{"role": "user", "content": "Hello!"}]}
    REFUSED = MessagesRequest.REFUSED
    DEFAULTS = MessagesRequest.DEFAULTS
    SILENT: ClassVar[Mapping[str, str]] = {
        **MessagesRequest.SILENT,
        "stop_sequences": "they are no part of the prompt",
    }

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams()


class CountedTokens(BaseModel):
    input_tokens: int


class MessageUsage(BaseModel):
    """Token counts. ``input_tokens`` are those that were not read from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class Message(BaseModel):
    """An answer in Anthropic's form. Blocks of ``content`` are ``text``, ``thinking`` and ``tool_use``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """An event of a stream in Anthropic's form."""

    model_config = ConfigDict(extra="allow")

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


def _without_kind(tool: Any) -> Any:
    """A tool of the client's own without its type, which may be left out."""
    if isinstance(tool, Mapping) and tool.get("type") in (None, "custom"):
        return {**tool, "type": "function"}
    return tool
