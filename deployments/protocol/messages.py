"""Anthropic's Messages API on the wire: its request, as parameters of a conversation."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from deployments.protocol.base import Part
from deployments.protocol.content_blocks import ChatMessages
from deployments.protocol.generation import ConversationBody, GenerationBody, JsonSchema
from deployments.tools import ToolUse, read_flat_tools
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec

#: Values of OpenAI's ``tool_choice`` by the type of Anthropic's.
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(Part):
    """Whether the model thinks first, and for how many tokens.

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
        return {**options, **(self.chat_template_kwargs or {})}


class MessagesRequest(MessagesBody):
    """Body of ``POST /v1/messages``."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationBody.REFUSED,
        "container": "tools that run on the server are not offered",
        "context_management": "send the messages that the model should see",
        "mcp_servers": "tools that run on the server are not offered",
        "n": "send several requests",
    }
    SILENT: ClassVar[frozenset[str]] = GenerationBody.SILENT | {
        "cache_control",
        "diagnostics",
        "inference_geo",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
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
        wanted = self.output_config.format
        if wanted is None:
            return super().constraint()
        other = super().constraint()[1]
        if other is not None:
            raise InvalidRequest(
                f"Only one field can constrain an answer; output_config.format and {other} both do.",
                param=other,
            )
        schema = JsonSchema(schema=wanted.json_schema)
        return StructuredSpec(kind="json_schema", text=schema.text), "output_config.format"

    def budget(self) -> int | None:
        """The most tokens of a thought."""
        return self.thinking.budget_tokens if self.thinking.type == "enabled" else None


class CountTokensRequest(MessagesBody):
    """Body of ``POST /v1/messages/count_tokens``."""

    REFUSED = MessagesRequest.REFUSED
    SILENT = MessagesRequest.SILENT | {"stop_sequences"}

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams()


def _without_kind(tool: Any) -> Any:
    """A tool of the client's own without its type, which may be left out."""
    if isinstance(tool, Mapping) and tool.get("type") in (None, "custom"):
        return {**tool, "type": "function"}
    return tool
