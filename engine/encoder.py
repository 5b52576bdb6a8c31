"""The encoder engine: batches the images of all requests, and caches their embeddings."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.errors import InvalidRequest, SightlineError, Unavailable
from engine.families.base import MediaEncoder
from engine.families.load import load_vision_encoder
from engine.families.registry import resolve
from engine.goal_queue import GoalQueue, Place, deadline_of
from engine.graphs import make_capture
from engine.lru import LruCache
from engine.metrics import COUNT_BUCKETS, Histogram
from engine.placement import open_device, resolve_device, resolve_dtype
from engine.prompt import EmbeddedMedia, PreparedMedia
from engine.startup import StartTimes
from engine.transfers import download, record_event
from engine.turns import Turns
from engine.vision.graphs import CROWD_TOKENS
from engine.vision.sam import SamTower
from engine.vision.transformer import VisionTransformer
from engine.watchdog import Mortal, Watchdog

logger = logging.getLogger(__name__)

MAX_BATCH_COST = 32768
CACHE_BYTES = 512 << 20
#: Items that may wait while launches still make way for the steps of a language model after each piece.
_CROWD = 2
#: Cost of a crowd's items that are launched between two of those steps.
_TOGETHER = CROWD_TOKENS
#: Share of a goal for the first token that may have passed when an item's launch begins.
_WAITING_SHARE = 0.6


@dataclass(slots=True)
class EncoderCounters:
    """Counters since the engine's start. ``seconds`` were spent encoding, ``rest_seconds`` idle to leave the
    device to the language model."""

    items: int = 0
    rows: int = 0
    patches: int = 0
    batches: int = 0
    failures: int = 0
    cache_hits: int = 0
    joined: int = 0
    seconds: float = 0.0
    rest_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    """One item being encoded for everybody who asked for it meanwhile.

    Attributes:
        place: where it waits.
    """

    media: PreparedMedia
    cost: int
    result: Future[EmbeddedMedia] = field(default_factory=Future)
    waiters: int = 1
    place: Place[_Job] | None = None


class EncoderEngine(Mortal):
    """Turns prepared images into embedding rows.

    :meth:`encode` is for callers on the same device; :meth:`encode_async` batches across requests on a thread
    of its own, without waiting for more to come: what has gathered while one batch ran makes up the next.

    Args:
        device: where ``encoder`` lives.
        max_batch_cost: patches per launch; a larger item goes alone.
        cache_bytes: rows remembered by content hash, least recently used dropped first; 0 remembers none.
        duty_cycle: share of the time, above 0 and up to 1, that launches for :meth:`encode_async` take at
            most: after each piece of one the engine rests, and what else runs on the device keeps its pace.
        turns: of a language model of this process, which computes on the device's default stream. Launches
            for :meth:`encode_async` go there too, piece by piece: its steps come in between. While more than
            ``_CROWD`` items wait, whole launches do, of up to ``CROWD_TOKENS`` patches: those are captured.
            None without such a language model.
        step_timeout_s: seconds after which a launch for :meth:`encode_async` is assumed never to return.
        first_token_goal_s: see :class:`~engine.config.EngineConfig`.
    """

    def __init__(
        self,
        encoder: MediaEncoder,
        device: torch.device,
        *,
        max_batch_cost: int = MAX_BATCH_COST,
        cache_bytes: int = CACHE_BYTES,
        duty_cycle: float = 1.0,
        turns: Turns | None = None,
        step_timeout_s: float = 300.0,
        first_token_goal_s: float | None = None,
    ) -> None:
        super().__init__("encoder")
        self._encoder = encoder
        self._turns = turns
        for tower in _towers(encoder):
            tower.pause = self._pause
        self._piece_began = 0.0
        self._step_timeout_s = step_timeout_s
        self._goal_s = first_token_goal_s
        self._duty_cycle = duty_cycle
        self._device = device
        self._max_batch_cost = max_batch_cost
        self._cache: LruCache[EmbeddedMedia] = LruCache(cache_bytes)
        self._counters = EncoderCounters()
        self._batches = Histogram(COUNT_BUCKETS)
        self._pending_rows = 0
        self._queue: GoalQueue[_Job] = GoalQueue()
        self._jobs: dict[str, _Job] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._watchdog: Watchdog | None = None

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        *,
        max_batch_cost: int = MAX_BATCH_COST,
        cache_bytes: int = CACHE_BYTES,
        duty_cycle: float = 1.0,
        turns: Turns | None = None,
    ) -> EncoderEngine:
        """Load the vision part of ``config.model``, and nothing else of it.

        Raises:
            CheckpointError: the checkpoint is unusable or has no vision part.
            ConfigError: the device isn't there.
        """
        times = StartTimes()
        checkpoint = Checkpoint.open(config.model, config.revision)
        model = resolve(checkpoint).parse(checkpoint)
        device = resolve_device(config)
        with times.phase("device"):
            open_device(device)
        with times.phase("weights"):
            encoder = load_vision_encoder(
                checkpoint,
                model,
                device=device,
                dtype=resolve_dtype(config, model),
                load_format=config.load_format,
                seed=config.seed,
                quantization=config.encoder_quantization,
            )
        capture = make_capture(device, enforce_eager=config.enforce_eager)
        if capture is not None:
            for tower in _towers(encoder):
                if isinstance(tower, VisionTransformer):
                    tower.expects_crowds = turns is not None
            with times.phase("graphs"):
                encoder.capture_graphs(capture)
        logger.info("the encoder started in %s", times)
        return cls(
            encoder,
            device,
            max_batch_cost=max_batch_cost,
            cache_bytes=cache_bytes,
            duty_cycle=duty_cycle,
            turns=turns,
            step_timeout_s=config.step_timeout_s,
            first_token_goal_s=config.first_token_goal_s,
        )

    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        """Rows ``(num_tokens, embedding_width)`` of each item, on the device, in launches of bounded cost.

        Raises:
            InvalidRequest: an item isn't what its description says.
        """
        rows: list[torch.Tensor] = []
        remaining = deque((entry, self._encoder.cost(entry.item)) for entry in media)
        while remaining:
            batch, cost = [], 0
            while remaining and _fits(cost, remaining[0][1], self._max_batch_cost):
                entry, more = remaining.popleft()
                cost += more
                batch.append(entry)
            rows += self._launch(batch)
        return rows

    async def encode_async(
        self, media: PreparedMedia, *, salt: str = "", asked: float | None = None
    ) -> EmbeddedMedia:
        """Rows of one item: from the cache, from the same item's encoding under way, or from the next batch.

        Args:
            salt: keeps apart the caches of tenants.
            asked: when the client asked, by ``time.time()``; None for now.

        Raises:
            InvalidRequest: the item isn't what its description says; others in its batch are not affected.
            Unavailable: see :meth:`check_health`.
        """
        key = f"{salt}:{media.item.hash}"
        # An item without a cost must not come before the thread that serves all.
        cost = self._encoder.cost(media.item)
        with self._changed:
            self.check_health()
            known = self._cache.get(key)
            if known is not None:
                self._counters.cache_hits += 1
                return replace(known, cached=True)
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = _Job(media, cost)
                deadline = deadline_of(self._goal_s, _WAITING_SHARE, asked)
                job.place = self._queue.push(job, arrival=time.monotonic(), deadline=deadline)
                self._pending_rows += media.item.num_tokens
                job.result.add_done_callback(lambda future: self._settle(key, future))
                self._start()
                self._changed.notify()
            else:
                job.waiters += 1
                self._counters.joined += 1
        try:
            # The job may serve others: one caller's cancellation must not reach it.
            return await asyncio.shield(asyncio.wrap_future(job.result))
        finally:
            with self._changed:
                job.waiters -= 1
                assert job.place is not None
                if not job.waiters and self._queue.remove(job.place):
                    # Its pixels must not stay until its turn comes.
                    job.result.cancel()
            # It keeps its error, and an error keeps the frames that it has come through.
            del job

    def tune(self, *, max_batch_cost: int, cache_bytes: int, duty_cycle: float) -> None:
        """Change arguments of the constructor, from the next launch on."""
        with self._changed:
            self._max_batch_cost = max_batch_cost
            self._duty_cycle = duty_cycle
            self._cache.limit(cache_bytes)

    def check_health(self) -> None:
        """Raise if the engine can encode no more images.

        Raises:
            Unavailable: the engine was shut down, or its device or its thread has failed for good.
        """
        if (stopped := self._stopped()) is not None:
            raise stopped

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, launches by their number of items, and what waits and is cached now.

        ``pending_rows`` are the embedding rows of items that wait or are being encoded.
        """
        with self._changed:
            return {
                **asdict(self._counters),
                "batches_by_items": self._batches.snapshot(),
                "waiting": len(self._queue),
                "late": self._queue.num_late,
                "pending_rows": self._pending_rows,
                "cached_items": len(self._cache),
                "cached_bytes": self._cache.bytes,
            }

    def shutdown(self) -> None:
        """Refuse what waits, finish what runs, end the thread. May be called twice."""
        self._refuse(Unavailable("The encoder is shutting down."))
        if self._watchdog is not None:
            self._watchdog.close()
        if self._thread is not None:
            self._join(self._thread)

    def _start(self) -> None:
        if self._thread is None:
            self._watchdog = Watchdog(lambda: None, self._step_timeout_s, self._die)
            self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
            self._thread.start()

    def _refuse(self, error: SightlineError) -> None:
        """Fail what waits with ``error``; nothing new is taken in."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            self._changed.notify()
        for job in dropped:
            job.result.set_exception(error)

    def _run(self) -> None:
        try:
            self._serve_all()
        except BaseException as error:
            self._die(error)

    def _fail_all(self, error: SightlineError) -> None:
        self._refuse(error)
        with self._changed:
            running = [job for job in self._jobs.values() if not job.result.done()]
        for job in running:
            job.result.set_exception(error)

    def _serve_all(self) -> None:
        own = self._device.type == "cuda" and self._turns is None
        stream = torch.cuda.Stream(self._device) if own else None
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._queue or self._closed)
                    if self._closed:
                        return
                    jobs = self._take()
                if jobs:
                    self._piece_began = time.perf_counter()
                    assert self._watchdog is not None
                    with self._watchdog.step():
                        self._serve(jobs)
                    self._rest()
                    if self._turns is not None and not self._queue:
                        self._turns.crowded = False
                # Images may be large: the last ones must not stay while the thread waits for more.
                del jobs

    def _pause(self) -> None:
        """Let others have the device between two pieces of a launch."""
        if threading.current_thread() is not self._thread:
            return
        if self._duty_cycle < 1 or self._makes_way():
            event = record_event(self._device, idle_wait=True)
            if event is not None and self._turns is not None and self._duty_cycle == 1:
                self._turns.await_step(event.query)
            elif event is not None:
                event.synchronize()
            self._rest()
            self._piece_began = time.perf_counter()

    def _makes_way(self) -> bool:
        """Return True if steps of an engine come between the pieces of a launch."""
        return self._turns is not None and len(self._queue) <= _CROWD

    def _rest(self) -> None:
        """Wait as long as the piece that has just ended asks for, or until the engine is shut down."""
        worked = time.perf_counter() - self._piece_began
        seconds = worked * (1 / self._duty_cycle - 1)
        if seconds > 0:
            with self._changed:
                self._counters.rest_seconds += seconds
                self._changed.wait_for(lambda: self._closed, timeout=min(seconds, threading.TIMEOUT_MAX))

    def _take(self) -> list[_Job]:
        """Waiting jobs in their order, up to the cost of one launch.

        An engine gets few items one by one: it computes their prompts in as many steps, which are shorter. Of
        a crowd it gets several between two steps, else the crowd would grow.
        """
        jobs: list[_Job] = []
        cost = 0
        most = 1 if self._makes_way() else len(self._queue)
        if self._turns is not None:
            self._turns.crowded = not self._makes_way()
        limit = self._max_batch_cost if self._turns is None else _TOGETHER
        while len(jobs) < most and (job := self._queue.first()) and _fits(cost, job.cost, limit):
            self._queue.pop()
            cost += job.cost
            jobs.append(job)
        return jobs

    def _launches(self, jobs: Sequence[_Job]) -> Iterator[list[PreparedMedia]]:
        """The items of each launch."""
        batch: list[PreparedMedia] = []
        cost, limit = 0, self._max_batch_cost
        if self._turns is not None:
            limit = min(limit, CROWD_TOKENS)
        for job in jobs:
            if not _fits(cost, job.cost, limit):
                yield batch
                batch, cost = [], 0
            batch.append(job.media)
            cost += job.cost
        yield batch

    def _serve(self, jobs: list[_Job]) -> None:
        try:
            made = [download(rows) for batch in self._launches(jobs) for rows in self._launch(batch)]
            began = time.perf_counter()
            if (event := record_event(self._device, idle_wait=True)) is not None:
                event.synchronize()
            self._counters.seconds += time.perf_counter() - began
            for job, rows in zip(jobs, made, strict=True):
                job.result.set_result(_embedded(job.media.item.hash, rows))
        except Exception as error:
            if len(jobs) > 1:
                # Find out whose fault it is: the others must not suffer.
                for job in jobs:
                    if not job.result.done():
                        self._serve([job])
                return
            if not isinstance(error, SightlineError):
                logger.exception("encoding failed")
            if not jobs[0].result.done():
                # Its frames hold the images, which must not stay for as long as the error.
                jobs[0].result.set_exception(error.with_traceback(None))
            if self._device.type == "cuda":
                # Raises if no launch can succeed any more.
                torch.cuda.synchronize(self._device)

    def _launch(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        began = time.perf_counter() - self._counters.rest_seconds
        try:
            rows = self._encoder.encode(media)
        except Exception:
            self._counters.failures += 1
            raise
        for entry, part in zip(media, rows, strict=True):
            if len(part) != entry.item.num_tokens:
                raise InvalidRequest(
                    f"the item announces {entry.item.num_tokens} rows, its pixels make {len(part)}",
                    param="image",
                )
        counters = self._counters
        counters.items += len(media)
        counters.rows += sum(len(part) for part in rows)
        counters.patches += sum(self._encoder.cost(entry.item) for entry in media)
        counters.batches += 1
        self._batches.observe(len(media))
        # Without the rests in between.
        counters.seconds += time.perf_counter() - counters.rest_seconds - began
        return rows

    def _settle(self, key: str, future: Future[EmbeddedMedia]) -> None:
        with self._changed:
            self._pending_rows -= self._jobs.pop(key).media.item.num_tokens
            if not future.cancelled() and future.exception() is None:
                made = future.result()
                self._cache.put(key, made, made.rows.nbytes)


def _towers(encoder: MediaEncoder) -> list[VisionTransformer | SamTower]:
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return [module for module in modules if isinstance(module, VisionTransformer | SamTower)]


def _fits(cost: int, more: int, limit: int) -> bool:
    return not cost or cost + more <= limit


def _embedded(content_hash: str, rows: torch.Tensor) -> EmbeddedMedia:
    """Rows on the host as an array of their own, in memory that is not pinned."""
    dtype = str(rows.dtype).removeprefix("torch.")
    array = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy().copy()
    array.flags.writeable = False
    return EmbeddedMedia(content_hash, array, dtype)
