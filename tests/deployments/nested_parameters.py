"""Fields within the parameters of a client's types: their paths, and bodies that hold each of them."""

import base64
import collections.abc
import types
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from typing_extensions import is_typeddict

from tests.deployments.pictures import circle, data_url
from tests.engine.media.pdfs import page, pdf

#: Values of required fields, by name.
SAMPLES: dict[str, Any] = {
    "url": data_url(circle("red")),
    "image_url": data_url(circle("red")),
    "arguments": "{}",
    "parameters": {"type": "object", "properties": {}},
    "input_schema": {"type": "object", "properties": {}},
    "schema": {"type": "object", "properties": {}},
    "name": "report",
    "data": "AAAA",
    "syntax": "regex",
    "definition": "[a-z]{1,8}",
}

#: A value that no field takes.
WRONG = [{"wrong": []}]
_PDF_DATA = base64.b64encode(pdf([page("x")])).decode()
_PDF = f"data:application/pdf;base64,{_PDF_DATA}"
#: Fields of objects by their ``type``, which the types don't call required.
_FILLED: dict[str, dict[str, Any]] = {
    "file": {"file": {"file_data": _PDF}},
    "input_file": {"file_data": _PDF},
    "input_image": {"image_url": SAMPLES["image_url"]},
    "image": {
        "source": {
            "type": "base64",
            "media_type": "image/png",
            "data": SAMPLES["image_url"].partition(",")[2],
        }
    },
    "document": {"source": {"type": "base64", "media_type": "application/pdf", "data": _PDF_DATA}},
    # One of their kind would be refused.
    "choice": {"choices": [{"value": "x"}, {"value": "y"}]},
    "score": {"levels": [{"label": "x"}, {"label": "y"}]},
}


@dataclass(frozen=True)
class Field:
    """A field of an object within a body.

    Attributes:
        steps: the way to it: names of fields, and for an entry of a list its index.
        kinds: beside each step the ``type`` or ``role`` of the object that has it, if it says one.
        owners: beside each step the TypedDict that has it.
        hint: its type.
    """

    steps: tuple[str | int, ...]
    kinds: tuple[str, ...]
    owners: tuple[Any, ...]
    hint: Any

    @property
    def path(self) -> str:
        """The way with kinds, such as ``messages[]<user>.content[]<text>.text``."""
        text = ""
        for step, kind in zip(self.steps, self.kinds, strict=True):
            text += "[]" if isinstance(step, int) else f"{f'<{kind}>' if kind else ''}.{step}"
        return text.removeprefix(".")

    @property
    def name(self) -> str:
        """Name of the field itself."""
        return str(self.steps[-1])

    @property
    def param(self) -> str:
        """The way as errors name it, such as ``messages[0].content[0].text``."""
        text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.steps)
        return text.removeprefix(".")


def fields_of(hint: Any, name: str) -> Iterator[Field]:
    """All fields within the parameter ``name``."""
    yield from _fields(hint, Field((name,), ("",), (None,), hint), frozenset())


def _fields(hint: Any, at: Field, seen: frozenset[Any]) -> Iterator[Field]:
    for option in _options(hint):
        if entry := _entry(option):
            inner = Field((*at.steps, 0), (*at.kinds, ""), (*at.owners, None), entry)
            yield from _fields(entry, inner, seen)
        elif is_typeddict(option) and option not in seen:
            for key, each in _hints(option).items():
                if key in ("type", "role"):
                    continue
                steps = (*at.steps, key), (*at.kinds, _kind(option)), (*at.owners, option)
                inner = Field(*steps, each)
                yield inner
                yield from _fields(each, inner, seen | {option})


@cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _plain(hint: Any) -> Any:
    while get_origin(hint) in (Annotated, Required, NotRequired):
        hint = get_args(hint)[0]
    return hint


def _options(hint: Any) -> Iterator[Any]:
    hint = _plain(hint)
    if get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            yield from _options(option)
    else:
        yield hint


def _entry(hint: Any) -> Any:
    """The type of a list's entries; None for no list."""
    origin = get_origin(hint)
    is_list = origin in (list, collections.abc.Iterable, collections.abc.Sequence) or (
        getattr(origin, "__name__", "") == "SequenceNotStr"
    )
    return get_args(hint)[0] if is_list else None


def _kind(owner: Any) -> str:
    hints = _hints(owner)
    kind = _plain(hints.get("type", hints.get("role")))
    return "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""


def sample(hint: Any, name: str = "") -> Any:
    """A valid value of a type."""
    if name in SAMPLES and not any(map(is_typeddict, _options(hint))):
        return SAMPLES[name]
    option = next(iter(_options(hint)))
    if get_origin(option) is Literal:
        return get_args(option)[0]
    if entry := _entry(option):
        return [sample(entry)]
    if is_typeddict(option):
        return sample_object(option)
    return {int: 1, float: 0.5, bool: True, str: "x"}.get(option, {"type": "object"})


def sample_object(owner: Any) -> dict[str, Any]:
    """An object of a TypedDict with the fields that it must have."""
    found = {key: sample(hint, key) for key, hint in _hints(owner).items() if _is_required(owner, hint)}
    kind = _kind(owner)
    if kind and not found.keys() & {"type", "role"}:
        found["type" if "type" in _hints(owner) else "role"] = kind.partition("|")[0]
    return found | _FILLED.get(kind, {})


def _is_required(owner: Any, hint: Any) -> bool:
    # ``__required_keys__`` is wrong where annotations are strings.
    origins = set()
    while get_origin(hint) in (Annotated, Required, NotRequired):
        origins.add(get_origin(hint))
        hint = get_args(hint)[0]
    return Required in origins or (owner.__total__ and NotRequired not in origins)


def put(body: dict[str, Any], field: Field, value: Any) -> dict[str, Any]:
    """``body`` with ``value`` at the place of ``field``, and all objects on the way there."""
    holder: Any = value
    for step, owner in zip(reversed(field.steps[1:]), reversed(field.owners[1:]), strict=True):
        if isinstance(step, int):
            holder = [holder]
        else:
            filled = (
                {"file_data": _PDF} if step in ("filename", "detail") and "file_data" in _hints(owner) else {}
            )
            holder = {**sample_object(owner), **filled, step: holder}
            if step == "file_url":
                holder.pop("file_data", None)
    return {**body, field.steps[0]: holder}


def left_out(body: dict[str, Any], field: Field) -> dict[str, Any]:
    """A copy of ``body`` without the field."""
    copy = deepcopy(body)
    holder: Any = copy
    for step in field.steps[:-1]:
        holder = holder[step]
    del holder[field.steps[-1]]
    return copy
