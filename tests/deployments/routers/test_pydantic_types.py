"""Structured answers of pydantic's common types: none is refused, and answers follow their schemas."""

import asyncio
import enum
import json
import re
import uuid
from collections import deque
from collections.abc import AsyncIterator, Sequence
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
    "sequence": Annotated[Sequence[bool], Field(max_length=3)],
    "deque": Annotated[deque[bool], Field(max_length=3)],
}

#: Types of which JSON schemas say less, or in formats that are annotations.
ANNOTATED: dict[str, Any] = {
    "time": time,
    "timedelta": timedelta,
    "bytes": Annotated[bytes, Field(max_length=12)],
    "path": Annotated[Path, Field(json_schema_extra={"maxLength": 12})],
    "secret": Annotated[pydantic.SecretStr, Field(max_length=12)],
    "base64": Annotated[pydantic.Base64Str, Field(json_schema_extra={"maxLength": 12})],
    "set": Annotated[set[Color], Field(max_length=2)],
    "frozenset": Annotated[frozenset[Level], Field(max_length=2)],
    "uuid4": pydantic.UUID4,
    "url": Annotated[pydantic.AnyUrl, Field(json_schema_extra={"maxLength": 40})],
    "ipv6": IPv6Address,
    "ipv4 network": Annotated[IPv4Network, Field(json_schema_extra={"maxLength": 18})],
    "ipv6 network": Annotated[IPv6Network, Field(json_schema_extra={"maxLength": 18})],
    "future date": pydantic.FutureDate,
    "aware datetime": pydantic.AwareDatetime,
    "byte size": Annotated[pydantic.ByteSize, Field(json_schema_extra={"maxLength": 12})],
    "regex": Annotated[re.Pattern, Field(json_schema_extra={"maxLength": 12})],
    "json": Annotated[pydantic.Json, Field(json_schema_extra={"maxLength": 12})],
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def app() -> AsyncIterator[httpx.AsyncClient]:
    """``pocket-tools``, whose training holds answers in JSON."""
    spec = {"name": "pocket-tools", "engine": {"model": "models/pocket-tools"}}
    application = LocalApplication(AppConfig.model_validate({"models": [spec]}))
    transport = AppTransport(application.api)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
        yield client
    await application.close()


async def test_every_type_is_taken_and_its_answers_end_and_are_valid(app):
    types = CHECKED | ANNOTATED
    models = {name: create_model("Answer", value=(kind, ...)) for name, kind in types.items()}

    async def ask(model: type[BaseModel]) -> dict:
        wanted = {"name": "Answer", "schema": model.model_json_schema()}
        body = {
            "model": "pocket-tools",
            "messages": [{"role": "user", "content": "Hello!"}],
            "temperature": 0,
            "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": wanted},
        }
        return (await app.post("/v1/chat/completions", json=body)).json()

    answers = dict(zip(models, await asyncio.gather(*map(ask, models.values())), strict=True))
    refused = {name: answer["error"]["message"] for name, answer in answers.items() if "error" in answer}
    assert not refused and len(answers) >= 50
    for name, answer in answers.items():
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        assert choice["finish_reason"] == "stop", (name, text)
        jsonschema.validate(json.loads(text), _without_unique(models[name].model_json_schema()))
        if name in CHECKED:
            models[name].model_validate_json(text)


def _without_unique(schema: Any) -> Any:
    """``schema`` without uniqueItems, which no grammar can follow."""
    if isinstance(schema, dict):
        return {key: _without_unique(value) for key, value in schema.items() if key != "uniqueItems"}
    return [_without_unique(entry) for entry in schema] if isinstance(schema, list) else schema
