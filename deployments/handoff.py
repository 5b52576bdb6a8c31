"""What passes between deployments, and how: requests, arrays and token streams.

An array is put into the object store by the replica that made it, and only its reference travels on, so that
the ingress in the middle never holds the bytes. References are passed as top-level arguments, which Ray
resolves for the receiver: without a copy on the same node. Both need Ray's own actor calls; Serve's gRPC
transport would pickle references into a byte string, where nothing counts them and they are never freed.

Tokens stream by gRPC, which carries several times as many items a second as actor calls do, and lets a reader
that is behind slow the writer down. So a picture's rows are handed over first, by a call of their own, and
the stream that follows goes to the replica that holds them. Its items are plain tuples, which become bytes in
a fifth of the time that objects take.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.serve.handle import DeploymentHandle

from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.pooling_params import PoolingParams
from engine.prompt import EmbeddedMedia, EngineInput, MediaItem
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class PixelsRef:
    """A prepared picture: its description, and where its pixels lie."""

    item: MediaItem
    pixels: ray.ObjectRef


@dataclass(frozen=True, slots=True)
class RowsInfo:
    """How to read the embedding rows of a picture, whose reference is an argument of its own."""

    hash: str
    dtype: str

    def embedded(self, rows: np.ndarray) -> EmbeddedMedia:
        """The embedding, once Ray has resolved the reference."""
        return EmbeddedMedia(self.hash, rows, self.dtype)


@dataclass(frozen=True, slots=True)
class RowsRef:
    """An encoded picture: where its embedding rows lie, and how to read them."""

    info: RowsInfo
    rows: ray.ObjectRef


@dataclass(frozen=True, slots=True)
class Generation:
    """One request to generate, without the embeddings: those were handed over before.

    Attributes:
        request_id: unique.
        inputs: the prompt.
        params: how to sample.
        priority: smaller goes first.
        has_media: whether embeddings were handed over under this id.
    """

    request_id: str
    inputs: EngineInput
    params: SamplingParams
    priority: int = 0
    has_media: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """One request to pool; fields as :class:`Generation`. Its embeddings are arguments of their own.

    Attributes:
        media: what the embedding rows that follow are.
    """

    request_id: str
    inputs: EngineInput
    params: PoolingParams
    media: tuple[RowsInfo, ...] = field(default=())


#: An update of a stream: its fields in their order, and its deltas and its usage likewise.
PackedUpdate = tuple[str, list[tuple[Any, ...]], tuple[int, int, int], list[Any] | None, bool]


def pack(update: StreamUpdate) -> PackedUpdate:
    """``update`` as it travels."""
    deltas = [
        (d.index, d.text, d.token_ids, d.logprobs, d.finish_reason, d.stop_reason) for d in update.deltas
    ]
    usage = update.usage
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    return update.request_id, deltas, counts, update.prompt_logprobs, update.finished


def unpack(packed: PackedUpdate) -> StreamUpdate:
    """What :func:`pack` was given."""
    request_id, deltas, counts, prompt_logprobs, finished = packed
    return StreamUpdate(
        request_id, [OutputDelta(*delta) for delta in deltas], Usage(*counts), prompt_logprobs, finished
    )


#: How long the maker of an array holds on to it.
KEEP_S = 10.0


async def put(array: np.ndarray) -> ray.ObjectRef:
    """``array`` in the object store. Copies on a thread: megabytes would hold up an event loop.

    The reference is kept for a while: until a busy receiver has counted the one inside a result as its own,
    there would be none, and the array be gone.
    """
    reference = await asyncio.to_thread(ray.put, array)
    asyncio.get_running_loop().call_later(KEEP_S, _let_go, reference)
    return reference


def _let_go(reference: ray.ObjectRef) -> None:
    """Whoever was to call this has held the reference until now."""


def by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """``handle`` with calls whose arguments and results may hold references."""
    return handle.options(_by_reference=True)


@asynccontextmanager
async def stream(
    handle: DeploymentHandle, method: str, *args: Any, replica: str = "", large: bool = False
) -> AsyncIterator[AsyncIterator[Any]]:
    """Call a generator method with plain values; leaving the block before its end cancels it in the replica.

    Args:
        replica: id of the one to be called, see :mod:`deployments.routing`; empty: any.
        large: an item may be of more than the 4 MB that gRPC takes: the stream goes by actor calls.
    """
    streaming = handle.options(stream=True, _by_reference=large, session_id=replica)
    response = getattr(streaming, method).remote(*args)
    ended = False

    async def items() -> AsyncIterator[Any]:
        nonlocal ended
        async for item in response:
            yield item
        ended = True

    try:
        yield items()
    finally:
        if not ended:
            response.cancel()
