"""What passes between a language model and an ingress, as values that are cheap to pickle.

Items of a stream of updates are plain tuples, which pickle in a fifth of the time that objects take.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.outputs import EngineTimes, OutputDelta, StreamUpdate, Usage
from engine.prompt import EmbeddedMedia, MediaItem


@dataclass(frozen=True, slots=True)
class RowsInfo:
    """The layout of an item's embedding rows; their reference is a separate argument.

    Attributes:
        row_bytes: of one row; 0 if it isn't known.
    """

    hash: str
    dtype: str
    cached: bool = False
    row_bytes: int = 0

    @classmethod
    def of(cls, media: EmbeddedMedia) -> "RowsInfo":
        return cls(media.hash, media.dtype, media.cached, media.rows[:1].nbytes)

    def embedded(self, rows: np.ndarray) -> EmbeddedMedia:
        """The embedding, once Ray has resolved the reference to ``rows``."""
        return EmbeddedMedia(self.hash, rows, self.dtype)


@dataclass(frozen=True, slots=True)
class PixelsInfo:
    """An item that the language model's replica encodes; the reference to its pixels is a separate argument.

    Attributes:
        salt, asked: as of :meth:`deployments.stages.EncoderStage.encode`.
    """

    item: MediaItem
    salt: str
    asked: float


@dataclass(frozen=True, slots=True)
class Encoded:
    """Report of a language model's replica on an item that it has encoded: the item's hash, whether its rows
    were cached, and the seconds that it took."""

    hash: str
    cached: bool
    seconds: float


#: Largest part of an item. A gRPC message holds 4 MiB.
PIECE_BYTES = 1 << 20
#: Bytes that a character or a token id takes at most, pickled; and a log-probability with its token.
CHARACTER_BYTES, _LOGPROB_BYTES = 5, 192

#: A :class:`StreamUpdate` as nested tuples; fields in the order of the dataclasses.
PackedUpdate = tuple[
    str, list[tuple[Any, ...]], tuple[int, int, int], list[Any] | None, bool, tuple[float, float] | None
]


def pack(update: StreamUpdate) -> PackedUpdate:
    """``update`` as nested tuples, which are cheaper to pickle."""
    deltas = [
        (d.index, d.text, d.token_ids, d.logprobs, d.finish_reason, d.stop_reason) for d in update.deltas
    ]
    usage = update.usage
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    times = None if update.times is None else (update.times.queue_s, update.times.prefill_s)
    return update.request_id, deltas, counts, update.prompt_logprobs, update.finished, times


def unpack(packed: PackedUpdate) -> StreamUpdate:
    """The inverse of :func:`pack`."""
    request_id, deltas, counts, prompt_logprobs, finished, times = packed
    # Nearly all updates have one delta.
    unpacked = [OutputDelta(*deltas[0])] if len(deltas) == 1 else [OutputDelta(*delta) for delta in deltas]
    ran = None if times is None else EngineTimes(*times)
    return StreamUpdate(request_id, unpacked, Usage(*counts), prompt_logprobs, finished, ran)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a pickled item that is too large for one gRPC message; the last one completes it."""

    data: bytes
    last: bool


def pieces(update: StreamUpdate) -> Sequence[PackedUpdate | Piece]:
    """``update`` as the items of a stream: mostly one, several where it may be too large for a message."""
    if weight(update) <= PIECE_BYTES:
        return (pack(update),)
    data = pickle.dumps(pack(update), pickle.HIGHEST_PROTOCOL)
    starts = range(0, len(data), PIECE_BYTES)
    return [Piece(data[start : start + PIECE_BYTES], start == starts[-1]) for start in starts]


def weight(update: StreamUpdate) -> int:
    """Bytes that a pickled update takes at most, about."""
    # This runs for each token of each stream: the usual update must be weighed without a loop.
    if len(update.deltas) == 1 and update.prompt_logprobs is None:
        delta = update.deltas[0]
        if delta.logprobs is None:
            return (len(delta.text) + len(delta.token_ids)) * CHARACTER_BYTES
    rows = [row for delta in update.deltas for row in delta.logprobs or ()]
    values = sum(len(row) for row in [*rows, *(update.prompt_logprobs or ())] if row is not None)
    characters = sum(len(delta.text) + len(delta.token_ids) for delta in update.deltas)
    return values * _LOGPROB_BYTES + characters * CHARACTER_BYTES


class Assembly:
    """Puts items together again that were sent in pieces."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, item: Any) -> Any | None:
        """The whole item that ``item`` completes; None if more pieces are to come."""
        if not isinstance(item, Piece):
            return item
        self._parts.append(item.data)
        if not item.last:
            return None
        parts, self._parts = self._parts, []
        return pickle.loads(b"".join(parts))
