"""The one message from the scheduler to the runner. Plain data: it is broadcast to every tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.request import Request


@dataclass(slots=True)
class ScheduledSequence:
    """The share of one request in one step.

    Attributes:
        request: the request; the runner reads its token ids and spans, never changes it.
        slot: the runner's row for this request, constant from admission to finish or preemption.
        start: computed tokens before this step.
        num_tokens: tokens computed in this step, from ``start`` on.
        new_blocks: KV blocks appended to the request's table by this step.
        samples: whether this step reaches the end of what is known, so that a token is sampled.
        last_token_on_device: whether the token at ``start`` was sampled by a step whose result the host has
            not read yet.
    """

    request: Request
    slot: int
    start: int
    num_tokens: int
    new_blocks: list[int]
    samples: bool
    last_token_on_device: bool = False


@dataclass(slots=True)
class ScheduledBatch:
    """One step.

    Attributes:
        sequences: at most one entry per request, decodes first.
        admitted: requests that got a slot in this step (first time, or again after preemption), with the
            blocks of their cached prefix; the runner initialises their rows before anything else.
        released: slots whose requests finished or were preempted since the last step.
        num_tokens: sum over ``sequences``.
    """

    step: int
    sequences: list[ScheduledSequence]
    admitted: list[Admission] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class Admission:
    """A request enters ``slot``; ``blocks`` are the KV blocks that already hold its cached prefix."""

    request: Request
    slot: int
    blocks: list[int]
