"""Passes requests, arrays and token streams between Ray Serve deployments.

The replica that makes an array puts it into the object store, and only its reference travels on: the ingress
in the middle never holds the bytes, unless they come by a line (:mod:`deployments.ray_serve.call_line`).
References are passed as top-level arguments, which Ray resolves for the receiver, without a copy on the same
node. Both need Ray's actor calls. Serve's gRPC transport would pickle a reference into a byte string; Ray
does not count it there and never frees its object.

Tokens stream by gRPC. It carries several times as many items per second as actor calls, and a slow reader
slows the writer down. So a request's embeddings are handed over first, by an actor call, and the stream that
follows goes to the replica that holds them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.ray_serve.packing import CHARACTER_BYTES, PIECE_BYTES, PixelsInfo, RowsInfo
from deployments.ray_serve.refusals import LOST
from deployments.stages import Generation, RowsLost
from engine.prompt import KeptFiles, MediaItem

#: Larger arrays don't go into a call as they are: to copy a megabyte takes a tenth of a millisecond.
_LARGE = 1 << 20


class Brought:
    """An array that has come by a line. It is taken once. Else this process would keep it for as long as
    an answer lasts.

    Args:
        array: it.
    """

    __slots__ = ("_array",)

    def __init__(self, array: np.ndarray) -> None:
        self._array: np.ndarray | None = array

    @property
    def nbytes(self) -> int:
        """Bytes of the array; 0 if it was taken."""
        return 0 if self._array is None else self._array.nbytes

    def take(self) -> np.ndarray:
        """The array.

        Raises:
            RowsLost: it was taken.
        """
        array, self._array = self._array, None
        if array is None:
            raise RowsLost(LOST)
        return array


@dataclass(frozen=True, slots=True)
class PixelsRef:
    """A prepared image: its description, the reference to its pixels, and how long each step took; further
    fields as in :class:`~engine.prompt.PreparedMedia`."""

    item: MediaItem
    pixels: ray.ObjectRef | Brought
    seconds: Mapping[str, float] = field(default_factory=dict)
    frames: int = 1
    rows: str | None = None
    kept: KeptFiles | None = None
    note: str = ""

    @property
    def embedded(self) -> "RowsRef | None":
        """The reference to the embedding rows that the caller gave; None if the encoder makes them."""
        return None if self.rows is None else RowsRef(RowsInfo(self.item.hash, self.rows), self.pixels)


@dataclass(frozen=True, slots=True)
class RowsRef:
    """An item for the language model: the reference to its embedding rows or pixels, and how to read them.
    Rows that have come by a line are in this process, for as long as the answer may need them again."""

    info: RowsInfo | PixelsInfo
    array: ray.ObjectRef | Brought | np.ndarray

    @property
    def cached(self) -> bool:
        """True if the rows were computed for an earlier request; False as long as it isn't known."""
        return isinstance(self.info, RowsInfo) and self.info.cached

    def kept(self) -> "RowsRef":
        """These for several prompts; errors as of :func:`taken`."""
        return RowsRef(self.info, taken(self.array))


class ObjectStore:
    """Puts arrays into Ray's object store.

    Args:
        put: stores an array and returns its reference.
        keep_s: seconds for which :meth:`put` keeps its reference. A busy receiver may be late to count a
            reference inside a result as its own, and until then Ray frees an array without another reference.
    """

    def __init__(self, put: Callable[[Any], Any] = ray.put, keep_s: float = 10.0) -> None:
        self._put = put
        self._keep_s = keep_s

    async def put(self, value: np.ndarray | list[bytes]) -> ray.ObjectRef:
        """Copy an array or files into the store, on a thread: megabytes would block the event loop."""
        reference = await asyncio.to_thread(self._put, value)
        asyncio.get_running_loop().call_later(self._keep_s, _drop, reference)
        return reference

    async def passed(self, value: Any) -> Any:
        """What a call may be given in place of ``value``: a reference to a large array, which Ray would copy
        into the store on the caller's event loop; anything else as it is. Ray counts arguments of calls."""
        large = isinstance(value, np.ndarray) and value.nbytes > _LARGE
        return await asyncio.to_thread(self._put, value) if large else value


def _drop(reference: ray.ObjectRef) -> None:
    """Do nothing: the timer that calls this has kept the reference alive until now."""


def by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """``handle`` with calls whose arguments and results may hold references."""
    return handle.options(_by_reference=True)


async def everywhere(handle: DeploymentHandle, method: str, seconds: float) -> list[Any]:
    """Call a method without arguments of every replica.

    Args:
        seconds: how long a replica may take.

    Returns:
        The results of those that answered in time. Serve's own ``results_async`` has none if one is late.
    """
    try:
        replicas = await handle.broadcast(method)._fetch_replica_results_async()
    except DeploymentUnavailableError:
        # Scaled to zero, or all replicas are starting.
        return []
    found = await asyncio.gather(
        *(asyncio.wait_for(replica.get_async(), seconds) for replica in replicas), return_exceptions=True
    )
    return [result for result in found if not isinstance(result, BaseException)]


def taken(reference: ray.ObjectRef | Brought | np.ndarray) -> Any:
    """Argument of a call for a reference; Ray or the replica resolves it.

    Raises:
        RowsLost: the array was taken before.
    """
    return reference.take() if isinstance(reference, Brought) else reference


def is_large(request: Generation) -> bool:
    """Return whether a request may be too large for a gRPC message."""
    inputs = request.inputs
    tokens = len(inputs.token_ids) + (request.progress.num_tokens if request.progress is not None else 0)
    places = sum(span.embed_index.nbytes for span in inputs.spans if span.embed_index is not None)
    return CHARACTER_BYTES * (tokens + len(inputs.text or "")) + places > PIECE_BYTES


def stream(
    handle: DeploymentHandle, method: str, *args: Any, replica: str = ""
) -> AbstractAsyncContextManager[AsyncIterator[Any]]:
    """Call a generator method with plain values. An exception in the block, also one that closes a generator
    around it, cancels the call in the replica.

    Args:
        replica: id of the replica to call, see :mod:`deployments.ray_serve.routing`; empty: any replica.
    """
    return _Stream(handle.options(stream=True, _by_reference=False, session_id=replica), method, args)


class _Stream:
    __slots__ = ("_args", "_handle", "_method", "_response")

    def __init__(self, handle: DeploymentHandle, method: str, args: tuple[Any, ...]) -> None:
        self._handle, self._method, self._args = handle, method, args

    async def __aenter__(self) -> AsyncIterator[Any]:
        self._response = getattr(self._handle, self._method).remote(*self._args)
        return self._response

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        response = self._response
        # The error's traceback may keep this object.
        del self._response
        if error is not None:
            cancel(response)


def cancel(response: Any) -> None:
    """Cancel a call, in its replica if it has got there.

    ``response.cancel()`` alone does nothing in silence if the call was assigned to a replica in the moment in
    which its caller was cancelled: it asks for the assignment's result, which the caller has not taken any
    more.
    """
    response.cancel()
    assigned = getattr(response, "_replica_result_future", None)
    if assigned is None or not assigned.done() or assigned.cancelled() or assigned.exception() is not None:
        return
    assigned.result().cancel()
