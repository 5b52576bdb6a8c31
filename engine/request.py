"""A request inside the engine: token ids, media, parameters, and what scheduling remembers of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.pooling_params import PoolingParams
from engine.prompt import EmbeddedMedia, MediaSpan
from engine.sampling_params import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One sequence (``n`` completions are ``n`` requests).

    A request has no phase: the scheduler compares the number of its computed tokens with that of its known
    tokens. While the request runs, these counters live in the scheduler's
    :class:`~engine.scheduling.slots.SequenceSlots`; the attributes here survive preemption.

    Attributes:
        id: unique within the engine.
        token_ids: the prompt, and the output up to the last preemption or up to where another engine left it,
            with the ``opening``. Several requests may share the list, which never changes.
        num_prompt: length of the prompt.
        params: sampling parameters; ignored by pooling requests.
        max_total: most tokens, prompt included, that the sequence may reach.
        stop_ids: token ids that end it (end-of-sequence and ``stop_token_ids``).
        spans: media of the prompt, sorted by offset.
        embeddings: encoder rows by item hash, kept until the request ends so that a preempted one can be
            computed again; numpy rows, or a device tensor where encoder and engine share a process.
        arrival, admitted_at: ``time.monotonic()`` when it arrived and when it first got a slot.
        deadline: ``time.monotonic()`` by which it must get one to have its first token within the goal; None
            without a goal.
        seed: seed of its random numbers.
        positions: rotary positions ``(axes, num_prompt)`` int32 of the prompt; None if they are plain
            indices.
        position_delta: rotary position minus index of every token after the prompt.
        both_ways: sorted disjoint ranges ``[start, end)`` of the prompt in which every token attends to all
            tokens of the range, also to later ones, but for ``one_way``. Each is computed in one step.
        one_way: sorted disjoint ranges within those, before the last token of each, whose tokens attend to
            earlier ones only and are seen by later ones only. In a given model the tokens say which.
        pooling: how to make an embedding; None for generation.
        grammar: the matcher that masks this sequence's tokens, if it is constrained.
        appends_forced: tokens that the grammar alone decides are appended without being sampled; see
            :mod:`engine.scheduling.forced`.
        opening: tokens that the grammar alone decides before any is sampled. They are known like a prompt's,
            and computed with it; the caller gets them with the first sampled token, and they are no longer
            kept here then.
        takes_drafts: its next tokens may be drafted and verified, see :mod:`engine.scheduling.drafts`.
        blocks: KV blocks it holds, in order, of each group of layers (:class:`.LayerGroups`); 0 in place of
            those behind the group's window. Empty while waiting.
        block_hashes: hashes of its full blocks, as far as they were computed.
        slot: its slot while it runs, None while it waits.
        rope_variant: the rotary frequencies of its keys, see
            :meth:`engine.layers.decoder_config.RopeConfig.variant`.
        choice: which of the caller's ``n`` completions it is.
        num_cached: prompt tokens found in the prefix cache when it was first admitted.
        num_preemptions: how often it lost its slot and had to be computed again.
        suspect: it took part in a step that failed for an unknown reason. Its prompt is computed in steps
            that admit no other request, so that a second failure can be attributed to it.
    """

    id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    max_total: int
    stop_ids: frozenset[int]
    spans: Sequence[MediaSpan] = ()
    embeddings: dict[str, EmbeddedMedia | Any] = field(default_factory=dict)
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    cache_salt: str = ""
    seed: int = 0
    positions: np.ndarray | None = None
    position_delta: int = 0
    both_ways: Sequence[tuple[int, int]] = ()
    one_way: Sequence[tuple[int, int]] = ()
    pooling: PoolingParams | None = None
    grammar: Any = None
    appends_forced: bool = False
    opening: list[int] = field(default_factory=list)
    takes_drafts: bool = False
    blocks: list[list[int]] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    slot: int | None = None
    rope_variant: int = 0
    choice: int = 0
    num_cached: int | None = None
    num_preemptions: int = 0
    suspect: bool = False
    admitted_at: float | None = None
    finished: bool = False
    _ids: tuple[list[int], np.ndarray] | None = field(default=None, init=False, repr=False)

    @property
    def ids(self) -> np.ndarray:
        """:attr:`token_ids` as int32 ``(n,)``, made once: to turn thousands of integers into an array takes
        the step thread as long as everything else that it does for a prompt."""
        if self._ids is None or self._ids[0] is not self.token_ids:
            self._ids = self.token_ids, np.array(self.token_ids, np.int32)
        return self._ids[1]

    def take_ids(self, other: Request) -> None:
        """Share :attr:`ids` with ``other``, which shares its :attr:`token_ids`."""
        assert other.token_ids is self.token_ids
        self._ids = other._ids

    @property
    def has_begun(self) -> bool:
        """True if its caller has got a part of the output, or may have."""
        return self.num_preemptions > 0 or len(self.token_ids) > self.num_prompt + len(self.opening)

    @property
    def scores_prompt(self) -> bool:
        """True if log-probabilities of its prompt are still to be computed.

        Once an output token is known, the whole prompt was scored, and a preemption changes nothing about it.
        """
        return self.params.prompt_logprobs is not None and len(self.token_ids) == self.num_prompt

    def uncut(self, position: int) -> int:
        """Return the last position up to ``position`` that is inside no range of :attr:`both_ways`.

        The tokens before it can be computed without those behind it.
        """
        return next((start for start, end in self.both_ways if start < position < end), position)


class RequestFault(Exception):
    """An exception from the work for one request, raised while a step for several was prepared.

    Args:
        request: the request at fault.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(f"request {request.id}")
        self.request = request


@contextmanager
def attributed_to(request: Request) -> Iterator[None]:
    """Raise any exception of the block as a :class:`RequestFault` of ``request``."""
    try:
        yield
    except Exception as error:
        raise RequestFault(request) from error
