"""Values that running replicas take over, without a restart: Ray Serve's ``user_config`` of a deployment.

A change in the application's ``args`` replaces every replica of the application, because Serve takes it for
a new version of the code. A change in its ``deployments`` reaches the replicas that run:

    deployments:
      - {name: Ingress, user_config: {max_active_requests: 512}}
      - {name: "VisionEncoder:pocket", num_replicas: 2, user_config: {duty_cycle: 0.5}}

Each deployment's ``IN_PLACE`` fields may stand there; ``args`` have their values until then.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from deployments.errors import logger
from engine.errors import SightlineError

M = TypeVar("M", bound=BaseModel)


def overlaid(base: M, changes: Mapping[str, Any], fields: Collection[str] | None = None) -> M:
    """``base`` with other values. A mapping changes only those fields of a nested model that it names.

    Args:
        fields: those that may change; None: all.

    Raises:
        ValueError: a field is not one of them, or has a value that is not allowed.
    """
    known = type(base).model_fields.keys() if fields is None else fields
    if unknown := sorted(map(str, changes.keys() - set(known))):
        others = f"; {', '.join(sorted(known))} can" if known else ""
        raise ValueError(
            f"{unknown[0]!r} can't change while a replica runs, only in the application's args{others}"
        )
    values = {name: getattr(base, name) for name in type(base).model_fields}
    for name, value in changes.items():
        nested = isinstance(values[name], BaseModel) and isinstance(value, Mapping)
        values[name] = overlaid(values[name], value) if nested else value
    return type(base).model_validate(values)


class InPlace(Generic[M]):
    """The configuration of a running replica.

    Args:
        base: the values in ``args``.
        fields: those that may change.
        apply: takes values over.
    """

    def __init__(self, base: M, fields: Collection[str], apply: Callable[[M], None]) -> None:
        self._base, self._fields, self._apply = base, fields, apply

    def take_over(self, user_config: Mapping[str, Any] | None) -> None:
        """Take over ``user_config`` in place of an earlier one.

        If that can't be, the values stay and the log says why: Serve would end a replica that raises here,
        and its requests with it.
        """
        try:
            self._apply(overlaid(self._base, user_config or {}, self._fields))
        except (ValueError, SightlineError) as error:
            logger.error("user_config is not taken over: %s", error)
