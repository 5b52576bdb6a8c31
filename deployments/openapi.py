"""The OpenAPI description of the server, from the models that read its requests and write its answers."""

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import BaseRoute

from deployments.errors import ANTHROPIC_PATH
from deployments.protocol.base import RequestBody

Json = dict[str, Any]
Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

#: A model, and whether it is read or written.
_Model = tuple[type[BaseModel], Literal["validation", "serialization"]]

_REF = "#/components/schemas/{model}"

#: What an error's status says to a client.
_ERRORS = {
    400: "The request can't be served as it is; the message says what to change.",
    401: "There is no valid API key.",
    404: "There is no such model, or nothing of this id.",
    413: "The body, or an image, is too large.",
    429: "Too many requests are open; try again after the time that Retry-After says.",
    500: "A fault of the server.",
    503: "A part of the server is down or restarting; try again.",
}


class ErrorFields(BaseModel):
    """An error. ``param`` names the field that the caller sent."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorFields


class AnthropicErrorFields(BaseModel):
    type: str
    message: str


class AnthropicErrorResponse(BaseModel):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorFields
    request_id: str | None


@dataclass(frozen=True, slots=True)
class _Description:
    body: type[RequestBody] | None
    answer: type[BaseModel] | None
    event: type[BaseModel] | None

    @property
    def models(self) -> list[_Model]:
        found: list[_Model] = []
        if self.body is not None:
            found.append((self.body, "validation"))
        return found + [(each, "serialization") for each in (self.answer, self.event) if each is not None]


def described(
    body: type[RequestBody] | None = None,
    answer: type[BaseModel] | None = None,
    event: type[BaseModel] | None = None,
) -> Callable[[Endpoint], Endpoint]:
    """Say what an endpoint reads and writes itself, for the server's description.

    Args:
        body: what it reads; its ``EXAMPLE`` is shown.
        answer: what it writes, if not streamed.
        event: the data of each event of a stream.
    """

    def note(endpoint: Endpoint) -> Endpoint:
        endpoint.__description__ = _Description(body, answer, event)  # type: ignore[attr-defined]
        return endpoint

    return note


class DescriptionFile:
    """The endpoint of the description as a file.

    It is built when it is first asked for, which takes half a second, and in a thread: until then the event
    loop goes on with streams. Those who ask meanwhile wait for the same one.

    Args:
        describe: the description; the same object while nothing that it depends on has changed.
    """

    def __init__(self, describe: Callable[[], Json]) -> None:
        self._describe = describe
        self._lock = Lock()
        self._file: tuple[Json, bytes] | None = None

    async def answer(self, request: Request) -> Response:
        """Answer ``GET``; a prefix of all paths is named as the server, see ``without_prefix`` of
        :mod:`deployments.api`."""
        content = await asyncio.to_thread(self._content)
        if prefix := request.scope.get("app_root_path"):
            content = json.dumps({"servers": [{"url": prefix}]}).encode()[:-1] + b"," + content[1:]
        return Response(content, media_type="application/json")

    def _content(self) -> bytes:
        with self._lock:
            description = self._describe()
            if self._file is None or self._file[0] is not description:
                text = json.dumps(description, ensure_ascii=False, separators=(",", ":"))
                self._file = description, text.encode()
            return self._file[1]


def describe(api: FastAPI, routes: Sequence[BaseRoute], models: Mapping[str, str], *, keys: bool) -> Json:
    """The description of all endpoints.

    Args:
        routes: those of the endpoints.
        models: the tasks of the served models, by their names; examples name one that fits.
        keys: whether a key is needed.
    """
    found = get_openapi(title=api.title, version=api.version, routes=api.routes)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        # FastAPI's own form of errors, which no endpoint uses.
        schemas.pop(name, None)
    shown = [route for route in routes if isinstance(route, APIRoute) and route.include_in_schema]
    descriptions = {id(route): _of(route) for route in shown}
    wanted: set[_Model] = {model for each in descriptions.values() for model in each.models}
    wanted |= {(ErrorResponse, "serialization"), (AnthropicErrorResponse, "serialization")}
    _, definitions = models_json_schema(sorted(wanted, key=lambda pair: pair[0].__name__), ref_template=_REF)
    schemas.update(definitions["$defs"])
    for route in shown:
        for method in route.methods or ():
            operation = found["paths"][route.path_format].get(method.lower())
            if operation is not None:
                _complete(operation, route, descriptions[id(route)], models)
    if keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found


def _of(route: APIRoute) -> _Description:
    return getattr(route.endpoint, "__description__", _Description(None, None, None))


def _complete(operation: Json, route: APIRoute, description: _Description, models: Mapping[str, str]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    body = description.body
    if body is not None:
        content: Json = {"schema": _ref(body)}
        name = next((name for name, task in models.items() if task in body.TASKS), "model")
        content["example"] = {"model": name, **body.EXAMPLE}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    if description.answer is not None:
        responses["200"]["content"] = {"application/json": {"schema": _ref(description.answer)}}
    if description.event is not None:
        responses["200"].setdefault("content", {})["text/event-stream"] = {
            "schema": {"type": "string", "description": f"Events of {description.event.__name__}."},
            "x-event-schema": _ref(description.event),
        }
    form = AnthropicErrorResponse if route.path.startswith(ANTHROPIC_PATH) else ErrorResponse
    statuses: Iterable[int] = _ERRORS if body is not None else (401, 404, 500, 503)
    for status in statuses:
        responses.setdefault(
            str(status),
            {"description": _ERRORS[status], "content": {"application/json": {"schema": _ref(form)}}},
        )


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF.format(model=model.__name__)}
