"""Prompts and embeddings to text."""

from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from deployments.handoff import Embedding, Generation
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.outputs import EmbeddingOutput, StreamUpdate


class LanguageModel:
    """A replica holds one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = AsyncEngine(config)

    async def generate(self, request: Generation, *rows: np.ndarray) -> AsyncIterator[StreamUpdate]:
        """Stream a request's output; each item holds all that came since the last.

        Args:
            rows: embedding rows for ``request.media``, resolved from the references that the caller passed.
        """
        media = [info.embedded(array) for info, array in zip(request.media, rows, strict=True)]
        updates = self._engine.generate(
            request.request_id, request.inputs, request.params, embeddings=media, priority=request.priority
        )
        try:
            async for update in updates:
                yield update
        finally:
            # Cancellation ends up here: what the request holds is freed now, not when garbage is collected.
            await updates.aclose()  # type: ignore[attr-defined]

    async def embed(self, request: Embedding, *rows: np.ndarray) -> EmbeddingOutput:
        """Pool a prompt's hidden states into a vector; ``rows`` as in :meth:`generate`."""
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
        if not self._engine.idle:
            return False
        self._engine.check_integrity()
        return True

    async def check_health(self) -> None:
        """Ray Serve restarts a replica that raises here."""
        self._engine.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()
