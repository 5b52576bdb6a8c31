"""Calls of functions in a conversation's history."""

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import InvalidRequest
from engine.parsers.free_text import ARGUMENT

#: Id of calls in OpenAI's older form, ``function_call``, which has none. Mistral's templates take nine
#: characters, no more and no fewer.
FUNCTION_CALL_ID = "function0"


def tool_calls(raw: Any, where: str) -> list[dict[str, Any]]:
    """Check an assistant's ``tool_calls``, and parse their arguments: chat templates print objects.

    Arguments that a model has broken off stay text, and so do those with half of a surrogate pair, which no
    prompt can hold but as its escape: the history is taken as it is. A custom call becomes that of a function
    of its input, as models are shown such tools.

    Raises:
        InvalidRequest: naming a field below ``where``.
    """
    if not isinstance(raw, list | tuple):
        raise InvalidRequest(f"{where} must be a list.", param=where)
    calls = []
    for k, call in enumerate(raw):
        called = _called_of(call, f"{where}[{k}]")
        name = call.get("id", "")
        if not isinstance(name, str | int | None):
            raise InvalidRequest(f"{where}[{k}].id must be a string.", param=f"{where}[{k}].id")
        calls.append({"id": "" if name is None else str(name), "type": "function", "function": called})
    return calls


def function_call(raw: Any, where: str) -> list[dict[str, Any]]:
    """Convert an assistant's ``function_call``, the older form; errors as :func:`tool_calls`."""
    return [{"id": FUNCTION_CALL_ID, "type": "function", "function": _called(raw, where)}]


def _called_of(call: Any, where: str) -> dict[str, Any]:
    """The function of a call, whatever its type."""
    if not isinstance(call, Mapping):
        raise InvalidRequest(f"{where} must be an object with a function.", param=where)
    if call.get("type") != "custom":
        return _called(call.get("function"), f"{where}.function")
    custom, where = call.get("custom"), f"{where}.custom"
    if not isinstance(custom, Mapping) or not isinstance(custom.get("name"), str):
        raise InvalidRequest(f"{where} must have a name.", param=where)
    if not isinstance(custom.get("input"), str):
        raise InvalidRequest(f"{where}.input must be a string.", param=f"{where}.input")
    return {"name": custom["name"], "arguments": {ARGUMENT: custom["input"]}}


def _called(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where} must have a name.", param=where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
            json.dumps(parsed, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif not isinstance(arguments, Mapping):
        raise InvalidRequest(f"{where}.arguments must be JSON text.", param=f"{where}.arguments")
    return {"name": function["name"], "arguments": arguments}
