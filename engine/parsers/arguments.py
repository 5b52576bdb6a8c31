"""JSON schemas of single arguments, for formats that write each argument by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: Keywords whose value is data or text, and keywords whose value is a mapping from names to schemas.
_DATA = frozenset({"const", "default", "enum", "examples", "description", "title"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def standalone(root: Mapping[str, Any], schema: Any) -> Any:
    """``schema``, a part of ``root``, as a schema that means the same by itself.

    All that its references lead to comes along under ``$defs``. References to other documents stay.
    """
    names: dict[str, str] = {}
    found: dict[str, Any] = {}
    pending: list[str] = []

    def name(reference: str) -> str:
        if reference not in names:
            names[reference] = f"#/$defs/{len(names)}"
            pending.append(reference)
        return names[reference]

    own = _renamed(schema, name)
    while pending:
        reference = pending.pop()
        target = _target(root, reference)
        if target is not None:
            found[names[reference].rpartition("/")[2]] = _renamed(target, name)
    if not names:
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
        if not isinstance(reference, str) or schema.keys() - {"$ref"} - _DATA or reference in seen:
            return schema
        seen.add(reference)
        schema = _target(root, reference)
    return {}


def text_choices(schema: Mapping[str, Any]) -> list[str] | None:
    """The texts of which an argument must be one; None if it may be something else."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        return None
    return values


def is_text(schema: Mapping[str, Any]) -> bool:
    """Return whether an argument, whose schema is :func:`resolved`, can only be text."""
    return schema.get("type") in ("string", ["string"]) or text_choices(schema) is not None


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
    """What a JSON pointer behind ``#`` leads to; None if that is not there."""
    if not reference.startswith("#"):
        return None
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and key.isdigit() and int(key) < len(root):
            root = root[int(key)]
        else:
            root = root.get(key) if isinstance(root, Mapping) else None
    return root
