"""JSON schemas of single arguments, for formats that write each argument by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest

#: Keywords whose value is data or text, and keywords whose value is a mapping from names to schemas.
_DATA = frozenset({"const", "default", "enum", "examples", "description", "title"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})

#: What may stand beside a reference without saying more about values.
_BESIDE = frozenset({"$ref", "$defs", "definitions", "type", "title", "description", "default", "examples"})

#: The greatest integer of 64 bits that is a double, as llguidance reads bounds.
INTEGER_BOUND = (1 << 63) - 1024
_UPPER = frozenset({"maximum", "exclusiveMaximum", "enum", "const"})
_LIMITS = frozenset({"minimum", "exclusiveMinimum"}) | _UPPER

#: Bounds of numbers, and all keywords about numbers.
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NUMERIC = (*BOUNDS, "multipleOf")

#: The type that JSON Schema prescribes for the value of a keyword, with a name.
_WELL_FORMED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("properties", "patternProperties"), ("an object", lambda value: isinstance(value, Mapping))
    ),
    **dict.fromkeys(
        ("allOf", "anyOf", "oneOf", "prefixItems", "enum"), ("a list", lambda value: isinstance(value, list))
    ),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems"),
        ("a count", lambda value: _is_integer(value) and value >= 0),
    ),
    **dict.fromkeys(NUMERIC, ("a number", lambda value: _is_integer(value) or isinstance(value, float))),
    **dict.fromkeys(("pattern", "$ref"), ("a string", lambda value: isinstance(value, str))),
    "required": ("a list of strings", lambda value: _are_strings(value)),
    "type": ("a type or a list of types", lambda value: isinstance(value, str) or _are_strings(value)),
}

#: Keywords that say nothing about values of other types than this, by the type's name.
_OF_TYPE = {
    **dict.fromkeys(("minLength", "maxLength", "pattern"), "string"),
    **dict.fromkeys(("minItems", "maxItems", "prefixItems"), "array"),
    **dict.fromkeys(NUMERIC, "number"),
}


def standalone(root: Mapping[str, Any], schema: Any) -> Any:
    """``schema``, a part of ``root``, as a schema that means the same by itself.

    All that its references lead to comes along under ``$defs``. References to other documents stay.
    """
    names: dict[str, str] = {}
    found: dict[str, Any] = {}
    pending: list[str] = []

    def name(reference: str) -> str:
        if _target(root, reference) is None:
            return reference
        if reference not in names:
            names[reference] = f"#/$defs/{len(names)}"
            pending.append(reference)
        return names[reference]

    own = _renamed(schema, name)
    while pending:
        reference = pending.pop()
        found[names[reference].rpartition("/")[2]] = _renamed(_target(root, reference), name)
    if not names or not isinstance(own, Mapping):
        return schema
    return {
        **{key: value for key, value in own.items() if key not in ("$defs", "definitions")},
        "$defs": found,
    }


def resolved(root: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """The schema that ``schema``, a part of ``root``, refers to.

    It is ``schema`` itself where that says more than a reference, and empty where there is no such schema.
    """
    seen: set[str] = set()
    while isinstance(schema, Mapping):
        reference = schema.get("$ref")
        if not isinstance(reference, str) or schema.keys() - _BESIDE or reference in seen:
            return schema
        seen.add(reference)
        schema = _target(root, reference)
    return {}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a function.

    Attributes:
        schema: a part of the parameters' schema.
        required: whether every call has it.
    """

    schema: Any
    required: bool


def arguments_of(root: Mapping[str, Any], schema: Mapping[str, Any] | None = None) -> dict[str, Argument]:
    """The arguments of a function by their names, in the order of its schema.

    They are those of the schema that ``root`` refers to, and of the parts of its ``allOf``. One that is
    required and not described has the schema of all others.

    Args:
        schema: an object's, which is a part of ``root``; ``root`` itself if None.
    """
    properties: dict[str, Any] = {}
    required: dict[str, None] = {}
    others: Any = True
    for part in _conjuncts(root, schema):
        properties |= part.get("properties") or {}
        required |= dict.fromkeys(part.get("required") or ())
        others = part.get("additionalProperties") or others
    properties |= {name: others for name in required if name not in properties}
    return {name: Argument(each, name in required) for name, each in properties.items()}


def others_of(root: Mapping[str, Any], schema: Mapping[str, Any] | None = None) -> Any:
    """The schema of arguments without a name in the function's schema; None if there may be none. Arguments
    as :func:`arguments_of`."""
    others: Any = True
    for part in _conjuncts(root, schema):
        given = part.get("additionalProperties", True)
        if given is False:
            return None
        # Of several the last counts: an argument must follow all of them, which no format can promise.
        others = others if given is True else given
    return others


#: Keywords of which the narrower counts.
_NARROWER: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems"), min),
    "properties": lambda one, other: {**one, **other},
    "required": lambda one, other: [*one, *other],
}


def flattened(root: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema``, a part of ``root``, without references and ``allOf`` at its top: their parts are joined.

    Of a keyword that several parts have, the last counts, but for bounds, properties and those required.
    """
    found: dict[str, Any] = {}
    for part in _conjuncts(root, schema):
        for key, value in part.items():
            if key in _NARROWER and found.get(key) is not None and value is not None:
                value = _NARROWER[key](found[key], value)
            found[key] = value
    return {key: value for key, value in found.items() if key not in ("$ref", "allOf")}


#: Keywords that parts of ``allOf`` may each have: they say nothing, or all that they say is joined.
_JOINED = (
    _NARROWER.keys()
    | _BESIDE - {"type"}
    | {"allOf", "additionalProperties", "$schema", "$id", "$comment", "deprecated"}
)


def left_out_of_object(root: Mapping[str, Any], schema: Mapping[str, Any] | None = None) -> Iterator[str]:
    """The keywords of an object that :func:`arguments_of` and :func:`others_of` don't tell. ``allOf`` is one
    where they tell the last of what its parts say. Arguments as :func:`arguments_of`."""
    seen: dict[str, Any] = {}
    for part in _conjuncts(root, schema):
        yield from part.keys() & {"minProperties", "maxProperties", "patternProperties"}
        yield from part.keys() & {"anyOf", "oneOf", "const", "enum"}
        said = {key: value for key, value in part.items() if key not in _JOINED}
        said |= {f"properties/{name}": each for name, each in (part.get("properties") or {}).items()}
        if any(key in seen and _is_lost(key, seen[key], value) for key, value in said.items()):
            yield "allOf"
        seen |= said


def _is_lost(key: str, first: Any, last: Any) -> bool:
    """Return whether ``last`` may allow what ``first``, the same keyword of another part, does not."""
    if key == "type":
        kinds, others = ({each} if isinstance(each, str) else set(each) for each in (first, last))
        return not others <= kinds | ({"integer"} if "number" in kinds else set())
    return bool(first != last)


def _conjuncts(
    root: Mapping[str, Any], schema: Mapping[str, Any] | None = None
) -> Iterator[Mapping[str, Any]]:
    """What ``schema`` refers to beside other keywords, itself resolved, and the parts of its ``allOf``.
    Arguments as :func:`arguments_of`.

    Each comes once: a part may refer to the whole, and many parts to one.

    Raises:
        InvalidRequest: a keyword has a value that it can't have.
    """
    seen: dict[int, Any] = {}

    def parts(schema: Any) -> Iterator[Mapping[str, Any]]:
        found = resolved(root, schema)
        if id(found) in seen:
            return
        seen[id(found)] = found
        _check(found)
        if "$ref" in found:
            yield from parts(_target(root, found["$ref"]))
        yield {key: value for key, value in found.items() if _applies(key, found)}
        for part in found.get("allOf", ()):
            yield from parts(part)

    try:
        yield from parts(root if schema is None else schema)
    except RecursionError:
        raise refused("its references and allOf are nested too deeply") from None


def _check(schema: Mapping[str, Any]) -> None:
    for key, value in schema.items():
        if key in _WELL_FORMED and _applies(key, schema) and not _WELL_FORMED[key][1](value):
            raise refused(f"{key} must be {_WELL_FORMED[key][0]}, not {json.dumps(value)[:60]}")


def _applies(key: str, schema: Mapping[str, Any]) -> bool:
    """Return whether a keyword may say something about values of the type that ``schema`` gives."""
    kinds = types_of(schema)
    if key not in _OF_TYPE or kinds is None:
        return True
    return _OF_TYPE[key] in kinds or (_OF_TYPE[key] == "number" and "integer" in kinds)


def types_of(schema: Mapping[str, Any]) -> list[Any] | None:
    """The types that a schema gives; None if it gives none, or something else."""
    given = schema.get("type")
    if isinstance(given, str):
        return [given]
    return given if isinstance(given, list) else None


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def refused(reason: str) -> InvalidRequest:
    """The refusal of a function's schema."""
    return InvalidRequest(f"The JSON schema is refused: {reason}.", param="structured")


def text_choices(schema: Mapping[str, Any]) -> list[str] | None:
    """The texts of which an argument must be one; None if it may be something else."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return None
    return values


def is_text(schema: Mapping[str, Any]) -> bool:
    """Return whether an argument, whose schema is :func:`resolved`, can only be text."""
    return schema.get("type") in ("string", ["string"]) or text_choices(schema) is not None


def with_bounded_integers(schema: Any) -> Any:
    """A copy of a schema in which every integer has bounds, those of 64 bits where it gave none.

    Without them a model may repeat a digit until its answer is cut off. Numbers with a fraction stay as they
    are: llguidance 1.9 allows them no exponent if they have bounds.
    """
    if isinstance(schema, list):
        return [with_bounded_integers(entry) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    new: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            new[key] = {name: with_bounded_integers(entry) for name, entry in value.items()}
        else:
            new[key] = value if key in _DATA else with_bounded_integers(value)
    if "integer" in (types_of(schema) or ()):
        given = [schema[key] for key in _LIMITS if key in schema]
        if not given:
            new |= {"minimum": -INTEGER_BOUND, "maximum": INTEGER_BOUND}
        elif not schema.keys() & _UPPER and all(
            isinstance(low, int) and low < INTEGER_BOUND for low in given
        ):
            new["maximum"] = INTEGER_BOUND
    return new


def _renamed(schema: Any, name: Callable[[str], str]) -> Any:
    """``schema`` with the references into its document renamed."""
    if isinstance(schema, list):
        return [_renamed(entry, name) for entry in schema]
    if not isinstance(schema, Mapping):
        return schema
    new: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            new[key] = name(value)
        elif key in _BY_NAME and isinstance(value, Mapping):
            new[key] = {part: _renamed(entry, name) for part, entry in value.items()}
        else:
            new[key] = value if key in _DATA else _renamed(value, name)
    return new


def _target(root: Any, reference: str) -> Any:
    """Return the schema that a JSON pointer behind ``#`` names; None if there is none."""
    if not reference.startswith("#"):
        return None
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and key.isdigit() and int(key) < len(root):
            root = root[int(key)]
        else:
            root = root.get(key) if isinstance(root, Mapping) else None
    return root


def argument_as_json(root: Mapping[str, Any], argument: Argument, value: str) -> str:
    """The JSON text of an argument that a model wrote without quotes.

    It is a string where the schema asks for text, and where ``value`` is no JSON; else it is ``value``.

    Args:
        root: schema of the function's parameters.
    """
    if not is_text(resolved(root, argument.schema)) and is_json(value):
        return value.strip()
    return json.dumps(value, ensure_ascii=False)


def is_json(text: str) -> bool:
    """Return whether ``text`` is a JSON value."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def part_as_json(root: Mapping[str, Any], argument: Argument, part: str) -> str:
    """The JSON text of the beginning of an argument that was cut off, without the quote that ends a string.

    Empty where the schema allows values of any kind: only a whole value tells whether it is text or JSON.
    """
    schema = resolved(root, argument.schema)
    if not schema or not part:
        return ""
    return json.dumps(part, ensure_ascii=False)[:-1] if is_text(schema) else part


def _refuse(name: str) -> None:
    """Python's ``NaN`` and ``Infinity`` are no JSON."""
    raise ValueError(name)
