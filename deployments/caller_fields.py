"""Names the caller's fields in errors of the engine, which knows none of them."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

from engine.errors import SightlineError
from engine.sampling_params import SamplingParams

_PARAMETERS = {field.name for field in fields(SamplingParams)}


def caller_fields(names: Mapping[str, str]) -> AbstractContextManager[None]:
    """Name the caller's fields in errors of the block.

    Args:
        names: the caller's fields by the engine's names.
    """
    return _CallerFields(names)


class _CallerFields:
    __slots__ = ("_names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SightlineError):
            _rename(error, self._names)


def _rename(error: SightlineError, names: Mapping[str, str]) -> None:
    param = error.param
    error.param = None if param is None else renamed(param, names)
    if param is not None and "[" in param:
        # Messages call parts of a message by their paths.
        error.message = error.message.replace(param, error.param or "")
    for name in _PARAMETERS & names.keys():
        # Messages call sampling parameters by their names.
        error.message = re.sub(rf"\b{name}\b", names[name], error.message)


def renamed(param: str, names: Mapping[str, str]) -> str:
    """The caller's field that the engine calls ``param``.

    Args:
        names: the caller's fields by the engine's names.
    """
    if param in names:
        return names[param]
    # A part of a message, such as ``messages[2].content[0].image_url``: the longest path that has a name.
    for end in range(len(param) - 1, 0, -1):
        if param[end] in ".[" and param[:end] in names:
            return names[param[:end]] + param[end:]
    return param
