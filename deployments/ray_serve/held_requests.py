"""Requests that a replica holds until their callers ask for the streams of their answers."""

import asyncio
from dataclasses import dataclass

from deployments.ray_serve.refusals import Misrouted
from deployments.stages import Generation
from engine.prompt import EmbeddedMedia

#: Seconds for which a replica keeps a request whose stream is not asked for. That follows at once, unless its
#: sender or its client is gone.
HOLD_S = 30.0


@dataclass(frozen=True, slots=True)
class Held:
    """A request that was handed over ahead of its stream, with its embeddings."""

    request: Generation
    media: list[EmbeddedMedia]


class HeldRequests:
    """Requests that were handed over ahead of their streams, by their ids.

    Args:
        seconds: how long they are kept.
    """

    def __init__(self, seconds: float = HOLD_S) -> None:
        self._seconds = seconds
        self._held: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def keep(self, held: Held) -> None:
        """Keep a request for a while."""
        self._held[held.request.request_id] = held
        asyncio.get_running_loop().call_later(self._seconds, self._held.pop, held.request.request_id, None)

    def take(self, request_id: str) -> Held:
        """A request, which is no longer kept.

        Raises:
            Misrouted: another replica has it, or it was dropped.
        """
        held = self._held.pop(request_id, None)
        if held is None:
            raise Misrouted("This request was lost with a part of the server; try again.")
        return held
