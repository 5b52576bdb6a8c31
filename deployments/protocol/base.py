"""Base of all request bodies: null means absent; unknown fields are ignored, some are refused by name."""

from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, Self, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from deployments.errors import BadBody, UnsupportedParameter
from deployments.protocol.plain_fields import Shape, log_unknown_within
from deployments.unknown_fields import log_unknown


class Part(BaseModel):
    """An object within a body.

    Attributes:
        REFUSED: fields that aren't offered and would change the answer, each with what to do instead. A value
            that asks for nothing is taken: null, false, 0, or empty.
        DEFAULTS: further values of refused fields that ask for nothing.
        SILENT: fields that clients send unasked and that change no answer, each with the reason.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {}
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {}
    SILENT: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absence(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class RequestBody(Part):
    """A request's body.

    Attributes:
        PLAIN: the shapes of fields that hold plain objects.
        EXAMPLE: a body that is answered, without its model.
        TASKS: of the models that answer it.
        model: the name of the one that is asked; empty where there is no choice.
    """

    PLAIN: ClassVar[Mapping[str, Shape]] = {}
    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    TASKS: ClassVar[tuple[str, ...]] = ("generate",)

    model: str = ""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Read a parsed JSON object.

        Raises:
            BadBody: naming the field at fault.
            UnsupportedParameter: naming the field that isn't offered.
        """
        given = {name: value for name, value in data.items() if value is not None}
        _look_through(cls.__name__, cls, given)
        # A field of a base class may be refused as well.
        given = {name: value for name, value in given.items() if name not in cls.REFUSED}
        for name in given.keys() & cls.PLAIN.keys():
            log_unknown_within(cls.__name__, given[name], cls.PLAIN[name], name)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise _explained(error) from None


@cache
def known_fields(part: type[Part]) -> frozenset[str]:
    """The names of an object's fields, of those that are taken in silence, and of those that are refused."""
    return frozenset({*part.SILENT, *part.REFUSED}).union(
        *(_names(name, field) for name, field in part.model_fields.items())
    )


def _names(name: str, field: FieldInfo) -> Iterator[str]:
    """The names under which clients send a field."""
    yield name if field.alias is None else field.alias
    if isinstance(field.validation_alias, AliasChoices):
        yield from (each for each in field.validation_alias.choices if isinstance(each, str))


@cache
def _parts(part: type[Part]) -> Mapping[str, type[Part]]:
    """The objects within an object, by the names of their fields."""
    return {
        name: option
        for field_name, field in part.model_fields.items()
        for option in (field.annotation, *get_args(field.annotation))
        if isinstance(option, type) and issubclass(option, Part)
        for name in _names(field_name, field)
    }


def _look_through(body: str, part: type[Part], given: Mapping[str, Any], where: str = "") -> None:
    """Log the unknown fields of an object and of the objects within it.

    Raises:
        UnsupportedParameter: naming the field that isn't offered.
    """
    for name in given.keys() & part.REFUSED.keys():
        if given[name] and given[name] not in part.DEFAULTS.get(name, ()):
            raise unsupported(f"{where}{name}", part.REFUSED[name])
    log_unknown(body, given, known_fields(part), where)
    parts = _parts(part)
    for name in given.keys() & parts.keys():
        if isinstance(given[name], dict):
            _look_through(body, parts[name], given[name], f"{where}{name}.")


def unsupported(name: str, advice: str) -> UnsupportedParameter:
    """The refusal of a field that isn't offered.

    Args:
        advice: what to do instead; may be empty.
    """
    return UnsupportedParameter(
        f"Unsupported parameter: {name!r} is not supported{'; ' if advice else '.'}{advice}", param=name
    )


def _is_field(name: str) -> bool:
    return name.isidentifier() and name not in ("str", "int", "float", "bool")


def _explained(error: ValidationError) -> BadBody:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Names of a union's branches are no fields.
    parts = [part for part in first["loc"] if isinstance(part, int) or _is_field(str(part))]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and message.partition(" ")[0] in error.title:
        field = ""
    return BadBody(f"{field}: {message}" if field else message, param=field or None)
