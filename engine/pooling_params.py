"""Parameters that reduce a sequence's hidden states to one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import InvalidRequest

Pooling = Literal["last", "mean", "cls"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Parameters of one embedding request, checked when made (:class:`InvalidRequest` names the field).

    Attributes:
        pooling: the hidden state of the ``last`` token, of the first (``cls``), or the ``mean`` of all; after
            the decoder's final norm.
        normalize: scale the vector to length 1.
    """

    pooling: Pooling = "last"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise InvalidRequest(
                f"pooling must be one of {', '.join(get_args(Pooling))}, not {str(self.pooling)[:40]!r}.",
                param="pooling",
            )
