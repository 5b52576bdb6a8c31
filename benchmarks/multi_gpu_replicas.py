"""Processes that each hold an encoder or a language model, for :mod:`benchmarks.multi_gpu_layouts`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.multi_gpu_processes import reporting
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES
from engine import SamplingParams
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.frontend import Frontend, PreparedPrompt
from engine.prompt import EmbeddedMedia, PreparedMedia

#: Prompts with different images, prepared beforehand. Each request has other text and content hashes.
PREPARED = 24
#: The first tokens of a prompt are drawn for each request, so that no prefix is cached.
DRAWN = 8


@dataclass(frozen=True, slots=True)
class Shown:
    """What requests are like: how many images each has, and how many tokens are generated."""

    images: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """Requests for one language model.

    Attributes:
        due: when each is to be sent, on the performance counter, which all processes share.
        encoders: the numbers of the encoder processes to use; None for the process's own encoder.
        last: when every request must have ended.
        late_allowed: with more first tokens later than ``ttft_s``, the run ends as not finished.
    """

    due: list[float]
    encoders: list[int] | None
    shown: Shown
    last: float
    late_allowed: int
    ttft_s: float


@dataclass(slots=True)
class Result:
    """Seconds to the first tokens, and between the tokens of all answers; whether all requests ended.

    Attributes:
        ended: when the last of them did, on the performance counter.
    """

    ttfts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finished: bool = False
    ended: float = 0.0


def _config(path: str, gpu: int | None, batched_tokens: int = 8192) -> EngineConfig:
    """The configuration of an engine on one GPU, which is the process's only one then; on a CPU for None."""
    if gpu is None:
        import torch

        torch.set_num_threads(1)
        limits: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_bytes": 32 << 20}
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        limits = {"max_model_len": 4096, "gpu_memory_utilization": 0.7}
    return EngineConfig(model=path, load_format="dummy", max_num_batched_tokens=batched_tokens, **limits)


def run_encoder(connection: Connection, path: str, gpu: int | None, socket: str) -> None:
    """Serve an encoder on a Unix socket; sends a message when it is ready."""

    async def serve(engine: EncoderEngine) -> None:
        async with await asyncio.start_unix_server(lambda *streams: _encode_all(engine, *streams), socket):
            connection.send("ready")
            await asyncio.Event().wait()

    with reporting(connection):
        asyncio.run(serve(EncoderEngine.load(_config(path, gpu), cache_bytes=0)))


async def _encode_all(
    engine: EncoderEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    async def encode(number: int, media: PreparedMedia) -> None:
        try:
            answer: Any = await engine.encode_async(media)
        except Exception as error:
            answer = RuntimeError(repr(error))
        _send(writer, (number, answer))

    tasks = set()
    try:
        while True:
            task = asyncio.create_task(encode(*await _receive(reader)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass


def _send(writer: asyncio.StreamWriter, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    writer.write(len(data).to_bytes(8, "little"))
    writer.write(data)


async def _receive(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(8), "little")
    return pickle.loads(await reader.readexactly(size))


class RemoteEncoder:
    """An encoder process, over its socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, asyncio.Future[EmbeddedMedia]] = {}
        self._next = 0
        self._receiving = asyncio.create_task(self._receive_all())

    @classmethod
    async def connect(cls, socket: str) -> RemoteEncoder:
        return cls(*await asyncio.open_unix_connection(socket, limit=1 << 24))

    async def encode_async(self, media: PreparedMedia) -> EmbeddedMedia:
        self._next += 1
        future = self._waiting[self._next] = asyncio.get_running_loop().create_future()
        _send(self._writer, (self._next, media))
        return await future

    async def _receive_all(self) -> None:
        while True:
            number, answer = await _receive(self._reader)
            future = self._waiting.pop(number)
            # A request that was given up waits no more.
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)


def run_language_model(
    connection: Connection,
    path: str,
    gpu: int | None,
    sockets: list[str],
    shape: str,
    side: int,
    batched_tokens: int,
) -> None:
    """Answer requests as told over ``connection``, with an encoder in this process or those on ``sockets``.

    It sends a message when it is loaded. Then it receives the numbers of images that requests may have,
    prepares prompts, connects to the encoders and sends a message. From then on it receives :class:`Run` and
    sends :class:`Result`; None in the middle of a run ends it.

    Args:
        shape: a key of :data:`~benchmarks.shapes.SHAPES`.
        side: of the images, in pixels.
        batched_tokens: most in one step.
    """
    with reporting(connection):
        config = _config(path, gpu, batched_tokens)
        # Before the language model measures the memory that is left for its cache.
        encoder = EncoderEngine.load(config, cache_bytes=0)
        engine = AsyncEngine(config)
        connection.send("loaded")
        front = Frontend.load(config)
        prompts = {images: _prepare(front, shape, images, side) for images in connection.recv()}
        asyncio.run(_answer_runs(connection, engine, encoder, sockets, prompts))


def _prepare(front: Frontend, shape: str, images: int, side: int) -> list[PreparedPrompt]:
    picture, made = SHAPES[shape].picture, []
    for number in range(PREPARED):
        pictures = [unique_picture(side, number * images + index) for index in range(images)]
        text = "x" * DRAWN + picture * images + "describe"
        made.append(front.from_prompt({"prompt": text, "multi_modal_data": {"image": pictures}}))
    return made


async def _answer_runs(
    connection: Connection,
    engine: AsyncEngine,
    own: EncoderEngine,
    sockets: list[str],
    prompts: dict[int, list[PreparedPrompt]],
) -> None:
    remote = [await RemoteEncoder.connect(socket) for socket in sockets]
    connection.send("ready")
    loop, rng = asyncio.get_running_loop(), random.Random(os.getpid())
    message = loop.run_in_executor(None, connection.recv)
    while True:
        run = await message
        message = loop.run_in_executor(None, connection.recv)
        if run is None:
            # The run had ended already.
            continue
        encoders = [own] if run.encoders is None else [remote[number] for number in run.encoders]
        ready = [_drawn(prompt, rng) for prompt in _cycle(prompts[run.shown.images], len(run.due))]
        work = asyncio.create_task(_Requests(engine, encoders, run).answer(ready))
        await asyncio.wait([work, message], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            message = loop.run_in_executor(None, connection.recv)
        connection.send(await work)


def _cycle(prompts: list[PreparedPrompt], count: int) -> list[PreparedPrompt]:
    return [prompts[number % len(prompts)] for number in range(count)]


def _drawn(prompt: PreparedPrompt, rng: random.Random) -> PreparedPrompt:
    """``prompt`` with another beginning and images of other names, so that nothing of it is cached."""
    names = {
        media.item.hash: hashlib.sha256(rng.randbytes(16)).hexdigest()[: len(media.item.hash)]
        for media in prompt.media
    }
    items = {media.item.hash: replace(media.item, hash=names[media.item.hash]) for media in prompt.media}
    ids = [rng.randrange(1000, 30000) for _ in range(DRAWN)] + prompt.inputs.token_ids[DRAWN:]
    spans = [replace(span, item=items[span.item.hash]) for span in prompt.inputs.spans]
    media = [replace(media, item=items[media.item.hash]) for media in prompt.media]
    return PreparedPrompt(replace(prompt.inputs, token_ids=ids, spans=spans), media)


class _Requests:
    """The requests of one run."""

    def __init__(
        self, engine: AsyncEngine, encoders: Sequence[EncoderEngine | RemoteEncoder], run: Run
    ) -> None:
        self._engine, self._encoders, self._run = engine, encoders, run
        self._params = SamplingParams(temperature=0.0, max_tokens=run.shown.tokens, ignore_eos=True)
        self._result, self._late, self._images = Result(), 0, 0
        self._too_late = asyncio.Event()

    async def answer(self, prompts: list[PreparedPrompt]) -> Result:
        """Send all when they are due; returns when they have ended, or when the run fails or is cancelled."""
        tasks = [
            asyncio.create_task(self._answer(due, prompt))
            for due, prompt in zip(self._run.due, prompts, strict=True)
        ]
        every, late = asyncio.gather(*tasks), asyncio.create_task(self._too_late.wait())
        try:
            left = self._run.last - time.perf_counter()
            done, _ = await asyncio.wait({every, late}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if every in done:
                await every
                self._result.finished = not self._too_late.is_set()
                self._result.ended = time.perf_counter()
        except asyncio.CancelledError:
            pass
        for task in (*tasks, late):
            task.cancel()
        await asyncio.gather(*tasks, every, late, return_exceptions=True)
        return self._result

    async def _answer(self, due: float, prompt: PreparedPrompt) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        rows = await asyncio.gather(*(self._next_encoder().encode_async(media) for media in prompt.media))
        before: float | None = None
        stream = self._engine.generate(str(id(prompt)), prompt.inputs, self._params, embeddings=rows)
        async with aclosing(stream) as updates:  # type: ignore[type-var]
            async for update in updates:
                if not any(delta.token_ids for delta in update.deltas):
                    continue
                now = time.perf_counter()
                if before is None:
                    self._first(now - due)
                else:
                    self._result.gaps.append(now - before)
                before = now

    def _next_encoder(self) -> EncoderEngine | RemoteEncoder:
        self._images += 1
        return self._encoders[self._images % len(self._encoders)]

    def _first(self, seconds: float) -> None:
        self._result.ttfts.append(seconds)
        self._late += seconds > self._run.ttft_s
        if self._late > self._run.late_allowed:
            self._too_late.set()
