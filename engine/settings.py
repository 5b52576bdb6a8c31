"""What all parts of the configuration have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Settings(BaseModel):
    """A part of the configuration. Unknown fields are refused by name, and so are booleans where numbers
    belong: YAML reads ``yes`` and ``on`` as such, and pydantic takes them for 1."""

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
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_boolean, value)))


def _may_be_boolean(hint: Any) -> bool:
    """Return whether a value of a type may be a boolean, or hold one."""
    if hint in (Any, bool) or (isinstance(hint, type) and issubclass(hint, BaseModel)):
        return True
    return get_origin(hint) is not Literal and any(map(_may_be_boolean, get_args(hint)))
