"""What all parts of the configuration have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A part of the configuration. Unknown fields are refused by name, and so are booleans where numbers
    belong: YAML reads ``yes`` and ``on`` as such, and pydantic takes them for 1.

    Attributes:
        ELSEWHERE: options that other servers have under these names, each with what to do here.
    """

    ELSEWHERE: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        if _holds_boolean(value) and not _may_be_boolean(field.annotation):
            raise ValueError("true and false are no values of this option")
        return value


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(map(_holds_boolean, value))
    return isinstance(value, bool)


def _may_be_boolean(hint: Any) -> bool:
    """Return whether a value of a type may be a boolean, or hold one."""
    if hint in (Any, bool) or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return True
    return get_origin(hint) is not Literal and any(map(_may_be_boolean, get_args(hint)))


def no_such_option(whole: type[BaseModel], place: Sequence[str | int]) -> str:
    """Error text for an option that doesn't exist; it names the option that may be meant.

    Args:
        whole: the class of the whole configuration, or of a part of it.
        place: of the option, as pydantic's errors have it.
    """
    *steps, name = place
    part: type[BaseModel] = whole
    for step in steps:
        if isinstance(step, str) and (inner := _part_of(part, step)) is not None:
            part = inner
    if issubclass(part, Settings) and (advice := part.ELSEWHERE.get(str(name))):
        return f"there is no such option; {advice}"
    if near := nearest(str(name), part.model_fields):
        return f"there is no such option; did you mean {near}?"
    ways = [way for way, each in _parts(whole) if name in each.model_fields]
    return f"there is no such option here, but in {' and '.join(ways)}" if ways else "there is no such option"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` of which ``name`` may be a misspelling; None if there is none."""
    return next(iter(get_close_matches(name, list(names), 1, 0.75)), None)


def _part_of(whole: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The part of the configuration that an option holds, or that the entries of its list are."""
    field = whole.model_fields.get(name)
    waiting: list[Any] = [] if field is None else [field.annotation]
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            return hint
        waiting += get_args(hint)
    return None


def _parts(whole: type[BaseModel], way: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The parts within a part, with the way to each."""
    for name, field in whole.model_fields.items():
        if (part := _part_of(whole, name)) is not None:
            inner = f"{way}{name}{'[]' if get_origin(field.annotation) in (list, tuple) else ''}"
            yield inner, part
            yield from _parts(part, f"{inner}.")
