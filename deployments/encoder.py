"""Pixels to embeddings, batched over the requests of all callers."""

import numpy as np

from deployments.handoff import RowsInfo, RowsRef, put
from deployments.threads import take_turns
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.prompt import MediaItem, PreparedMedia


class VisionEncoder:
    """A replica holds the vision part of one model, and nothing else of it."""

    def __init__(
        self, config: EngineConfig, max_batch_patches: int, cache_bytes: int, duty_cycle: float
    ) -> None:
        take_turns()
        self._engine = EncoderEngine.load(
            config, max_batch_cost=max_batch_patches, cache_bytes=cache_bytes, duty_cycle=duty_cycle
        )

    async def encode(self, item: MediaItem, pixels: np.ndarray, salt: str = "") -> RowsRef:
        """Embedding rows of one picture.

        Args:
            pixels: resolved from the reference that the caller passed.
            salt: keeps apart the caches of tenants.
        """
        embedded = await self._engine.encode_async(PreparedMedia(item, pixels), salt=salt)
        return RowsRef(RowsInfo(embedded.hash, embedded.dtype), await put(embedded.rows))

    async def metrics(self) -> dict[str, float]:
        """Counters of the engine, and what this process holds in the object store."""
        return self._engine.metrics()

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()
