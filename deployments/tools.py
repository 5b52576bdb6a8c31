"""Applies a request's tools and thinking options to its prompt, grammar and answer."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.errors import UnsupportedParameter
from deployments.unknown_fields import log_unknown
from engine.errors import InvalidRequest
from engine.parsers.answer import AnswerParser
from engine.parsers.formats import (
    REASONING_TAGS,
    TOOL_FORMATS,
    ToolFormat,
    reasoning_tags_of,
    tool_format_of,
)
from engine.parsers.grammar import (
    SpecialTokens,
    ToolSchema,
    grammar_behind_thought,
    grammar_with_budget,
    tool_grammar,
)
from engine.parsers.reasoning import ReasoningParser, ReasoningTags
from engine.sampling_params import StructuredSpec
from engine.structured.json_schema import close_objects

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_FUNCTION_FIELDS = ("name", "description", "strict", "input_examples")

#: Fields of tools that are functions themselves. Those that are no part of the function change no answer:
#: prompts are always cached, tools always shown, arguments always streamed, and only the client calls.
_FLAT_FIELDS = frozenset(
    {
        *_FUNCTION_FIELDS,
        "allowed_callers",
        "cache_control",
        "defer_loading",
        "eager_input_streaming",
        "function",
        "output_schema",
        "type",
    }
)
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that an answer may call.

    Attributes:
        functions: as the chat template takes them: ``{"type": "function", "function": {...}}``.
        schemas: what the grammar holds the arguments to, by function.
        choice: ``required`` demands a call of one of ``allowed``.
        allowed: names of the functions that may be called; all if None.
        parallel: whether an answer may hold several calls.
    """

    functions: tuple[Mapping[str, Any], ...] = ()
    schemas: tuple[ToolSchema, ...] = ()
    choice: Literal["none", "auto", "required"] = "none"
    allowed: frozenset[str] | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[ToolSchema, ...]:
        """The functions that may be called."""
        return tuple(tool for tool in self.schemas if self.allowed is None or tool.name in self.allowed)

    @property
    def by_name(self) -> dict[str, Mapping[str, Any]]:
        return {tool.name: tool.parameters for tool in self.schemas}


NO_TOOLS = ToolUse()


def read_tools(tools: Any, tool_choice: Any, parallel: bool | None) -> ToolUse:
    """Read OpenAI's ``tools``, ``tool_choice`` and ``parallel_tool_calls``.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    if tools is None or tools == []:
        if tool_choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools to choose from.", param="tool_choice")
        return NO_TOOLS
    if not isinstance(tools, list):
        raise InvalidRequest("tools must be a list.", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{len(tools)} tools are more than the {MAX_TOOLS} allowed.", param="tools")
    functions: list[dict[str, Any]] = []
    schemas: list[ToolSchema] = []
    for index, tool in enumerate(tools):
        function, schema = _function(tool, f"tools[{index}]")
        if any(schema.name == other.name for other in schemas):
            raise InvalidRequest(
                f"tools[{index}]: the name {schema.name!r} is used twice.",
                param=f"tools[{index}].function.name",
            )
        functions.append(function)
        schemas.append(schema)
    choice, allowed = _choice(tool_choice, {schema.name for schema in schemas})
    return ToolUse(tuple(functions), tuple(schemas), choice, allowed, parallel is not False)


def read_functions(functions: Any, function_call: Any) -> ToolUse:
    """Read ``functions`` and ``function_call``, the older form of tools; errors as :func:`read_tools`."""
    if functions is None or functions == []:
        if function_call not in (None, "none", "auto"):
            raise InvalidRequest("function_call needs functions to choose from.", param="function_call")
        return NO_TOOLS
    if not isinstance(functions, list):
        raise InvalidRequest("functions must be a list.", param="functions")
    tools = [{"type": "function", "function": function} for function in functions]
    choice = function_call
    if isinstance(function_call, Mapping):
        choice = {"type": "function", "function": function_call}
    try:
        return read_tools(tools, choice, False)
    except InvalidRequest as error:
        spelled = {"tools[": "functions[", ".function": "", "tool_choice": "function_call"}
        raise _respelled(error, spelled) from None


def read_flat_tools(
    tools: Sequence[Any], tool_choice: Any, parallel: bool | None, *, parameters: str = "parameters"
) -> ToolUse:
    """Read tools that are functions themselves instead of holding one under ``function``.

    Args:
        parameters: the field of a tool that holds its schema.

    Raises:
        InvalidRequest: as :func:`read_tools`.
        UnsupportedParameter: a tool would run on the server.
    """
    nested = []
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind != "function":
            raise UnsupportedParameter(
                f"Unsupported parameter: tools[{index}] is {str(kind)[:100]!r}; only functions are offered.",
                param=f"tools[{index}].type",
            )
        log_unknown("Tool", tool, _FLAT_FIELDS | {parameters}, "tools[].")
        # The chat template shows a function as it is: what isn't part of it would change the prompt.
        function = {key: tool[key] for key in _FUNCTION_FIELDS if key in tool}
        function["parameters"] = tool.get(parameters)
        nested.append({"type": "function", "function": tool.get("function", function)})
    try:
        return read_tools(nested, tool_choice, parallel)
    except InvalidRequest as error:
        raise _respelled(error, {".function.parameters": f".{parameters}", ".function": ""}) from None


def _respelled(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The error with the caller's spelling in place of each of ``names``."""
    for name, spelled in names.items():
        error.message = error.message.replace(name, spelled)
        error.param = (error.param or "").replace(name, spelled)
    return error


def _function(tool: Any, where: str) -> tuple[dict[str, Any], ToolSchema]:
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} must be an object with a type and a function.", param=where)
    kind = tool.get("type", "function")
    if kind != "function":
        raise UnsupportedParameter(
            f"Unsupported parameter: {where}.type is {str(kind)[:100]!r}; only functions are offered.",
            param=f"{where}.type",
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where}.function must be an object with a name.", param=f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.function.name must have 1 to 128 letters, digits, or any of _ . : -",
            param=f"{where}.function.name",
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(
            f"{where}.function.description must be a string.", param=f"{where}.function.description"
        )
    examples = function.get("input_examples")
    if examples is not None and not (
        isinstance(examples, list) and all(isinstance(each, Mapping) for each in examples)
    ):
        raise InvalidRequest(
            f"{where}.function.input_examples must be a list of objects.",
            param=f"{where}.function.input_examples",
        )
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidRequest(
            f"{where}.function.strict must be true or false.", param=f"{where}.function.strict"
        )
    parameters = function.get("parameters")
    if parameters is None or parameters == {}:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
        raise InvalidRequest(
            f"{where}.function.parameters must be the JSON schema of an object.",
            param=f"{where}.function.parameters",
        )
    schema = {"type": "object", **parameters}
    if function.get("strict") is not False:
        schema = close_objects(schema)
    shown = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {"type": "function", "function": {**shown, "parameters": parameters}}, ToolSchema(name, schema)


def _choice(given: Any, names: set[str]) -> tuple[Literal["none", "auto", "required"], frozenset[str] | None]:
    if given is None or given == "auto":
        return "auto", None
    if given == "none" or given == "required":
        return given, None
    if given == "any":
        return "required", None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "allowed_tools":
        return _allowed(given, names)
    if kind in ("function", "tool"):
        return "required", frozenset([_named(given, names, "tool_choice")])
    raise InvalidRequest(
        "tool_choice must be none, auto, required, or name one of the tools.", param="tool_choice"
    )


def _allowed(given: Mapping[str, Any], names: set[str]) -> tuple[Literal["auto", "required"], frozenset[str]]:
    """The mode and the names of a choice among some of the tools."""
    allowed, where = given, "tool_choice"
    if "allowed_tools" in given:
        allowed, where = given["allowed_tools"], "tool_choice.allowed_tools"
    if not isinstance(allowed, Mapping):
        raise InvalidRequest(f"{where} must be an object with mode and tools.", param=where)
    mode, tools = allowed.get("mode", "auto"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest(f"{where}.mode must be auto or required.", param=f"{where}.mode")
    if not isinstance(tools, list) or not tools:
        raise InvalidRequest(f"{where}.tools must be a list of functions.", param=f"{where}.tools")
    return mode, frozenset(_named(tool, names, f"{where}.tools[{i}]") for i, tool in enumerate(tools))


def _named(choice: Any, names: set[str], where: str) -> str:
    """The function that a choice names.

    Raises:
        InvalidRequest: it is none of ``names``.
    """
    if isinstance(choice, Mapping) and "function" in choice:
        choice, where = choice["function"], f"{where}.function"
    name = choice.get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str) or name not in names:
        shown = repr(name)[:100]
        raise InvalidRequest(f"{where} names {shown}, which is not among the tools.", param=f"{where}.name")
    return name


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """One model's format of tool calls and thoughts.

    Attributes:
        special: the tokenizer's added tokens.
        tools: the format of calls; None if the chat template shows no tools.
        reasoning: the tags of thoughts; None if the model doesn't think.
    """

    special: SpecialTokens
    tools: ToolFormat | None = None
    reasoning: ReasoningTags | None = None

    def begins_inside(self, prompt: str | None) -> bool:
        """Return whether the prompt has opened a thought."""
        return self.reasoning is not None and (prompt or "").rstrip().endswith(self.reasoning.start)

    def check(self, use: ToolUse) -> None:
        """Refuse tools that the model wouldn't see.

        Raises:
            InvalidRequest: the chat template shows no tools, so that only a required call can be had.
        """
        if use.choice == "auto" and self.tools is None:
            raise InvalidRequest(
                "This model's chat template shows no tools, so it can't choose one. Serve a model with a "
                "template for tools, set tool_parser in its configuration, or send tool_choice 'required'.",
                param="tools",
            )

    def parser(self, use: ToolUse, prompt: str | None) -> AnswerParser | None:
        """Make the parser of one answer; None where the text is all there is."""
        calls = None
        if use.choice != "none":
            calls = self._calls.parser(use.by_name)
        reasoning = None
        if self.reasoning is not None:
            reasoning = ReasoningParser(self.reasoning, begins_inside=self.begins_inside(prompt))
        if calls is None and reasoning is None:
            return None
        return AnswerParser(reasoning, calls, calls_in_thoughts=self._calls.anywhere)

    @property
    def _calls(self) -> ToolFormat:
        # A required call is written by the grammar, also where the template shows no tools.
        return self.tools or TOOL_FORMATS["hermes"]

    def constraint(
        self,
        use: ToolUse,
        structured: StructuredSpec | None,
        prompt: str | None,
        thinking_budget: int | None = None,
    ) -> StructuredSpec | None:
        """Return the answer's constraint: calls, a format that begins after the thought, a bounded thought.

        Raises:
            InvalidRequest: ``structured`` can't be combined with the rest.
        """
        inside = self.begins_inside(prompt)
        if use.choice != "none":
            if structured is not None and use.choice == "required":
                raise InvalidRequest(
                    "An answer that must call a tool can't follow another constraint too.",
                    param="tool_choice",
                )
            # With both, the constraint on the text wins where the model is free to call or not.
            if structured is None:
                lark = tool_grammar(
                    self._calls.layout,
                    use.callable,
                    self.special,
                    choice="required" if use.choice == "required" else "auto",
                    parallel=use.parallel,
                    reasoning=self.reasoning,
                    begins_inside=inside,
                )
                return StructuredSpec(kind="grammar", text=lark)
        if self.reasoning is None:
            return structured
        if structured is not None:
            body = _expression(structured)
            if body is None:
                return structured
            lark = grammar_behind_thought(body, self.special, self.reasoning, begins_inside=inside)
            return StructuredSpec(kind="grammar", text=lark)
        if thinking_budget is not None:
            try:
                lark = grammar_with_budget(
                    self.special, self.reasoning, thinking_budget, begins_inside=inside
                )
            except ValueError as error:
                raise InvalidRequest(
                    f"This model's thoughts can't be bounded: {error}.", param="thinking_budget"
                ) from None
            return StructuredSpec(kind="grammar", text=lark)
        return None


def _expression(spec: StructuredSpec) -> str | None:
    """A constraint as an expression within a larger grammar; None for grammars, which can't be embedded."""
    if spec.kind == "json_object":
        return '%json {"type": "object"}'
    if spec.kind == "json_schema":
        return f"%json {spec.text}"
    if spec.kind == "choice":
        return (
            "(" + " | ".join(json.dumps(entry, ensure_ascii=False) for entry in json.loads(spec.text)) + ")"
        )
    if spec.kind == "regex":
        return "/" + spec.text.replace("/", r"\/") + "/"
    return None


def answer_format(
    template: Sequence[str], special: SpecialTokens, tool_parser: str | None, reasoning_parser: str | None
) -> AnswerFormat:
    """The format of a model, from the text of its chat templates or as the configuration names it.

    Args:
        tool_parser, reasoning_parser: ``auto`` lets the template tell, ``none`` turns parsing off.
    """
    text = "\n".join(template)
    tools = tool_format_of(text) if tool_parser in (None, "auto") else TOOL_FORMATS.get(tool_parser or "")
    if reasoning_parser in (None, "auto"):
        reasoning = reasoning_tags_of(text)
    else:
        reasoning = REASONING_TAGS.get(reasoning_parser or "")
    return AnswerFormat(special, tools, reasoning)
