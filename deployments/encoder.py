"""The encoder stage: pixels to embedding rows, batched over the requests of all callers."""

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.prompt import EmbeddedMedia, PreparedMedia


class VisionEncoder:
    """Holds the vision part of one model, and no other part of it.

    Args:
        config: the model.
        max_batch_patches: the most patches in one launch.
        cache_bytes: memory for embeddings of images seen before.
        duty_cycle: the share of the time that this stage computes at most.
    """

    def __init__(
        self, config: EngineConfig, max_batch_patches: int, cache_bytes: int, duty_cycle: float
    ) -> None:
        self._engine = EncoderEngine.load(
            config, max_batch_cost=max_batch_patches, cache_bytes=cache_bytes, duty_cycle=duty_cycle
        )

    async def encode(self, pixels: PreparedMedia, salt: str) -> EmbeddedMedia:
        """Encode one item; ``salt`` keeps the caches of tenants apart."""
        return await self._engine.encode_async(pixels, salt=salt)

    def metrics(self) -> dict[str, float]:
        """Counters of the encoder."""
        return self._engine.metrics()

    def close(self) -> None:
        """Refuse waiting work, finish running work, end the thread."""
        self._engine.shutdown()
