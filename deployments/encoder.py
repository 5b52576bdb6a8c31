"""The encoder stage: pixels to embedding rows, batched over the requests of all callers."""

from collections.abc import Callable
from typing import Any

from deployments.metrics.families import Family, Part
from deployments.metrics.snapshots import encoder_families
from deployments.metrics.stage import StageMeter
from deployments.stage_config import EncoderConfig
from deployments.stages import stopping_is_loss
from deployments.tracing import Tracer
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.prompt import EmbeddedMedia, PreparedMedia
from engine.turns import Turns


class VisionEncoder:
    """Holds the vision part of one model, and no other part of it.

    Args:
        config: of the stage.
        engine: the model.
        tracer: makes the spans of requests.
        turns: of a language model in this process, see :class:`~engine.encoder.EncoderEngine`.
    """

    def __init__(
        self,
        config: EncoderConfig,
        engine: EngineConfig,
        tracer: Tracer | None = None,
        *,
        turns: Turns | None = None,
    ) -> None:
        self._engine = EncoderEngine.load(
            engine,
            max_batch_cost=config.max_batch_patches,
            cache_bytes=config.cache_bytes,
            duty_cycle=config.duty_cycle,
            turns=turns,
        )
        self._meter = StageMeter(
            "encoder",
            lambda: self._engine.metrics()["waiting"],
            lambda: self._engine.metrics()["batches_by_items"],
            tracer,
        )

    def take_over(self, config: EncoderConfig) -> None:
        """Take over the values of :attr:`EncoderConfig.IN_PLACE`, from the next launch on."""
        self._engine.tune(
            max_batch_cost=config.max_batch_patches,
            cache_bytes=config.cache_bytes,
            duty_cycle=config.duty_cycle,
        )

    async def encode(self, pixels: PreparedMedia, salt: str, asked: float) -> EmbeddedMedia:
        """Encode one item; arguments as of :meth:`deployments.stages.EncoderStage.encode`.

        Raises:
            StageLost: the encoder has stopped.
        """
        with self._meter.request() as span, stopping_is_loss():
            embedded = await self._engine.encode_async(pixels, salt=salt, asked=asked)
            span.note(visual_tokens=pixels.item.num_tokens, cached=embedded.cached)
            self._meter.count_bytes(pixels.pixels.nbytes, embedded.rows.nbytes)
            return embedded

    def metrics(self) -> dict[str, Any]:
        """Counters of the encoder."""
        return self._engine.metrics()

    async def collect(self) -> list[Part]:
        """The metrics of this stage."""
        return [Part({"replica": "local"}, self.families())]

    def families(self) -> list[Family]:
        """The metrics of this replica."""
        return [*self._meter.families(), *encoder_families(self._engine.metrics())]

    def check_health(self) -> None:
        """Check that the encoder is running.

        Raises:
            Unavailable: it has stopped.
        """
        self._engine.check_health()

    def when_dead(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, on any thread, once nothing can be encoded any more."""
        self._engine.when_dead(call)

    def close(self) -> None:
        """Refuse waiting work, finish running work, end the thread."""
        self._engine.shutdown()
