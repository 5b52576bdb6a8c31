"""Prompts and embeddings to text."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
from ray import serve

from deployments.errors import Misrouted
from deployments.handoff import Embedding, Generation, PackedUpdate, RowsInfo, pack
from deployments.threads import take_turns
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.outputs import EmbeddingOutput
from engine.prompt import EmbeddedMedia

#: How long embeddings wait for their request, which follows them at once.
HOLD_S = 30.0


class LanguageModel:
    """A replica holds one engine."""

    def __init__(self, config: EngineConfig) -> None:
        take_turns()
        self._engine = AsyncEngine(config)
        self._held: dict[str, list[EmbeddedMedia]] = {}

    async def hold(self, request_id: str, media: Sequence[RowsInfo], *rows: np.ndarray) -> str:
        """Keep a request's embeddings until it comes, for a while.

        Args:
            rows: embedding rows for ``media``, resolved from the references that the caller passed.

        Returns:
            This replica's id, for the session of the call of :meth:`generate`.
        """
        self._held[request_id] = [info.embedded(array) for info, array in zip(media, rows, strict=True)]
        # The caller may be gone, or its client.
        asyncio.get_running_loop().call_later(HOLD_S, self._held.pop, request_id, None)
        return serve.get_replica_context().replica_id.unique_id

    async def generate(self, request: Generation) -> AsyncIterator[PackedUpdate]:
        """Stream a request's output; each item holds all that came since the last.

        Raises:
            Misrouted: the request's embeddings are not here but with another replica, or gone with it.
        """
        media = self._held.pop(request.request_id, None) if request.has_media else []
        if media is None:
            raise Misrouted("The pictures of this request were lost with a part of the server; try again.")
        updates = self._engine.generate(
            request.request_id, request.inputs, request.params, embeddings=media, priority=request.priority
        )
        try:
            async for update in updates:
                yield pack(update)
        finally:
            # Cancellation ends up here: what the request holds is freed now, not when garbage is collected.
            await updates.aclose()  # type: ignore[attr-defined]

    async def embed(self, request: Embedding, *rows: np.ndarray) -> EmbeddingOutput:
        """Pool a prompt's hidden states into a vector; ``rows`` are those of ``request.media``."""
        media = [info.embedded(array) for info, array in zip(request.media, rows, strict=True)]
        return await self._engine.embed(request.request_id, request.inputs, request.params, embeddings=media)

    async def max_model_len(self) -> int:
        """Most tokens of prompt and answer together: the KV cache may hold less than the model could."""
        return self._engine.max_model_len

    async def metrics(self) -> dict[str, Any]:
        """Counters and times of the engine."""
        return self._engine.metrics()

    async def check_integrity(self) -> bool:
        """Whether the engine is idle; raises AssertionError if it is, but still holds something."""
        if not self._engine.idle or self._held:
            return False
        self._engine.check_integrity()
        return True

    async def check_health(self) -> None:
        """Ray Serve restarts a replica that raises here."""
        self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()
