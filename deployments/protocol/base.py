"""Base of all request bodies: null means absent; unknown fields are ignored, some are refused by name."""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from deployments.errors import BadBody, UnsupportedParameter

logger = logging.getLogger("ray.serve")

#: Names of unknown fields that were logged; bounded, since clients choose them.
_logged: set[str] = set()
_MAX_LOGGED = 256


class Part(BaseModel):
    """An object within a body."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _null_is_absence(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class RequestBody(Part):
    """A request's body.

    Attributes:
        REFUSED: fields that aren't offered and would change the answer, each with what to do instead. A value
            that asks for nothing is taken: null, false, 0, or empty.
        SILENT: fields that clients send unasked and that change no answer, each with the reason.
        EXAMPLE: a body that is answered, without its model.
        TASK: of the models that answer it.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {}
    SILENT: ClassVar[Mapping[str, str]] = {}
    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    TASK: ClassVar[str] = "generate"

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Read a parsed JSON object.

        Raises:
            BadBody: naming the field at fault.
            UnsupportedParameter: naming the field that isn't offered.
        """
        given = {name: value for name, value in data.items() if value is not None}
        known = cls.model_fields.keys() | {field.alias for field in cls.model_fields.values()}
        for name in given.keys() & cls.REFUSED.keys():
            # A field of a base class may be refused as well.
            if given.pop(name):
                advice = cls.REFUSED[name]
                raise UnsupportedParameter(
                    f"Unsupported parameter: {name!r} is not supported{'; ' if advice else '.'}{advice}",
                    param=name,
                )
        for name in given.keys() - known - cls.SILENT.keys():
            _log_unknown(cls.__name__, name)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise _explained(error) from None


def _log_unknown(body: str, name: str) -> None:
    key = f"{body}.{name[:100]}"
    if key not in _logged and len(_logged) < _MAX_LOGGED:
        _logged.add(key)
        logger.warning("the unknown field %r is ignored", name[:100])


def _explained(error: ValidationError) -> BadBody:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Names of a union's branches are no fields.
    parts = [part for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and message.partition(" ")[0] in error.title:
        field = ""
    return BadBody(f"{field}: {message}" if field else message, param=field or None)
