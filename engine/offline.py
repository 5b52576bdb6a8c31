"""Running a list of prompts to its end, in one process: prepare, encode and compute overlap."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from engine.collector import COLLECTOR
from engine.encoder import EncoderEngine
from engine.errors import SightlineError
from engine.frontend import Encode, Name, PreparedPrompt
from engine.loading import LoadedEngine
from engine.lru import LruCache
from engine.mailbox import Result
from engine.outputs import EmbeddingOutput, StreamUpdate, merge_updates
from engine.pooling_params import PoolingParams
from engine.prompt import EngineInput, PreparedMedia
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvents

#: Threads that prepare prompts. Each may hold the GIL for milliseconds, and the thread that keeps the device
#: busy waits for those before it: with 16 threads, up to 50 ms.
_PREPARING = 4
#: Most prompts that are added together if they have media, which are encoded in one go. Without media they
#: may fill a step.
_TOGETHER = 16
#: Prompts that are prepared ahead of the next one to be added. More would delay the first prompts, for which
#: the device is waiting.
_AHEAD = 2 * _TOGETHER
#: Seconds for which an idle device waits for further prompts: less than a step with the first few would
#: take. Text is prepared sooner, media are not.
_PATIENCE = 2e-3
#: Bytes of embedding rows that are kept on the device for later prompts: those of a conversation's images.
_ROW_BYTES = 256 << 20
#: Most rows of an image that is encoded before it is known that its prompt can be served. Those of Qwen2-VL's
#: tower take an H200 about 15 ms.
_EARLY_ROWS = 1024
#: Steps whose tokens are turned into text together, which takes less than one step at a time.
STEPS_TOGETHER = 8

Params = SamplingParams | PoolingParams
#: Prepares one prompt; its media are encoded as well where that is given.
Prepare = Callable[[Encode | None], PreparedPrompt]


@dataclass(slots=True)
class Job:
    """One prompt: its parameters, and its state between preparation and answer."""

    params: Params
    prepared: Future[PreparedPrompt]
    group: RequestGroup | None = None
    text: str | None = None
    update: StreamUpdate | None = None
    embedding: EmbeddingOutput | None = None


@dataclass(slots=True)
class _Gathered:
    """Jobs that are added together, the tokens of their prompts, and the embedding rows that the engine will
    hold for them; and seconds to wait for others to be prepared."""

    patience: float
    jobs: list[Job] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        # Adding a job that failed to the engine raises its error.
        if job.prepared.exception() is None:
            self.tokens += len(job.prepared.result().inputs.token_ids)
            self.rows += _num_rows(job)


class OfflineRunner:
    """Drives an engine on the caller's thread.

    Prompts are prepared by worker threads while the device works on earlier ones; a lone one by the caller's
    thread, which would only wait for another. A prompt that can't be served is refused before its media are
    encoded, but for the last image of a lone one, if that is small: the device encodes it while the prompt is
    built and checked.

    Args:
        engine: the loaded engine.
        encoder: encodes media; None for a text-only model.
    """

    def __init__(self, engine: LoadedEngine, encoder: EncoderEngine | None) -> None:
        self._engine = engine
        self._encoder = encoder
        # Threads start when there is work for them, and end with this object.
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _PREPARING), "prepare")
        self._rows: LruCache[Any] = LruCache(_ROW_BYTES)
        self._count = 0
        self._num_media = 0
        self._num_tokens = 0

    def run(self, prepare: Sequence[Prepare], params: Sequence[Params], use_tqdm: bool) -> list[Job]:
        """Prepare, encode and compute all prompts; the jobs, done, in order.

        Raises:
            InvalidRequest: a prompt can't be served; nothing is left behind of the others.
            RequestFailed: computing a prompt raised; likewise.
        """
        core, outputs = self._engine.core, self._engine.outputs
        # Until a stop string is noticed, each step computes a token of its request for nothing.
        steps = 1 if any(isinstance(p, SamplingParams) and p.stop for p in params) else STEPS_TOGETHER
        events: list[StepEvents] = []
        self._num_media = self._num_tokens = 0
        jobs: list[Job] = []
        by_group: dict[RequestGroup, Job] = {}
        # Even a disabled tqdm bar takes multiprocessing locks.
        bar = tqdm(total=len(prepare), desc="prompts", dynamic_ncols=True) if use_tqdm else nullcontext()
        with COLLECTOR.young_garbage_only(), bar as progress:
            waiting = self._start(prepare, params, jobs)
            try:
                ready = next(waiting, None)
                while ready is not None or core.has_work:
                    ready = self._add(ready, waiting, by_group)
                    events += core.step()
                    if len(events) < steps and (ready is not None or core.has_work):
                        continue
                    if steps > 1 and core.has_work:
                        # The device has two steps to compute while their text is made, which takes longer
                        # than one of a small model.
                        events += core.step(more=1)
                    updates, stopped = outputs.process(events)
                    events = []
                    for request in stopped:
                        core.abort(request)
                    for group, result in updates:
                        self._take(by_group[group], result, progress)
            except BaseException:
                self._abandon(jobs)
                raise
        return jobs

    def _start(self, prepare: Sequence[Prepare], params: Sequence[Params], jobs: list[Job]) -> Iterator[Job]:
        """Jobs in order, with preparation running a bounded distance ahead."""
        ahead: deque[Job] = deque()
        for work, wanted in zip(prepare, params, strict=True):
            if len(prepare) == 1:
                job = Job(wanted, _done(work(_LoneMedia(self, wanted))))
            else:
                job = Job(wanted, self._pool.submit(work, None))
            jobs.append(job)
            ahead.append(job)
            if len(ahead) > _AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _add(
        self, ready: Job | None, waiting: Iterator[Job], by_group: dict[RequestGroup, Job]
    ) -> Job | None:
        """Give the engine the next jobs, ``ready`` and then those of ``waiting``, as many as fill a step, and
        note their groups; return the first job that is left."""
        core, room = self._engine.core, self._engine.config.max_num_batched_tokens
        patience = 0.0 if core.has_work else _PATIENCE
        while room > 0:
            gathered = _Gathered(patience)
            while ready is not None and self._wants_more(ready, gathered, room):
                gathered.add(ready)
                ready = next(waiting, None)
            for job in self._admit(gathered.jobs):
                assert job.group is not None, "an admitted job has one"
                by_group[job.group] = job
                room -= sum(map(core.scheduler.uncached_tokens, job.group.requests))
            patience = gathered.patience
            # Cached prompts leave room for others. Media that are encoded next would delay these.
            if not gathered.jobs or gathered.rows:
                break
        return ready

    def _wants_more(self, job: Job, gathered: _Gathered, room: int) -> bool:
        """Return whether to add ``job`` to the ``gathered`` ones now.

        True if it is prepared, its embeddings are within the budget and the step has ``room`` for more tokens
        than theirs, or if there is no other work. Waits for it to be prepared, as long as there is patience.
        """
        core, config, count = self._engine.core, self._engine.config, len(gathered.jobs)
        if not (core.has_work or count):
            return True
        if core.scheduler.num_waiting + count >= config.max_num_seqs or gathered.tokens >= room:
            return False
        if not job.prepared.done() and gathered.patience > 0:
            begun = time.perf_counter()
            wait([job.prepared], gathered.patience)
            gathered.patience -= time.perf_counter() - begun
        if not job.prepared.done():
            return False
        rows = gathered.rows + _num_rows(job)
        return (count < _TOGETHER or not rows) and core.scheduler.ledger.fits(rows)

    def _admit(self, batch: Sequence[Job]) -> Sequence[Job]:
        """Encode the media of all in ``batch`` together, and give their requests to the engine."""
        prompts = [job.prepared.result() for job in batch]
        for job, prompt in zip(batch, prompts, strict=True):
            if prompt.media:
                self._engine.requests.check(prompt.inputs, job.params)
        media = [(prompt.inputs.cache_salt, item) for prompt in prompts for item in prompt.media]
        rows: Iterator[Any] = iter(())
        if media:
            rows = iter(self.encode(media, {}))
        requests, outputs = self._engine.requests, self._engine.outputs
        for job, prompt in zip(batch, prompts, strict=True):
            embeddings = [*prompt.embeddings, *(next(rows) for _ in prompt.media)]
            self._count += 1
            key = str(self._count)
            if isinstance(job.params, PoolingParams):
                job.group = requests.pooling(key, prompt.inputs, job.params, embeddings)
            else:
                job.group = requests.generation(key, prompt.inputs, job.params, embeddings)
            job.text = prompt.inputs.text
            # Pixels are not needed any more.
            job.prepared = Future()
            outputs.add(job.group)
            for request in job.group.requests:
                self._engine.core.add(request)
        return batch

    def encode_one(self, media: PreparedMedia) -> Any:
        """Rows of one item, which may have no hash."""
        assert self._encoder is not None
        return self._encoder.encode([media])[0]

    def check(self, inputs: EngineInput, params: Params) -> None:
        """Refuse a prompt; errors as of :meth:`engine.request_factory.RequestFactory.check`."""
        self._engine.requests.check(inputs, params)

    def name_all(self, media: Sequence[PreparedMedia], name: Name) -> list[PreparedMedia]:
        """Media with their hashes. Several are hashed at a time."""
        return list(self._pool.map(name, media)) if len(media) > 1 else [name(media[0])]

    def encode(self, media: Sequence[tuple[str, PreparedMedia]], first: dict[int, Any]) -> list[Any]:
        """Rows of items, each with its prompt's salt: those of earlier prompts, or made now.

        Args:
            first: rows that are made already, by the item's index.
        """
        assert self._encoder is not None
        self._num_media += len(media)
        keys = [(salt, each.item.hash) for salt, each in media]
        rows = {keys[index]: made for index, made in first.items()}
        missing: dict[tuple[str, str], PreparedMedia] = {}
        for key, (_, each) in zip(keys, media, strict=True):
            if key in rows:
                continue
            known = self._rows.get(key)
            if known is None:
                missing[key] = each
            else:
                rows[key] = known
        if missing:
            rows |= zip(missing, self._encoder.encode(list(missing.values())), strict=True)
        for key in [*missing, *(keys[index] for index in first)]:
            made = rows[key]
            if made.untyped_storage().nbytes() != made.nbytes:
                # A view would keep the memory of the whole batch.
                made = made.clone()
            self._rows.put(key, made, made.nbytes)
        return [rows[key] for key in keys]

    def _take(self, job: Job, result: Result, progress: tqdm | None) -> None:
        if isinstance(result, SightlineError):
            raise result
        if isinstance(result, EmbeddingOutput):
            job.embedding = result
        else:
            job.update = result if job.update is None else merge_updates(job.update, result)
            if not result.finished:
                return
            self._num_tokens += result.usage.completion_tokens
        if progress is not None:
            progress.update()
            if self._num_tokens:
                progress.set_postfix_str(_rates(progress, self._num_media, self._num_tokens))

    def _abandon(self, jobs: Sequence[Job]) -> None:
        """After an error: free all that the call's other prompts hold."""
        core = self._engine.core
        # When the call returns, no thread may still use what it has opened.
        wait([job.prepared for job in jobs if not job.prepared.cancel()])
        for job in jobs:
            if job.group is not None:
                self._engine.outputs.remove(job.group)
                for request in job.group.requests:
                    core.abort(request)
        while core.has_work:
            core.step()


class _LoneMedia:
    """Encodes the media of a prompt that is alone; see :class:`engine.frontend.Encode`.

    The newest image of a conversation is the last one: the device encodes it while all are hashed, and a
    small one while the prompt is built and checked. Hashing on other threads would compete with the launches
    for the GIL.
    """

    def __init__(self, runner: OfflineRunner, params: Params) -> None:
        self._runner = runner
        self._params = params
        self._begun: tuple[PreparedMedia, Any] | None = None

    def begin(self, media: PreparedMedia) -> None:
        if media.item.num_tokens <= _EARLY_ROWS:
            self._begun = media, self._runner.encode_one(media)

    def finish(
        self, media: Sequence[PreparedMedia], inputs: EngineInput, name: Name | None
    ) -> tuple[Sequence[Any], Sequence[PreparedMedia]]:
        self._runner.check(inputs, self._params)
        first: dict[int, Any] = {}
        if name is not None:
            begun, rows = self._begun or (media[-1], self._runner.encode_one(media[-1]))
            first = {index: rows for index, each in enumerate(media) if each is begun}
            media = self._runner.name_all(media, name)
        return self._runner.encode([(inputs.cache_salt, each) for each in media], first), media


def _num_rows(job: Job) -> int:
    """Embedding rows that the engine will hold for a prepared job."""
    if job.prepared.exception() is not None:
        return 0
    completions = job.params.n if isinstance(job.params, SamplingParams) else 1
    return completions * sum(span.item.num_tokens for span in job.prepared.result().inputs.spans)


def _done(prepared: PreparedPrompt) -> Future[PreparedPrompt]:
    future: Future[PreparedPrompt] = Future()
    future.set_result(prepared)
    return future


def _rates(progress: tqdm, media: int, tokens: int) -> str:
    elapsed = progress.format_dict["elapsed"] or 1e-9
    images = f"{media / elapsed:.1f} images/s, " if media else ""
    return f"{images}{tokens / elapsed:.0f} tokens/s"
