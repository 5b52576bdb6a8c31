"""Chat completions on the wire: OpenAI's fields, and those that vLLM's users know beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from deployments.protocol.base import Part
from deployments.protocol.generation import ConversationBody, GenerationBody, check_verbosity
from deployments.protocol.plain_fields import CHAT, FUNCTION, NAMED, TOOL_CHOICE, Shape
from deployments.protocol.usage import UsageBody
from deployments.tools import ToolUse, read_functions, read_tools
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams

_NO_THINKING = ("none", "disabled")


def ends_with_prefix(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last message is the beginning of the answer: the clients of Mistral and DeepSeek say
    so by ``prefix``.

    Raises:
        InvalidRequest: another message says so.
    """
    for index, message in enumerate(messages):
        said = message.get("prefix")
        if said is None or said is False:
            continue
        if said is not True or message.get("role") != "assistant" or index < len(messages) - 1:
            raise InvalidRequest(
                "prefix can be true in the last message alone, and only in one of the assistant.",
                param=f"messages[{index}].prefix",
            )
        return True
    return False


class Thinking(Part):
    """Thoughts as Anthropic's clients ask for them."""

    type: Literal["enabled", "disabled", "adaptive"] = "enabled"
    budget_tokens: int | None = Field(default=None, ge=0)


class ChatCompletionRequest(ConversationBody):
    """Body of ``POST /v1/chat/completions``.

    ``messages`` stay plain data: :func:`engine.inputs.messages.parse_messages` checks them and says which
    part is wrong. So do tools: :mod:`deployments.tools` checks them.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "messages": [{"role": "user", "content": "Hello!"}],
        "max_tokens": 32,
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationBody.REFUSED,
        "add_special_tokens": "the chat template writes them",
        "audio": "answers are text",
        "echo": "use /v1/completions",
        "moderation": "answers are not moderated here",
        "suffix": "",
        "web_search_options": "tools that run on the server are not offered",
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        **GenerationBody.SILENT,
        "separate_reasoning": "thoughts are always apart from the text",
        "stream_reasoning": "thoughts are streamed as they come",
        "prediction": "it could only make an answer faster",
    }

    PLAIN: ClassVar[Mapping[str, Shape]] = {
        **CHAT,
        "functions": FUNCTION,
        "function_call": NAMED,
        "tool_choice": TOOL_CHOICE,
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    return_tokens_as_token_ids: bool = False
    return_prompt_text: bool = False
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    thinking: Thinking | None = None
    thinking_budget: int | None = Field(default=None, ge=0)
    thinking_token_budget: int | None = Field(default=None, ge=-1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def continues(self) -> bool:
        """The answer goes on with the last message."""
        return self.continue_final_message or ends_with_prefix(self.messages)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.logprob_token_ids and not self.logprobs:
            raise InvalidRequest("logprob_token_ids needs logprobs to be true.", param="logprob_token_ids")
        check_verbosity(self.verbosity, "verbosity")
        if self.modalities is not None and set(self.modalities) - {"text"}:
            raise InvalidRequest("modalities can only be text here: there is no audio.", param="modalities")
        if self.tools and self.functions:
            raise InvalidRequest("functions and tools exclude each other.", param="functions")
        if self.tools and self.function_call not in (None, "auto"):
            raise InvalidRequest("Send tool_choice with tools, not function_call.", param="function_call")
        if self.in_older_form and self.tool_choice not in (None, "auto"):
            raise InvalidRequest("Send function_call with functions, not tool_choice.", param="tool_choice")
        explicit = "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and self.add_generation_prompt and explicit:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
            )

    @property
    def in_older_form(self) -> bool:
        """The request has ``functions`` instead of tools, and so have its answers."""
        return not self.tools and bool(self.functions or self.function_call)

    def tool_use(self) -> ToolUse:
        """The tools that the answer may call; errors as :func:`deployments.tools.read_tools`."""
        if self.in_older_form:
            return read_functions(self.functions, self.function_call)
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template."""
        options: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            options["reasoning_effort"] = self.reasoning_effort
        asked = self.thinking.type if self.thinking is not None else self.reasoning_effort
        if asked is not None:
            options["enable_thinking"] = asked not in _NO_THINKING
        return {**options, **super().template_options()}

    def budget(self) -> int | None:
        """The most tokens of a thought."""
        return self._budget()[1]

    def _budget(self) -> tuple[str, int | None]:
        """The field that bounds thoughts, and its tokens; None if there is no bound."""
        if self.thinking_budget is not None:
            return "thinking_budget", self.thinking_budget
        if self.thinking_token_budget is not None:
            # vLLM: -1 is no bound.
            bound = self.thinking_token_budget
            return "thinking_token_budget", bound if bound >= 0 else None
        return "thinking.budget_tokens", self.thinking.budget_tokens if self.thinking is not None else None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the request's sampling parameters; errors as :meth:`sampling`."""
        tokens = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(defaults, max_tokens=tokens, logprobs=logprobs)

    def field_names(self) -> dict[str, str]:
        """The fields of this body by the name under which the engine knows what they ask for."""
        names = {"prompt": "messages", "logprobs": "top_logprobs", "thinking_budget": self._budget()[0]}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.in_older_form:
            names |= {"tools": "functions", "tool_choice": "function_call"}
        return names


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None = None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    """``arguments`` is JSON text."""

    name: str | None = None
    arguments: str = ""


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class CustomCall(BaseModel):
    name: str
    input: str


class CustomToolCall(BaseModel):
    id: str
    type: Literal["custom"] = "custom"
    custom: CustomCall


class CustomCallDelta(BaseModel):
    name: str | None = None
    input: str


class ToolCallDelta(BaseModel):
    """``id``, ``type`` and the name come with a call's first delta alone."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionCall | None = None
    custom: CustomCallDelta | None = None


class ChatMessage(BaseModel):
    """An answer. ``reasoning`` is the thought under the name that newer clients read."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall | CustomToolCall] | None = None
    function_call: FunctionCall | None = None


class Choice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Response of a request that is not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody
    service_tier: str | None = None
    system_fingerprint: str | None = None
    prompt_logprobs: list[dict[int, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    function_call: FunctionCall | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | None = None
    service_tier: str | None = None
    prompt_token_ids: list[int] | None = None
    prompt_text: str | None = None
