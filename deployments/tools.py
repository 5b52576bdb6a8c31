"""Reads the tools of a request, in each of the forms in which clients send them."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from deployments.caller_fields import caller_fields
from deployments.errors import UnsupportedParameter
from deployments.unknown_fields import log_unknown
from engine.errors import InvalidRequest
from engine.parsers.call_forms import whole_text
from engine.parsers.free_text import ARGUMENT
from engine.parsers.grammar import CallForm, Rules, SpecialTokens, ToolSchema
from engine.sampling_params import MAX_REGEX_LENGTH
from engine.structured.checks import MAX_SCHEMA_NODES, count_values
from engine.structured.json_schema import close_objects, not_followed
from engine.structured.prepare import checked_schema

MAX_TOOLS = 128
#: Values of the JSON schemas of a request's tools, and characters of their Lark grammars: either takes some
#: tenths of a second to be made a grammar of.
MAX_VALUES, MAX_LARK = 2 * MAX_SCHEMA_NODES, 2 * MAX_REGEX_LENGTH
_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_FUNCTION_FIELDS = ("name", "description", "strict", "input_examples")

#: Fields of tools that are functions themselves. Those that are no part of the function change no answer:
#: prompts are always cached, tools always shown, arguments always streamed, and only the client calls.
_FLAT_FIELDS = frozenset(
    {
        *_FUNCTION_FIELDS,
        "allowed_callers",
        "async",
        "cache_control",
        "defer_loading",
        "eager_input_streaming",
        "function",
        "output_schema",
        "type",
    }
)
#: Fields of custom tools in the same form.
_FLAT_CUSTOM = frozenset(
    {"allowed_callers", "async", "cache_control", "defer_loading", "description", "format", "name", "type"}
)
#: The beginning of refusals by type.
_UNSUPPORTED = "Unsupported parameter: "
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The functions that an answer may call.

    Attributes:
        functions: as the chat template takes them: ``{"type": "function", "function": {...}}``.
        schemas: what the grammar holds the arguments to, by function.
        fields: the caller's fields of ``schemas``.
        choice: ``required`` demands a call of one of ``allowed``.
        allowed: names of the functions that may be called; all if None.
        parallel: whether an answer may hold several calls.
        strict: names of the functions whose schemas are refused where no grammar can follow them; of others
            calls follow what can be followed.
        free: names of the custom tools. Models see them as functions of one text.
    """

    functions: tuple[Mapping[str, Any], ...] = ()
    schemas: tuple[ToolSchema, ...] = ()
    fields: tuple[str, ...] = ()
    choice: Literal["none", "auto", "required"] = "none"
    allowed: frozenset[str] | None = None
    parallel: bool = True
    strict: frozenset[str] = frozenset()
    free: frozenset[str] = frozenset()

    def callable(self, form: CallForm, special: SpecialTokens) -> list[ToolSchema]:
        """The functions that may be called, with schemas for a grammar.

        Args:
            form: of the calls.
            special: of the model.

        Raises:
            InvalidRequest: a schema can't be followed, or calls of this form can't be held to it.
        """
        found, trial = [], Rules(special)
        for tool, field in self._allowed():
            with caller_fields({"structured": field}):
                strict = tool.name in self.strict
                followed = replace(tool, parameters=checked_schema(tool.parameters, strict=strict))
                if strict:
                    _check_held(not_followed(tool.parameters), "calls")
                    _check_held(form.left_out(followed, trial), "calls in this model's format")
            found.append(followed)
        return found

    def _allowed(self) -> Iterator[tuple[ToolSchema, str]]:
        """The functions that may be called, each with its field."""
        for tool, field in zip(self.schemas, self.fields, strict=True):
            if self.allowed is None or tool.name in self.allowed:
                yield tool, field

    def digest(self) -> bytes:
        """A key that is the same where the same calls are allowed."""
        tools = [
            (tool.name, tool.parameters, tool.lark, tool.name in self.strict) for tool, _ in self._allowed()
        ]
        return hashlib.blake2b(json.dumps([self.choice, self.parallel, tools]).encode()).digest()

    @property
    def by_name(self) -> dict[str, Mapping[str, Any]]:
        return {tool.name: tool.parameters for tool in self.schemas}


def _check_held(left_out: Sequence[str], calls: str) -> None:
    """Refuse the schema of a strict function that some calls can't be held to."""
    if left_out:
        raise InvalidRequest(
            f"The JSON schema is refused: {calls} can't be held to {', '.join(left_out)} as it stands there; "
            "change it, or leave strict out.",
            param="structured",
        )


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
    fields: list[str] = []
    strict, free = set(), set()
    values = characters = 0
    for index, tool in enumerate(tools):
        kind = _kind(tool, f"tools[{index}]")
        where = f"tools[{index}].{kind}"
        given = _custom(tool.get(kind), where) if kind == "custom" else tool.get(kind)
        if kind == "function" and isinstance(given, Mapping):
            values += count_values(given.get("parameters"), MAX_VALUES - values)
            _check_sum(values, MAX_VALUES, "values", f"{where}.parameters")
        function, schema = _function(given, where)
        if kind == "custom":
            lark = _definition(tool[kind].get("format"), f"{where}.format", "lark")
            schema = replace(schema, lark=lark)
            characters += len(lark or "")
            _check_sum(characters, MAX_LARK, "characters", f"{where}.format.grammar.definition")
        name = schema.name
        if any(name == other.name for other in schemas):
            raise InvalidRequest(f"tools[{index}]: the name {name!r} is used twice.", param=f"{where}.name")
        functions.append(function)
        schemas.append(schema)
        fields.append(f"{where}.format.grammar.definition" if kind == "custom" else f"{where}.parameters")
        if kind == "custom":
            free.add(name)
        if given.get("strict") is True:
            strict.add(name)
    choice, allowed = _choice(tool_choice, {schema.name for schema in schemas})
    return ToolUse(
        tuple(functions),
        tuple(schemas),
        tuple(fields),
        choice,
        allowed,
        parallel is not False,
        frozenset(strict),
        frozenset(free),
    )


def _check_sum(sum_: int, most: int, unit: str, where: str) -> None:
    """Refuse the tool at ``where`` if the sum up to it is above ``most``: so much of one tool is allowed, but
    of all of them it would block the event loop for too long."""
    if sum_ > most:
        raise InvalidRequest(
            f"{where} is refused: with those of the tools before it, it has more than {most} {unit}.",
            param=where,
        )


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
    spelled = {"tools[": "functions[", ".function": "", "tool_choice": "function_call"}
    return _respelled(tools, choice, False, spelled)


def read_flat_tools(
    tools: Sequence[Any], tool_choice: Any, parallel: bool | None, *, parameters: str = "parameters"
) -> ToolUse:
    """Read tools that are functions or custom tools themselves instead of holding one under ``function`` or
    ``custom``, and namespaces of such tools.

    Args:
        parameters: the field of a tool that holds its schema.

    Raises:
        InvalidRequest: as :func:`read_tools`.
        UnsupportedParameter: a tool would run on the server.
    """
    nested, places = [], []
    for tool, where in _functions_of(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind not in ("function", "custom"):
            raise _not_offered(where, kind)
        places.append(where)
        if kind == "custom":
            log_unknown("Tool", tool, _FLAT_CUSTOM, "tools[].")
            nested.append({"type": kind, kind: {**tool, "format": _nested_format(tool.get("format"))}})
            continue
        log_unknown("Tool", tool, _FLAT_FIELDS | {parameters}, "tools[].")
        # The chat template shows a function as it is: what isn't part of it would change the prompt.
        function = {key: tool[key] for key in _FUNCTION_FIELDS if key in tool}
        function["parameters"] = tool.get(parameters)
        nested.append({"type": "function", "function": tool.get("function", function)})
    spelled = {
        ".function.parameters": f".{parameters}",
        ".function": "",
        ".custom.format.grammar": ".format",
        ".custom": "",
    }
    return _respelled(nested, tool_choice, parallel, spelled, places)


def _nested_format(form: Any) -> Any:
    """The format of a custom tool's input with its grammar in an object, as in Chat Completions."""
    is_grammar = isinstance(form, Mapping) and form.get("type") == "grammar"
    return {"type": "grammar", "grammar": form} if is_grammar else form


def _functions_of(tools: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """The tools and those of namespaces, each with its place.

    Raises:
        InvalidRequest: a namespace has no name or no tools.
    """
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "namespace":
            yield tool, where
            continue
        name, inner = tool.get("name"), tool.get("tools")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(f"{where}.name must be that of a namespace.", param=f"{where}.name")
        if not isinstance(inner, list):
            raise InvalidRequest(f"{where}.tools must be a list of functions.", param=f"{where}.tools")
        for number, each in enumerate(inner):
            function = _own_function(each) if isinstance(each, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                function = {**function, "name": name_in_namespace(name, function["name"])}
                each = {**each, "function": function} if "function" in each else function
            yield each, f"{where}.tools[{number}]"


def _own_function(tool: Mapping[str, Any]) -> Any:
    """The function that a tool holds, or is."""
    return tool.get("function", tool)


def name_in_namespace(namespace: str | None, name: str) -> str:
    """The name under which models call a function of a namespace, if it is in one."""
    return name if namespace is None else f"{namespace}.{name}"


def names_in_namespaces(tools: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """The namespaces and names of functions in namespaces, by the names under which models call them."""
    return {
        name_in_namespace(tool["name"], name): (tool["name"], name)
        for tool in tools
        if tool["type"] == "namespace"
        for name in (_own_function(each)["name"] for each in tool["tools"])
    }


#: The place of a tool, with which the name of one of its fields begins.
_PLACE = re.compile(r"tools\[(\d+)\]")


def _respelled(
    tools: list[Any],
    tool_choice: Any,
    parallel: bool | None,
    names: Mapping[str, str],
    places: Sequence[str] = (),
) -> ToolUse:
    """:func:`read_tools`, with the caller's spelling in place of each of ``names`` in the names of fields.

    Args:
        places: of the tools in the caller's body, where they are not those of ``tools``.
    """

    def spell(text: str) -> str:
        if text.startswith(_UNSUPPORTED):
            return _UNSUPPORTED + spell(text.removeprefix(_UNSUPPORTED))
        # A message begins with the name of a field. Behind it, it may quote the caller.
        field, *rest = text.split(" ", 1)
        for name, spelled in names.items():
            field = field.replace(name, spelled)
        if places and (place := _PLACE.match(field)) is not None:
            field = places[int(place[1])] + field[place.end() :]
        return " ".join([field, *rest])

    try:
        use = read_tools(tools, tool_choice, parallel)
    except (InvalidRequest, UnsupportedParameter) as error:
        error.message, error.param = spell(error.message), spell(error.param or "")
        raise
    return replace(use, fields=tuple(map(spell, use.fields)))


def _kind(tool: Any, where: str) -> str:
    """The type of a tool, which is also the field that holds it."""
    if not isinstance(tool, Mapping):
        raise InvalidRequest(f"{where} must be an object with a type and a function.", param=where)
    kind = tool.get("type", "function")
    if kind not in ("function", "custom"):
        raise _not_offered(where, kind)
    return str(kind)


def _not_offered(where: str, kind: Any) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"{_UNSUPPORTED}{where}.type is {str(kind)[:100]!r}; only functions and custom tools are offered, "
        "which the client runs.",
        param=f"{where}.type",
    )


def _custom(tool: Any, where: str) -> Any:
    """A custom tool, whose input is a text, as a function of that text."""
    if not isinstance(tool, Mapping):
        return tool
    form, where = tool.get("format"), f"{where}.format"
    text: dict[str, Any] = {"type": "string"}
    if (pattern := _pattern(form, where)) is not None:
        text["pattern"] = pattern
    if (lark := _definition(form, where, "lark")) is not None:
        text["description"] = f"A text by this Lark grammar:\n{lark}"
    parameters = {
        "type": "object",
        "properties": {ARGUMENT: text},
        "required": [ARGUMENT],
        "additionalProperties": False,
    }
    shown = {key: tool[key] for key in ("name", "description") if key in tool}
    return {**shown, "parameters": parameters, "strict": True}


def _definition(form: Any, where: str, syntax: str) -> str | None:
    """The grammar in a syntax that a custom tool's input follows; None if it is free, or follows another.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind != "grammar":
        raise InvalidRequest(f"{where}.type must be text or grammar.", param=f"{where}.type")
    grammar, where = form.get("grammar"), f"{where}.grammar"
    if not isinstance(grammar, Mapping):
        raise InvalidRequest(f"{where} must be an object with syntax and definition.", param=where)
    given, definition = grammar.get("syntax"), grammar.get("definition")
    if given not in ("lark", "regex"):
        raise InvalidRequest(f"{where}.syntax must be lark or regex.", param=f"{where}.syntax")
    if not isinstance(definition, str) or not definition:
        raise InvalidRequest(f"{where}.definition must be a grammar.", param=f"{where}.definition")
    if len(definition) > MAX_REGEX_LENGTH:
        raise InvalidRequest(
            f"{where}.definition has {len(definition)} characters, the limit is {MAX_REGEX_LENGTH}.",
            param=f"{where}.definition",
        )
    return definition if given == syntax else None


def _pattern(form: Any, where: str) -> str | None:
    """A JSON schema's pattern of the texts that a custom tool's input may be; None if no regex says it.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    definition = _definition(form, where, "regex")
    if definition is None:
        return None
    # The whole input matches, so anchors at the ends say nothing.
    inner = definition.removeprefix("^")
    if inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2:
        inner = inner[:-1]
    pattern = f"^(?:{inner})$"
    if whole_text(pattern) is None:
        raise InvalidRequest(
            f"{where}.grammar.definition must be a regex with ^ and $ at its ends alone: the whole input "
            "matches it.",
            param=f"{where}.grammar.definition",
        )
    return pattern


def _function(function: Any, where: str) -> tuple[dict[str, Any], ToolSchema]:
    """A function as the chat template takes it, and its schema.

    Args:
        where: the field that holds it.
    """
    if not isinstance(function, Mapping):
        raise InvalidRequest(f"{where} must be an object with a name.", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{where}.name must have 1 to 128 letters, digits, or any of _ . : -",
            param=f"{where}.name",
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidRequest(f"{where}.description must be a string.", param=f"{where}.description")
    examples = function.get("input_examples")
    if examples is not None and not (
        isinstance(examples, list) and all(isinstance(each, Mapping) for each in examples)
    ):
        raise InvalidRequest(
            f"{where}.input_examples must be a list of objects.",
            param=f"{where}.input_examples",
        )
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidRequest(f"{where}.strict must be true or false.", param=f"{where}.strict")
    parameters = function.get("parameters")
    if parameters is None or parameters == {}:
        parameters = _NO_PARAMETERS
    if not isinstance(parameters, Mapping) or parameters.get("type", "object") not in ("object", ["object"]):
        raise InvalidRequest(
            f"{where}.parameters must be the JSON schema of an object.",
            param=f"{where}.parameters",
        )
    _check_object(parameters, f"{where}.parameters")
    schema = {**parameters, "type": "object"}
    if function.get("strict") is not False:
        schema = close_objects(schema)
    shown = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {"type": "function", "function": {**shown, "parameters": parameters}}, ToolSchema(name, schema)


def _check_object(parameters: Mapping[str, Any], where: str) -> None:
    """Check what every format of calls reads of a schema."""
    if not isinstance(parameters.get("properties"), Mapping | None):
        raise InvalidRequest(f"{where}.properties must be an object.", param=f"{where}.properties")
    required = parameters.get("required")
    if required is not None and not (
        isinstance(required, list) and all(isinstance(name, str) for name in required)
    ):
        raise InvalidRequest(f"{where}.required must be a list of names.", param=f"{where}.required")


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
    if kind in ("function", "custom", "tool"):
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
        raise InvalidRequest(f"{where}.tools must be a list of tools.", param=f"{where}.tools")
    return mode, frozenset(_named(tool, names, f"{where}.tools[{i}]") for i, tool in enumerate(tools))


def _named(choice: Any, names: set[str], where: str) -> str:
    """The function that a choice names.

    Raises:
        InvalidRequest: it is none of ``names``.
    """
    for kind in ("function", "custom"):
        if isinstance(choice, Mapping) and kind in choice:
            choice, where = choice[kind], f"{where}.{kind}"
    name = choice.get("name") if isinstance(choice, Mapping) else None
    if not isinstance(name, str) or name not in names:
        shown = repr(name)[:100]
        raise InvalidRequest(f"{where} names {shown}, which is not among the tools.", param=f"{where}.name")
    return name
