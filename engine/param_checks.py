"""Checks of a request's parameters; :class:`InvalidRequest` names the field and shows the value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.errors import InvalidRequest


def check_int(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be an integer, got {shown(value)}.", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be in [{low}, {high}], got {shown(value)}.", param=name)


def check_number(name: str, value: Any, low: float, high: float, *, open_below: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be a number, got {shown(value)}.", param=name)
    # A large integer overflows float32 as surely as infinity does.
    if not (low <= value <= high) or abs(value) > 1e30 or (open_below and value == low):
        interval = f"{'(' if open_below else '['}{low:g}, {high:g}]"
        raise InvalidRequest(f"{name} must be a finite number in {interval}, got {shown(value)}.", param=name)


def check_count(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise InvalidRequest(f"{name} has {len(values)} entries; the limit is {limit}.", param=name)


def check_list(name: str, values: Any) -> list[Any]:
    """``values`` as a list, which is empty for None. A text is no list: it would be one of its characters."""
    if type(values) is list:
        return values.copy()
    if values is None:
        return []
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidRequest(f"{name} must be a list, got {shown(values)}.", param=name)
    return list(values)


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be True or False, got {shown(value)}.", param=name)


def check_text(name: str, text: Any, limit: int) -> None:
    if not isinstance(text, str):
        raise InvalidRequest(f"{name} must hold strings, got {shown(text)}.", param=name)
    if not 1 <= len(text) <= limit:
        message = f"Each entry of {name} must have 1 to {limit} characters, got {len(text)}."
        raise InvalidRequest(message, param=name)


def check_vocabulary(name: str, ids: Iterable[Any], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            message = f"{name}: {shown(token)} is not a token id; the vocabulary has {vocab_size} tokens."
            raise InvalidRequest(message, param=name)


def token_id(key: Any) -> int:
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        return int(key)
    raise InvalidRequest(f"logit_bias: {shown(key)} is not a token id.", param="logit_bias")


def shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 128 else "a huge integer"
    return text if len(text) <= 40 else text[:37] + "..."
