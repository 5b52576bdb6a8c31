"""An engine's process and its replica: what passes between them, and what each does when the other ends."""

import asyncio
import logging
import pickle
import signal
import socket
import struct
import threading
from contextlib import ExitStack, aclosing, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from deployments.ray_serve.engine_link import Cancel, Link, Ready
from deployments.ray_serve.engine_process import EngineProcess
from deployments.ray_serve.engine_server import EngineServer, LogsAtReplica, NotedOutboxes
from deployments.ray_serve.packing import RowsInfo
from deployments.ray_serve.served_model import ServedModel
from deployments.stages import Generation, Pooling, StageLost
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequest, SightlineError, Unavailable
from engine.outputs import EmbeddingOutput, OutputDelta, StreamUpdate, Usage
from engine.pooling_params import PoolingParams
from engine.prompt import EmbeddedMedia, EngineInput
from engine.sampling_params import SamplingParams
from tests.serving import wait_until

CONFIG = EngineConfig(model="none")
FIRST = StreamUpdate("one", [OutputDelta(0, "a", [1])], Usage(1, 1))


class Stage:
    """A language model that never ends an answer.

    Attributes:
        media: of the last request.
        working: requests that it works on.
    """

    def __init__(self) -> None:
        self.media: list[EmbeddedMedia] = []
        self.working = 0
        self.idle: bool | Exception = True

    async def generate(self, request, media, relay):
        self.media = media
        self.working += 1
        try:
            yield StreamUpdate(request.request_id, FIRST.deltas, FIRST.usage)
            await asyncio.Future()
        finally:
            self.working -= 1

    async def embed(self, request, media):
        if not request.inputs.token_ids:
            raise InvalidRequest("empty", param="prompt")
        return EmbeddingOutput(request.request_id, [1], [], token_embeddings=media[0].rows * 2)

    def is_idle(self) -> bool:
        if isinstance(self.idle, Exception):
            raise self.idle
        return self.idle


class Pair:
    """Both ends, whose code runs here on one event loop."""

    def __init__(self) -> None:
        self.stage, self.dead, self.lost = Stage(), threading.Event(), threading.Event()
        self.ours, theirs = socket.socketpair()
        self.link = Link(theirs)
        self.ended = threading.Event()
        self.process = SimpleNamespace(wait=lambda seconds: self.ended.wait(60) and 0, kill=self.link.close)

    def lose(self) -> None:
        self.ended.set()
        self.lost.set()

    async def connect(self) -> EngineProcess:
        made = asyncio.to_thread(
            EngineProcess, self.process, self.ours, CONFIG, None, None, self.dead.set, 60.0
        )
        ours = asyncio.ensure_future(made)
        setup = await asyncio.to_thread(self.link.receive)
        server = EngineServer(self.link, asyncio.get_running_loop(), self.lose)
        outboxes = NotedOutboxes(self.link)
        model = ServedModel(self.stage, outboxes)
        self.running = asyncio.ensure_future(server.run(setup.home, model, outboxes))
        self.running.add_done_callback(lambda _: self.ended.set())
        return await ours


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.link.close()
    assert made.lost.wait(60)


def generation(name: str = "one") -> Generation:
    return Generation(name, EngineInput([1]), SamplingParams())


async def test_rows_and_results_arrive_as_they_were_sent(pair):
    process, rows = await pair.connect(), np.arange(1 << 20, dtype=np.float32).reshape(1 << 10, -1)
    # As Ray's store has them.
    rows.flags.writeable = False
    media = [EmbeddedMedia("h", rows, "float32"), EmbeddedMedia("i", rows[:0], "float32")]
    sent = [RowsInfo(each.hash, each.dtype) for each in media], [each.rows for each in media]
    found, encoded = await process.embed(Pooling("one", EngineInput([1]), PoolingParams()), *sent)
    assert not encoded and found.token_embeddings is not None and (found.token_embeddings == rows * 2).all()
    async with aclosing(process.generate(generation(), media)) as updates:
        assert await anext(updates) == FIRST
        assert [each.hash for each in pair.stage.media] == ["h", "i"]
        assert all((a.rows == b.rows).all() for a, b in zip(pair.stage.media, media, strict=True))
    await wait_until(lambda: not pair.stage.working, 60)
    assert not process._calls and not process._answers


async def test_errors_arrive_and_a_cancelled_call_ends_there(pair):
    process = await pair.connect()
    with pytest.raises(InvalidRequest) as caught:
        await process.embed(Pooling("one", EngineInput([]), PoolingParams()), [], [])
    assert caught.value.param == "prompt"
    pair.stage.idle = AssertionError("a block is lost")
    with pytest.raises(AssertionError, match="a block is lost"):
        await process.is_idle()
    with pytest.raises(StageLost):
        await process.answer(generation(), [], [], "nobody")
    reading = asyncio.ensure_future(anext(process.generate(generation("two"), [])))
    await wait_until(lambda: pair.stage.working, 60)
    await reading
    # One that has no such call, as where its end and its cancellation have crossed.
    process._outgoing.put(Cancel(99))
    pair.stage.idle = False
    assert await process.is_idle() is False


async def test_any_error_there_ends_an_answer(pair):
    process = await pair.connect()

    async def broken(*_):
        raise AssertionError("a row is lost")
        yield

    pair.stage.generate = broken
    with pytest.raises(SightlineError, match="server's log"):
        await asyncio.wait_for(anext(process.generate(generation(), [])), 60)


async def test_a_call_whose_work_was_cancelled_there_is_lost(pair):
    process = await pair.connect()

    async def cancelled(*_):
        raise asyncio.CancelledError

    pair.stage.embed = cancelled
    with pytest.raises(StageLost):
        await asyncio.wait_for(process.embed(Pooling("one", EngineInput([1]), PoolingParams()), [], []), 60)


async def test_what_can_t_be_pickled_fails_one_call_alone(pair):
    process = await pair.connect()
    # No function of a function can be pickled.
    with pytest.raises(SightlineError, match="server's log"):
        await asyncio.wait_for(process.embed(lambda: None, [], []), 60)
    pair.stage.idle = lambda: None
    with pytest.raises(SightlineError, match="server's log"):
        await asyncio.wait_for(process.is_idle(), 60)
    pair.stage.idle = False
    assert await process.is_idle() is False


@pytest.mark.parametrize("end", ["process", "replica"])
async def test_a_message_that_can_t_be_read_ends_the_connection(pair, end):
    process = await pair.connect()
    sender, noticed = (pair.link, pair.dead) if end == "process" else (process._link, pair.lost)
    sender._connection.sendall(struct.pack("<QI", 3, 0) + b"???")
    assert await asyncio.to_thread(noticed.wait, 60)
    if end == "process":
        with pytest.raises(StageLost):
            await process.is_idle()


async def test_a_line_that_its_reader_opens_again_is_open(pair):
    process, outboxes = await pair.connect(), NotedOutboxes(pair.link)
    with ExitStack() as second:
        with outboxes.open("reader", None):
            await wait_until(lambda: process.has_line("reader"), 60)
            second.enter_context(outboxes.open("reader", None))
        # What the first line said has arrived before this.
        await process.is_idle()
        assert process.has_line("reader")
    await wait_until(lambda: not process.has_line("reader"), 60)


async def test_a_dead_process_takes_its_answers_along(pair):
    process = await pair.connect()
    updates = process.generate(generation(), [])
    assert await anext(updates) == FIRST
    pair.link.close()
    with pytest.raises(StageLost):
        await asyncio.wait_for(anext(updates), 60)
    assert pair.dead.wait(60)
    with pytest.raises(StageLost):
        await process.max_model_len()
    assert not process._calls and not process._answers


async def test_a_process_that_does_not_answer_is_killed(pair, monkeypatch):
    process, hangs = await pair.connect(), False

    async def check_health(self) -> None:
        if hangs:
            await asyncio.Future()

    monkeypatch.setattr(ServedModel, "check_health", check_health)
    for answers in (True, False, False, True, False, False, False):
        assert not pair.dead.is_set()
        hangs, process._patience_s = not answers, 60.0 if answers else 0.01
        with nullcontext() if answers else pytest.raises(Unavailable):
            await process.check_health()
    assert await asyncio.to_thread(pair.dead.wait, 60)


async def test_a_closed_process_ends_in_good_order(pair):
    process = await pair.connect()
    await asyncio.to_thread(process.close)
    await asyncio.wait_for(pair.running, 60)
    assert pair.lost.wait(60) and not pair.dead.is_set()


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (CheckpointError("no weights"), 0, "no weights"),
        (None, -signal.SIGKILL, "memory is used up"),
        (None, -signal.SIGSEGV, "Segmentation fault"),
        (None, 3, "exit code 3"),
    ],
)
def test_a_model_that_can_t_be_loaded_is_told(error, code, told):
    ours, theirs = socket.socketpair()
    link = Link(theirs)
    process = SimpleNamespace(wait=lambda *_: code)

    def load() -> None:
        link.receive()
        if error is not None:
            link.send(Ready(error=error))
        link.close()

    loading = threading.Thread(target=load)
    loading.start()
    with pytest.raises(Unavailable if error is None else CheckpointError) as caught:
        EngineProcess(process, ours, CONFIG, None, None, lambda: None, 60.0)
    loading.join()
    assert told in str(caught.value)


async def test_the_replica_s_log_has_the_lines_of_the_process(pair, caplog):
    await pair.connect()
    there, handler = logging.getLogger("test.there"), LogsAtReplica(pair.link)
    there.propagate, there.handlers = False, [handler]
    with caplog.at_level(logging.WARNING):
        # Records are made anew here; this one's logger must reach the log of the test.
        there.propagate = False
        try:
            raise ValueError(pickle.PicklingError)
        except ValueError:
            there.name = "test.here"
            there.error("lost %s", object, exc_info=True)
        await wait_until(lambda: caplog.records, 60)
    (record,) = caplog.records
    assert record.getMessage() == f"lost {object}" and "PicklingError" in caplog.text
