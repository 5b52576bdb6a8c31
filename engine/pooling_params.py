"""Parameters that turn a sequence's hidden states into one vector, one for each token, or a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.errors import InvalidRequest
from engine.param_checks import check_flag

Pooling = Literal["last", "mean", "cls", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """Parameters of one embedding request, checked when made (:class:`InvalidRequest` names the field).

    Attributes:
        pooling: the hidden state of the ``last`` token, of the first (``cls``), the ``mean`` of all, or
            ``all`` of them, one for each token; after the decoder's final norm.
        normalize: scale each vector to length 1.
        between: two token ids. Instead of a hidden state, the result is one number: the first token's logit
            minus the second's, after the last token of the prompt. Nothing is normalised.
    """

    pooling: Pooling = "last"
    normalize: bool = True
    between: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise InvalidRequest(
                f"pooling must be one of {', '.join(get_args(Pooling))}, not {str(self.pooling)[:40]!r}.",
                param="pooling",
            )
        check_flag("normalize", self.normalize)
