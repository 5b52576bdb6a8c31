"""The Responses API on the wire: its request, and its input items as chat messages."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import UnsupportedParameter
from deployments.protocol.base import Part
from deployments.protocol.generation import ConversationBody, GenerationBody, JsonSchema, check_verbosity
from deployments.protocol.plain_fields import ITEM, TOOL_CHOICE, Shape
from deployments.tools import ToolUse, name_in_namespace, read_flat_tools
from engine.errors import InvalidRequest
from engine.sampling_params import SamplingParams, StructuredSpec

Message = dict[str, Any]


class TextFormat(Part):
    """``text``, ``json_object``, or ``json_schema`` with its schema beside it."""

    SILENT: ClassVar[Mapping[str, str]] = {"description": "models are not shown the schema"}

    type: str = "text"
    name: str = ""
    json_schema: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool = True


class TextOptions(Part):
    format: TextFormat = TextFormat()
    verbosity: str | None = None


class ReasoningOptions(Part):
    SILENT: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("context", "generate_summary", "mode", "summary"), "thoughts come whole"
    )

    effort: str | None = None


class ResponsesRequest(ConversationBody):
    """Body of ``POST /v1/responses``.

    ``input`` and ``tools`` stay plain data; :func:`input_messages` and :mod:`deployments.tools` check them.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"input": "Hello!", "max_output_tokens": 32}
    REFUSED: ClassVar[Mapping[str, str]] = {
        **GenerationBody.REFUSED,
        "access_programs": "programs are not offered",
        "background_options": "retrieve the response by its id",
        "context_management": "send the items that the model should see",
        "enable_response_messages": "input_items and output have the items",
        "previous_input_messages": "send the items in input",
        "conversation": "send previous_response_id",
        "image": "answers are text",
        "logprob_token_ids": "use /v1/chat/completions",
        "repetition_detection": "use /v1/chat/completions",
        "return_prompt_text": "/tokenize with return_token_strs shows the prompt",
        "messages": "send input, or use /v1/chat/completions",
        "moderation": "answers are not moderated here",
        "prompt": "prompt templates are not stored here",
        "prompt_logprobs": "use /v1/chat/completions or /v1/completions",
        "return_token_ids": "use /v1/chat/completions or /v1/completions",
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        **{name: why for name, why in GenerationBody.SILENT.items() if name not in ("metadata", "store")},
        "max_tool_calls": "it bounds tools that run on the server, which are not offered",
    }

    PLAIN: ClassVar[Mapping[str, Shape]] = {"input": ITEM, "tool_choice": TOOL_CHOICE}

    input: str | list[Any] = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    top_logprobs: int | None = None
    include: list[str] = Field(default_factory=list)
    truncation: str = "disabled"
    service_tier: str | None = None
    store: bool = True
    background: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        # The stream of a response always ends with its usage; its own options change nothing.
        self.stream_options = None
        super().check()
        self.check_one_answer()
        check_verbosity(self.text.verbosity, "text.verbosity")
        if not self.input and self.previous_response_id is None:
            raise InvalidRequest("input must not be empty.", param="input")
        if self.background and self.stream and (self.top_logprobs is not None or self.include):
            raise UnsupportedParameter(
                "Unsupported parameter: a background response is streamed without log-probabilities.",
                param="include" if self.include else "top_logprobs",
            )
        if self.background and not self.store:
            raise InvalidRequest("A background response must be stored.", param="store")
        if self.truncation not in ("auto", "disabled"):
            raise InvalidRequest("truncation must be auto or disabled.", param="truncation")

    def tool_use(self) -> ToolUse:
        """The functions that may be called; tools that would run on the server are refused by name."""
        return read_flat_tools(self.tools or (), self.tool_choice, self.parallel_tool_calls)

    def constraint(self) -> tuple[StructuredSpec | None, str | None]:
        wanted, spec = self.text.format, None
        if wanted.type == "json_object":
            spec = StructuredSpec(kind="json_object")
        elif wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise InvalidRequest("text.format needs a schema.", param="text.format.schema")
            schema = JsonSchema(name=wanted.name, schema=wanted.json_schema, strict=wanted.strict)
            spec = StructuredSpec(kind="json_schema", text=schema.text)
        elif wanted.type != "text":
            raise InvalidRequest(
                "text.format.type must be text, json_object or json_schema.", param="text.format.type"
            )
        return self.constraint_of(spec, "text.format")

    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template."""
        options: dict[str, Any] = {}
        if self.reasoning.effort is not None:
            options |= {
                "reasoning_effort": self.reasoning.effort,
                "enable_thinking": self.reasoning.effort != "none",
            }
        return {**options, **super().template_options()}

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return the request's sampling parameters; errors as :meth:`sampling`."""
        tokens = self.max_output_tokens if self.max_output_tokens is not None else self.max_tokens
        logprobs = self.top_logprobs
        if logprobs is None and "message.output_text.logprobs" in self.include:
            logprobs = 0
        return self.sampling(defaults, max_tokens=tokens, logprobs=logprobs, n=1)


class InputTokensRequest(ResponsesRequest):
    """Body of ``POST /v1/responses/input_tokens``."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"input": "Hello!"}

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams()


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Response(BaseModel):
    """A response. Items of ``output`` are ``message``, ``reasoning``, ``function_call`` and
    ``custom_tool_call``."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "failed", "in_progress", "cancelled", "incomplete"]
    background: bool
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    instructions: str | None
    metadata: dict[str, Any]
    model: str
    output: list[dict[str, Any]]
    previous_response_id: str | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    usage: dict[str, Any] | None


class ResponseEvent(BaseModel):
    """A typed event of a stream, as OpenAI's clients know them."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(BaseModel):
    """The items of a response's input."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def input_messages(given: str | Sequence[Any], before: int = 0) -> tuple[list[Message], dict[str, str]]:
    """Turn a response's input into chat messages.

    Args:
        before: messages that the conversation has before these.

    Returns:
        The messages, and the fields of ``input`` by the fields of ``messages`` that were made from them.

    Raises:
        InvalidRequest: naming the item that can't be used.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}], {f"messages[{before}]": "input"}
    messages: list[Message] = []
    fields: dict[str, str] = {}
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(item, Mapping):
            raise InvalidRequest(f"{where} must be an object.", param=where)
        made = _add_item(messages, item, where)
        at = f"messages[{before + len(messages) - 1}]"
        fields.setdefault(at, where)
        fields |= {f"{at}.{name}": f"{where}.{field}" for name, field in made.items()}
    return messages, fields


def _add_item(messages: list[Message], item: Mapping[str, Any], where: str) -> dict[str, str]:
    """Add an item to the last message, or as a new one; returns the item's fields by the message's."""
    kind = item.get("type") or ("message" if item.keys() & {"role", "content"} else "item_reference")
    if kind == "message":
        content = item.get("content")
        if item.get("role") == "assistant" and _open_turn(messages) and "content" not in messages[-1]:
            # A thought came before its visible text.
            messages[-1]["content"] = content
        else:
            messages.append({"role": item.get("role"), "content": content})
        return {"content": "content"}
    if kind in ("function_call", "custom_tool_call"):
        name, namespace = item.get("name"), item.get("namespace")
        if not isinstance(namespace, str | None):
            raise InvalidRequest(f"{where}.namespace must be a string.", param=f"{where}.namespace")
        if isinstance(name, str):
            name = name_in_namespace(namespace, name)
        if kind == "function_call":
            holder, given, value = "function", "arguments", item.get("arguments") or "{}"
        else:
            holder, given, value = "custom", "input", item.get("input")
        call = {"id": item.get("call_id"), "type": holder, holder: {"name": name, given: value}}
        if not _open_turn(messages):
            messages.append({"role": "assistant"})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append(call)
        at = f"tool_calls[{len(calls) - 1}]"
        return {f"{at}.id": "call_id", f"{at}.{holder}": "name", f"{at}.{holder}.{given}": given}
    if kind in ("function_call_output", "custom_tool_call_output"):
        content = item.get("output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        return {"content": "output", "tool_call_id": "call_id"}
    if kind == "reasoning":
        text = "\n".join([*_texts(item, "content", where), *_texts(item, "summary", where)])
        messages.append({"role": "assistant", **({"reasoning_content": text} if text else {"content": ""})})
        return {}
    raise InvalidRequest(
        f"{where}.type {kind!r} is not supported; message, function_call, function_call_output, "
        "custom_tool_call, custom_tool_call_output and reasoning are.",
        param=f"{where}.type",
    )


def _texts(item: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
    """The texts of a thought's parts.

    Raises:
        InvalidRequest: naming the part that has none.
    """
    parts = item.get(name) or []
    if not isinstance(parts, list):
        raise InvalidRequest(f"{where}.{name} must be a list of parts.", param=f"{where}.{name}")
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            field = f"{where}.{name}[{index}].text"
            raise InvalidRequest(f"{field} must be a string.", param=field)
        yield text


def _open_turn(messages: list[Message]) -> bool:
    """Return whether the last message is the assistant's, to which calls and text may be added."""
    return bool(messages) and messages[-1]["role"] == "assistant"
