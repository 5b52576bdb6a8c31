"""The language model stage: prompts and embedding rows to text or vectors."""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Self

from deployments.metrics.families import Family, Part
from deployments.metrics.snapshots import engine_families
from deployments.metrics.stage import StageMeter
from deployments.stages import Generation, Pooling, stopping_is_loss
from deployments.tracing import Tracer
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.executor.launch import Launcher
from engine.mailbox import Taker
from engine.outputs import EmbeddingOutput, StreamUpdate, Usage
from engine.prompt import EmbeddedMedia
from engine.turns import Turns


class LanguageModel:
    """Holds one engine.

    Args:
        engine: the loaded engine; it is closed with this object.
        tracer: makes the spans of requests.
    """

    def __init__(self, engine: AsyncEngine, tracer: Tracer | None = None) -> None:
        self._engine = engine
        self._meter = StageMeter(
            "language_model",
            lambda: engine.metrics()["waiting"],
            lambda: engine.metrics()["batches"],
            tracer,
        )

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        tracer: Tracer | None = None,
        launcher: Launcher | None = None,
        turns: Turns | None = None,
    ) -> Self:
        """Load the model that ``config`` names.

        Args:
            tracer: makes the spans of requests.
            launcher: starts the ranks beyond the first; processes of this machine if None.
            turns: with an encoder of this process; None without one.

        Raises:
            CheckpointError, ConfigError: it can't be loaded or run.
        """
        return cls(AsyncEngine(config, launcher, turns), tracer)

    async def generate(
        self, request: Generation, media: Sequence[EmbeddedMedia], relay: Taker | None = None
    ) -> AsyncGenerator[StreamUpdate, None]:
        """Stream a request's output; each update holds everything since the last one.

        Args:
            relay: takes updates past this iterator.

        Raises:
            StageLost: the engine has stopped.
        """
        updates = self._engine.generate(
            request.request_id,
            request.inputs,
            request.params,
            embeddings=media,
            priority=request.priority,
            progress=request.progress,
            relay=relay,
            asked=request.asked,
        )
        self._meter.count_bytes(sum(embedded.rows.nbytes for embedded in media))
        usage: Usage | None = None
        with self._meter.request() as span, stopping_is_loss():
            # Without this, a cancelled request would hold its blocks until the generator is
            # garbage-collected.
            async with aclosing(updates) as stream:  # type: ignore[type-var]
                async for update in stream:
                    if usage is None:
                        span.event("first token")
                    usage = update.usage
                    yield update
            if usage is not None:
                span.note(
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                    cached_tokens=usage.cached_tokens,
                )

    async def embed(self, request: Pooling, media: Sequence[EmbeddedMedia]) -> EmbeddingOutput:
        """Pool a prompt's hidden states into a vector; errors as :meth:`generate`."""
        self._meter.count_bytes(sum(embedded.rows.nbytes for embedded in media))
        with self._meter.request(), stopping_is_loss():
            return await self._engine.embed(
                request.request_id, request.inputs, request.params, embeddings=media
            )

    async def max_model_len(self) -> int:
        """The most tokens of prompt and answer together: the KV cache may hold fewer than the model could."""
        return self._engine.max_model_len

    async def device(self) -> str:
        """The devices that the model runs on, in words."""
        return self._engine.device

    def metrics(self) -> dict[str, Any]:
        """Counters, gauges and times of the engine."""
        return self._engine.metrics()

    async def collect(self) -> list[Part]:
        """The metrics of this stage."""
        return [Part({"replica": "local"}, self.families())]

    def families(self) -> list[Family]:
        """The metrics of this replica."""
        return [*self._meter.families(), *engine_families(self._engine.metrics())]

    def is_idle(self) -> bool:
        """Return whether no request is in the engine.

        Raises:
            AssertionError: an idle engine still holds memory.
        """
        if not self._engine.idle:
            return False
        self._engine.check_integrity()
        return True

    def check_health(self) -> None:
        """Check that the engine is running.

        Raises:
            Unavailable: the engine has stopped.
        """
        self._engine.check_health()

    def when_dead(self, call: Callable[[], None]) -> None:
        """Have ``call`` called, on any thread, once the engine can compute nothing more."""
        self._engine.when_dead(call)

    def close(self) -> None:
        """Stop the engine. Requests that still run are lost."""
        self._engine.shutdown()
