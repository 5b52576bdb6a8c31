"""The engine behind a server: requests from an event loop, steps on a thread of their own."""

from __future__ import annotations

import asyncio
import gc
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from engine.config import EngineConfig
from engine.errors import NoTokenAllowed, RequestFailed, SightlineError, Unavailable
from engine.executor.launch import Launcher
from engine.loading import LoadedEngine, load_engine
from engine.mailbox import Mailbox, Result, Taker
from engine.outputs import EmbeddingOutput, StreamUpdate, Usage
from engine.placement import describe_device, resolve_device
from engine.pooling_params import PoolingParams
from engine.progress import Progress
from engine.prompt import EngineInput
from engine.request_factory import Embedding
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvents
from engine.turns import Turns
from engine.watchdog import Mortal, Watchdog

logger = logging.getLogger(__name__)


class _LoopMailbox(Mailbox):
    """A mailbox that is filled from another thread, by way of the reader's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, relay: Taker | None = None) -> None:
        super().__init__(relay)
        self.loop = loop


def _cut_dead_end(update: StreamUpdate) -> str | None:
    """Why an answer of ``update`` can't go on, if one can't. The update then holds its text alone: an answer
    that breaks off must not look like one that has ended."""
    found = None
    for delta in update.deltas:
        if delta.finish_reason == "error":
            found = str(delta.stop_reason)
            delta.finish_reason = delta.stop_reason = None
            update.finished = False
    return found


def _put_all(parcels: Sequence[tuple[_LoopMailbox, Result]]) -> None:
    for mailbox, result in parcels:
        try:
            mailbox.put(result)
        except Exception as error:
            logger.exception("an update could not be delivered")
            mailbox.fail(RequestFailed(f"This request failed inside the engine ({type(error).__name__})."))


class AsyncEngine(Mortal):
    """Add, stream, abort.

    Three threads share the work: the caller's event loop, the step thread that keeps the device busy, and the
    output thread that turns tokens into text. Methods are called from event loops only.

    Args:
        config: what to load; loading happens here, and takes its time.
        launcher: starts the ranks beyond the first; processes of this machine if None.
        turns: with an encoder of this process that computes on the same device; None without one.

    Raises:
        CheckpointError, ConfigError: see :func:`engine.loading.load_engine`.
    """

    def __init__(
        self, config: EngineConfig, launcher: Launcher | None = None, turns: Turns | None = None
    ) -> None:
        super().__init__("engine")
        self._engine: LoadedEngine = load_engine(config, launcher)
        self.config = config
        self._inbox: deque[tuple[str, RequestGroup]] = deque()
        self._wake = threading.Condition()
        self._turns = turns
        if turns is not None:
            self._engine.core.on_step = turns.stepped
        self._steps: queue.SimpleQueue[tuple[list[StepEvents], list[tuple[str, RequestGroup]]] | None] = (
            queue.SimpleQueue()
        )
        self._mailboxes: dict[RequestGroup, _LoopMailbox] = {}
        # What was loaded stays: the collector needn't walk it again and again.
        gc.collect()
        gc.freeze()
        if config.task == "generate" and resolve_device(config).type == "cuda":
            # Without a GPU the cores have too much else to do during a start.
            self._engine.grammars.warm_up()
        # The event loop, the output thread and other replicas of the host need the cores.
        self._engine.core.runner.idle_waits = True
        self._watchdog = Watchdog(self._engine.core.runner.check_health, config.step_timeout_s, self._die)
        self._threads = [
            threading.Thread(target=self._run_steps, name="engine-steps", daemon=True),
            threading.Thread(target=self._run_outputs, name="engine-outputs", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.requests.max_model_len

    @property
    def device(self) -> str:
        """The devices that the model runs on, in words."""
        return describe_device(self.config)

    async def generate(
        self,
        request_id: str,
        inputs: EngineInput,
        params: SamplingParams,
        *,
        embeddings: Sequence[Embedding] = (),
        priority: int = 0,
        progress: Progress | None = None,
        relay: Taker | None = None,
        asked: float | None = None,
    ) -> AsyncIterator[StreamUpdate]:
        """Stream a request's output; each item holds all that came since the last was taken.

        Args:
            relay: takes updates past this iterator, on the event loop.
            progress: what another engine has given of this answer; the stream brings the rest. ``params``
                need the seed that the other engine had.
            asked: when the client asked, by ``time.time()``; None for now.

        Closing the iterator, or cancelling the task that reads it, aborts the request and frees what it held.

        Raises:
            InvalidRequest: before anything was computed.
            NoTokenAllowed: in the middle of an answer, after its text so far.
            RequestFailed: computing it raised; what came before holds.
            Unavailable: the engine has died.
        """
        self.check_health()
        if params.structured is not None:
            await self._engine.grammars.compile_async(params.structured)
        group = self._engine.requests.generation(
            request_id, inputs, params, embeddings, priority, progress, asked
        )
        mailbox = self._submit(group, relay)
        try:
            while True:
                update = await mailbox.get()
                assert isinstance(update, StreamUpdate)
                if (dead_end := _cut_dead_end(update)) is not None:
                    yield update
                    raise NoTokenAllowed(dead_end)
                yield update
                if update.finished:
                    return
        finally:
            self._retract(group)

    async def embed(
        self,
        request_id: str,
        inputs: EngineInput,
        params: PoolingParams,
        *,
        embeddings: Sequence[Embedding] = (),
    ) -> EmbeddingOutput:
        """Pool a prompt's hidden states; errors as :meth:`generate`."""
        self.check_health()
        group = self._engine.requests.pooling(request_id, inputs, params, embeddings)
        mailbox = self._submit(group)
        try:
            result = await mailbox.get()
            assert isinstance(result, EmbeddingOutput)
            return result
        finally:
            self._retract(group)

    def metrics(self) -> dict:
        """Counters, gauges and times; plain data."""
        scheduler = self._engine.core.scheduler
        pool, stats = scheduler.kv.pool, scheduler.stats
        return {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "waiting_tokens": scheduler.waiting_tokens,
            "late": scheduler.num_late,
            "batches": stats.batches.snapshot(),
            "preempted": stats.preempted,
            "kv_blocks_total": pool.capacity,
            "kv_blocks_used": pool.capacity - pool.num_free,
            "kv_blocks_cached": pool.num_cached,
            "encoder_rows_held": scheduler.ledger.num_held,
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "computed_tokens": stats.computed_tokens,
            "output_tokens": stats.output_tokens,
            **self._engine.metrics.snapshot(),
        }

    def check_health(self) -> None:
        """Raise if the engine can serve no more requests.

        Raises:
            Unavailable: a thread or a rank of the engine has died, or it was shut down.
        """
        if (stopped := self._stopped()) is not None:
            raise stopped
        self._engine.core.runner.check_health()

    def shutdown(self) -> None:
        """Stop the threads and other ranks; requests still running fail with :class:`Unavailable`."""
        self._watchdog.close()
        with self._wake:
            self._closed = True
            self._wake.notify()
        for thread in self._threads:
            self._join(thread)
        self._fail_all(Unavailable("The engine is shutting down."))
        self._engine.grammars.close()
        self._engine.core.runner.close()

    def check_integrity(self) -> None:
        """At idle: nothing is held anywhere. Raises AssertionError."""
        assert not self._mailboxes and not self._inbox, "readers are still there"
        assert self._engine.outputs.num_groups == 0, "texts are still being made"
        self._engine.core.check_integrity()

    @property
    def idle(self) -> bool:
        """Return True if the engine holds no request."""
        return not (
            self._inbox or self._mailboxes or self._engine.core.has_work or self._engine.outputs.num_groups
        )

    # On the caller's event loop.

    def _submit(self, group: RequestGroup, relay: Taker | None = None) -> _LoopMailbox:
        mailbox = self._mailboxes[group] = _LoopMailbox(asyncio.get_running_loop(), relay)
        self._command("add", group)
        # The engine may have stopped while a grammar was compiled: nobody would answer then.
        if (stopped := self._stopped()) is not None:
            mailbox.fail(stopped)
        return mailbox

    def _retract(self, group: RequestGroup) -> None:
        del self._mailboxes[group]
        if not all(request.finished for request in group.requests):
            self._command("abort", group)

    def _command(self, verb: str, group: RequestGroup) -> None:
        with self._wake:
            self._inbox.append((verb, group))
            self._wake.notify()

    # On the step thread.

    def _run_steps(self) -> None:
        core = self._engine.core
        try:
            while True:
                with self._wake:
                    while not (self._inbox or core.has_work or self._closed):
                        self._tell_turns(has_steps=False)
                        self._wake.wait()
                    self._tell_turns(has_steps=True)
                    if self._stopped() is not None:
                        return
                    commands = list(self._inbox)
                    self._inbox.clear()
                with self._watchdog.step():
                    for verb, group in commands:
                        for request in group.requests:
                            core.add(request) if verb == "add" else core.abort(request)
                    events = core.step()
                if events or commands:
                    self._steps.put((events, commands))
        except BaseException as error:
            self._die(error)
        finally:
            self._steps.put(None)

    def _tell_turns(self, *, has_steps: bool) -> None:
        """Tell the encoder of this process whether steps come. How many images wait decides their length."""
        if self._turns is not None:
            self._turns.has_steps = has_steps
            self._engine.core.scheduler.spreads_prompts = not self._turns.crowded

    # On the output thread.

    def _run_outputs(self) -> None:
        outputs = self._engine.outputs
        try:
            ended = False
            while not ended:
                # All that has gathered since: text that is late is made in fewer and larger pieces.
                items = [self._steps.get()]
                while not self._steps.empty():
                    items.append(self._steps.get())
                events: list[StepEvents] = []
                for item in items:
                    if item is None:
                        ended = True
                        break
                    events += item[0]
                    for verb, group in item[1]:
                        outputs.add(group) if verb == "add" else outputs.remove(group)
                updates, stopped = outputs.process(events)
                self._deliver(updates)
                with self._wake:
                    for request in stopped:
                        self._inbox.append(("abort", RequestGroup(request.id, [request], Usage())))
                    if stopped:
                        self._wake.notify()
        except BaseException as error:
            self._die(error)

    def _deliver(self, results: Sequence[tuple[RequestGroup, Result]]) -> None:
        """Wake each event loop once for all of its readers: to wake it takes a call of the system."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_LoopMailbox, Result]]] = {}
        for group, result in results:
            mailbox = self._mailboxes.get(group)
            if mailbox is not None:
                by_loop.setdefault(mailbox.loop, []).append((mailbox, result))
        for loop, parcels in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, parcels)

    def _fail_all(self, error: SightlineError) -> None:
        for mailbox in list(self._mailboxes.values()):
            if not mailbox.loop.is_closed():
                mailbox.loop.call_soon_threadsafe(mailbox.fail, error)
