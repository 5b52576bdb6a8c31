"""Names the caller's fields in errors of the engine, which knows none of them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields

from engine.errors import SightlineError
from engine.sampling_params import SamplingParams

_PARAMETERS = {field.name for field in fields(SamplingParams)}


@contextmanager
def caller_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Name the caller's fields in errors of the block.

    Args:
        names: the caller's fields by the engine's names.
    """
    try:
        yield
    except SightlineError as error:
        param = error.param
        error.param = _renamed(param, names)
        if param is not None and "[" in param:
            # Messages call parts of a message by their paths.
            error.message = error.message.replace(param, error.param or "")
        for name in _PARAMETERS & names.keys():
            # Messages call sampling parameters by their names.
            error.message = re.sub(rf"\b{name}\b", names[name], error.message)
        raise


def _renamed(param: str | None, names: Mapping[str, str]) -> str | None:
    if param is None or param in names:
        return names.get(param or "", param)
    # A part of a message, such as ``messages[2].content[0].image_url``: the longest path that has a name.
    for end in range(len(param) - 1, 0, -1):
        if param[end] in ".[" and param[:end] in names:
            return names[param[:end]] + param[end:]
    return param
