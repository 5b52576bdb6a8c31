"""Structured answers of pydantic's common types: none is refused, and answers follow their schemas."""

import asyncio
import enum
import json
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Optional

import httpx
import jsonschema
import pydantic
import pytest_asyncio
from pydantic import BaseModel, Field, create_model
from typing_extensions import TypedDict

from deployments.config import AppConfig
from deployments.in_process import LocalApplication
from tests.deployments.asgi import AppTransport


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(BaseModel):
    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Node(BaseModel):
    name: Color
    child: Optional["Node"] = None


class Pair(NamedTuple):
    left: Color
    right: bool


class Entry(TypedDict):
    color: Color


@dataclass
class Shape:
    color: Color
    corners: int


#: Types whose JSON schema says all that pydantic checks.
CHECKED: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": Annotated[str, Field(max_length=20)],
    "pattern": Annotated[str, Field(pattern=r"^[a-z]{3}-\d{2}$")],
    "bounded int": Annotated[int, Field(ge=-5, le=120)],
    "bounded float": Annotated[float, Field(gt=0, lt=1)],
    "positive int": pydantic.PositiveInt,
    "non-negative float": pydantic.NonNegativeFloat,
    "strict int": pydantic.StrictInt,
    "strict bool": pydantic.StrictBool,
    "decimal": Decimal,
    "date": date,
    "datetime": datetime,
    "uuid": uuid.UUID,
    "enum": Color,
    "int enum": Level,
    "literal": Literal["a", 1, None],
    "optional": Color | None,
    "union": bool | Color,
    "list": Annotated[list[Color], Field(max_length=4)],
    "list of ints": Annotated[list[Level], Field(min_length=1, max_length=3)],
    "tuple": tuple[Level, Color],
    "dict": dict[Literal["a", "b"], Level],
    "model": Point,
    "list of models": Annotated[list[Point], Field(max_length=2)],
    "tagged union": Annotated[Cat | Dog, Field(discriminator="kind")],
    "recursive model": Node,
    "named tuple": Pair,
    "typed dict": Entry,
    "dataclass": Shape,
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "timedelta": timedelta,
    "uuid4": pydantic.UUID4,
    "sequence": Annotated[Sequence[bool], Field(max_length=3)],
    "deque": Annotated[deque[bool], Field(max_length=3)],
}

#: Types of which JSON schemas say less, or in formats that are annotations.
ANNOTATED: dict[str, Any] = {
    "time": time,
    "bytes": Annotated[bytes, Field(max_length=12)],
    "path": Annotated[Path, Field(json_schema_extra={"maxLength": 12})],
    "secret": Annotated[pydantic.SecretStr, Field(max_length=12)],
    "base64": Annotated[pydantic.Base64Str, Field(json_schema_extra={"maxLength": 12})],
    "set": Annotated[set[Color], Field(max_length=2)],
    "frozenset": Annotated[frozenset[Level], Field(max_length=2)],
    "url": Annotated[pydantic.AnyUrl, Field(json_schema_extra={"maxLength": 40})],
    "ipv4 network": Annotated[IPv4Network, Field(json_schema_extra={"maxLength": 18})],
    "ipv6 network": Annotated[IPv6Network, Field(json_schema_extra={"maxLength": 18})],
    "future date": pydantic.FutureDate,
    "aware datetime": pydantic.AwareDatetime,
    "byte size": Annotated[pydantic.ByteSize, Field(json_schema_extra={"maxLength": 12})],
    "regex": Annotated[re.Pattern, Field(json_schema_extra={"maxLength": 12})],
    "json": Annotated[pydantic.Json, Field(json_schema_extra={"maxLength": 12})],
}


MODELS = {name: create_model("Answer", value=(kind, ...)) for name, kind in (CHECKED | ANNOTATED).items()}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def app() -> AsyncIterator[httpx.AsyncClient]:
    """``pocket``, which never saw JSON, and ``pocket-tools``."""
    specs = [{"name": name, "engine": {"model": f"models/{name}"}} for name in ("pocket", "pocket-tools")]
    application = LocalApplication(AppConfig.model_validate({"models": specs}))
    transport = AppTransport(application.api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
        yield client
    await application.close()


async def ask_all(app: httpx.AsyncClient, model: str, fields: Callable[[dict], dict]) -> dict[str, dict]:
    """The first choice for each type; none is refused.

    Args:
        fields: of a request, given the JSON schema of a type.
    """

    async def ask(kind: type[BaseModel]) -> dict:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Hello!"}],
            "temperature": 0,
            **fields(kind.model_json_schema()),
        }
        return (await app.post("/v1/chat/completions", json=body)).json()

    answers = dict(zip(MODELS, await asyncio.gather(*map(ask, MODELS.values())), strict=True))
    refused = {name: answer["error"]["message"] for name, answer in answers.items() if "error" in answer}
    assert not refused and len(answers) >= 50
    return {name: answer["choices"][0] for name, answer in answers.items()}


def check_value(name: str, text: str) -> None:
    jsonschema.validate(json.loads(text), _without_unique(MODELS[name].model_json_schema()))
    if name in CHECKED:
        MODELS[name].model_validate_json(text)


async def test_every_type_is_taken_and_its_answers_end_and_are_valid(app):
    def fields(schema: dict) -> dict:
        wanted = {"type": "json_schema", "json_schema": {"name": "Answer", "schema": schema}}
        return {"response_format": wanted, "max_tokens": 60}

    for name, choice in (await ask_all(app, "pocket", fields)).items():
        assert choice["finish_reason"] == "stop", (name, choice)
        check_value(name, choice["message"]["content"])


async def test_every_type_is_taken_as_the_argument_of_a_tool(app):
    def fields(schema: dict) -> dict:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        return {"tools": [tool], "tool_choice": "required", "max_tokens": 100}

    for name, choice in (await ask_all(app, "pocket-tools", fields)).items():
        if choice["finish_reason"] == "length" and name in ("float", "bounded float"):
            # A grammar alone can't bound the digits of a number.
            continue
        assert choice["finish_reason"] == "tool_calls", (name, choice)
        (call,) = choice["message"]["tool_calls"]
        check_value(name, call["function"]["arguments"])


def _without_unique(schema: Any) -> Any:
    """``schema`` without uniqueItems, which no grammar can follow."""
    if isinstance(schema, dict):
        return {key: _without_unique(value) for key, value in schema.items() if key != "uniqueItems"}
    return [_without_unique(entry) for entry in schema] if isinstance(schema, list) else schema
