"""Channels: updates of all answers in one stream, between a replica and an ingress of one process."""

import asyncio
import pickle
import random
import socket
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from functools import reduce
from types import SimpleNamespace

import numpy as np
import pytest
from ray.exceptions import ObjectLostError, RayError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from deployments.ray_serve.channel import Outbox, Outboxes
from deployments.ray_serve.engine_link import Link
from deployments.ray_serve.engine_process import EngineProcess
from deployments.ray_serve.engine_server import EngineServer, NotedOutboxes
from deployments.ray_serve.frames import MOST_BYTES
from deployments.ray_serve.handles import RemoteLanguageModel
from deployments.ray_serve.handoff import Brought, RowsRef
from deployments.ray_serve.held_requests import HeldRequests
from deployments.ray_serve.line import follow
from deployments.ray_serve.packing import PIECE_BYTES, Encoded, RowsInfo
from deployments.ray_serve.refusals import Misrouted, Refusal
from deployments.ray_serve.replicas import LanguageModelReplica
from deployments.ray_serve.routing import LanguageModelRouter
from deployments.ray_serve.served_model import ServedModel
from deployments.report import begin_report
from deployments.stages import Generation, RowsLost, StageLost
from engine.config import EngineConfig
from engine.errors import NoTokenAllowed, SightlineError
from engine.mailbox import Mailbox
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage, merge_updates
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams
from tests.deployments.ray_serve.doubles import serve_router
from tests.serving import wait_until

DEPLOYMENT = DeploymentID(name="model", app_name="test")


def update(name: str, number: int, *, length: int = 3, rows: int = 0, last: bool = False) -> StreamUpdate:
    scores = [{token: TokenLogprob(-0.5 - token, token) for token in range(number, number + 20)}] * rows
    delta = OutputDelta(0, f"{number}," + "x" * length, [number], scores or None, "stop" if last else None)
    return StreamUpdate(name, [delta], Usage(1, number + 1), finished=last)


class Stage:
    """A language model whose answers are the results that a test puts into their mailboxes."""

    def __init__(self) -> None:
        self.answers: dict[str, Mailbox] = {}

    async def generate(self, request, media, relay):
        mailbox = self.answers[request.request_id] = Mailbox(relay)
        try:
            while not (found := await mailbox.get()).finished:
                yield found
            yield found
        finally:
            del self.answers[request.request_id]


class Far(ServedModel):
    """A model on another host."""

    async def line(self) -> str:
        return "\0nowhere"


class Replica(LanguageModelReplica):
    """Of a :class:`Stage`.

    Attributes:
        stage: it.
        served: what has its lines.
    """

    def __init__(self, name: str, *, lines: bool = False) -> None:
        self.name, self.stage = name, Stage()
        self._held, self._outboxes = HeldRequests(), Outboxes()
        self._stage = self.served = (ServedModel if lines else Far)(self.stage, self._outboxes)

    def _name(self) -> str:
        return self.name

    def __del__(self) -> None:
        """Nothing was loaded."""


class Peer:
    """The process of an engine, as its replica sees it. Its code runs here, on the same event loop.

    Attributes:
        lost: set when either end misses the other.
    """

    def __init__(self, stage: Stage) -> None:
        self.lost = threading.Event()
        self._ours, self._theirs = socket.socketpair()
        self._link = Link(self._theirs)
        self._outboxes = NotedOutboxes(self._link)
        self.served = ServedModel(stage, self._outboxes)

    async def connect(self) -> EngineProcess:
        config = EngineConfig(model="none")
        made = asyncio.to_thread(EngineProcess, self, self._ours, config, None, None, self.lost.set, 60.0)
        replica = asyncio.ensure_future(made)
        setup = await asyncio.to_thread(self._link.receive)
        assert setup.engine == config
        server = EngineServer(self._link, asyncio.get_running_loop(), self.lost.set)
        self._running = asyncio.ensure_future(server.run(setup.home, self.served, self._outboxes))
        return await replica

    def wait(self, timeout: float) -> int:
        """Its exit code, at once: it ends with the test."""
        return 0

    def kill(self) -> None:
        """Lose the process."""
        self._link.close()


class Call:
    """A streaming call of a replica, as Serve's: it runs in the replica whether it is read or not."""

    def __init__(self, work) -> None:
        self.items: asyncio.Queue = asyncio.Queue()
        self.count = 0
        self.task = asyncio.ensure_future(self._run(work))

    async def _run(self, work) -> None:
        try:
            async with aclosing(work):
                async for item in work:
                    assert len(pickle.dumps(item)) < 4 << 20
                    self.count += 1
                    self.items.put_nowait(item)
        except asyncio.CancelledError as error:
            # The replica ends the call, or dies.
            self.items.put_nowait(error)
            raise
        self.items.put_nowait(None)

    async def __aiter__(self):
        while (item := await self.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
        # As Serve does in some cases; nothing makes it do so.
        assert self.count, "the call ended without a message: whether it was accepted may be lost"

    def cancel(self) -> None:
        self.task.cancel()


class Stored:
    """A reference to ``array`` in Ray's store; raises ``error`` if that is lost."""

    def __init__(self, array: np.ndarray, error: Exception | None = None) -> None:
        self.array, self._error = array, error

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        if self._error is not None:
            raise self._error
        return self.array


class PlainCall:
    """A call that isn't streamed."""

    def __init__(self, work) -> None:
        self.task = asyncio.ensure_future(work)

    def __await__(self):
        return self.task.__await__()

    def cancel(self) -> None:
        self.task.cancel()


class Routed:
    """A replica as routers see it."""

    max_ongoing_requests = 4
    node_id, availability_zone, multiplexed_model_ids, routing_stats = "node", None, frozenset(), None

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


class Handle:
    """A deployment handle: calls go to the replica of their session, or to the first."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = {replica.name: replica for replica in replicas}
        self.calls: dict[str, list] = {"generate": [], "updates": [], "hold": []}
        self._router = serve_router()

    def allow_lines(self) -> LanguageModelRouter:
        """Let replicas be asked by their lines; returns the router that chooses among them."""
        router = LanguageModelRouter(
            DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=False
        )
        router.initialize_state()
        router.update_replicas([Routed(name) for name in self.replicas])
        self._router._asyncio_router.request_router = router
        return router

    @property
    def hold(self):
        return self.options().hold

    def options(self, session_id: str = "", **_):
        replica = self.replicas.get(session_id, next(iter(self.replicas.values())))

        def caller(method: str):
            def remote(*args):
                kind = PlainCall if method == "hold" else Call
                # Ray resolves references for the receiver.
                args = tuple(arg.array if isinstance(arg, Stored) else arg for arg in args)
                self.calls[method].append(kind(getattr(replica, method)(*args)))
                return self.calls[method][-1]

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(
            options=self.options, _router=self._router, **{method: caller(method) for method in self.calls}
        )


class World:
    """A replica and the ingress' side of it, with an open channel.

    Args:
        lines: both are on one host.
        process: the replica's engine has a process of its own.
        asks: the replica is asked by its line once that is open.
    """

    def __init__(
        self, *others: Replica, lines: bool = False, process: bool = False, asks: bool = False
    ) -> None:
        self.asks = asks
        self.replica = Replica("a", lines=lines)
        self.peer = Peer(self.replica.stage) if process else None
        self.handle = Handle(self.replica, *others)
        self.model = RemoteLanguageModel(self.handle)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        if self.peer is not None:
            self.peer.kill()

    @property
    def answers(self) -> dict[str, Mailbox]:
        return self.replica.stage.answers

    @property
    def has_line(self) -> bool:
        """Whether the replica knows of a line to the ingress."""
        return self.replica._stage.has_line(self.model._inbox.name)

    def start(self, name: str, *media) -> asyncio.Task:
        """Read an answer to its end: its updates, and the error that ended it."""
        found: list[StreamUpdate] = []

        async def read():
            request = Generation(name, EngineInput([1]), SamplingParams())
            async with aclosing(self.model.generate(request, media)) as updates:
                try:
                    async for each in updates:
                        found.append(each)
                except StageLost as error:
                    return found, error
                except NoTokenAllowed as error:
                    return found, error
            return found, None

        task = asyncio.ensure_future(read())
        task.found = found  # type: ignore[attr-defined]
        return task

    async def begin(self, name: str, *media) -> asyncio.Task:
        """As :meth:`start`, but return once the replica works on the request."""
        if self.peer is not None and self.replica.served is not self.peer.served:
            self.replica._stage, self.replica.served = await self.peer.connect(), self.peer.served
        if self.asks and self.handle._router._asyncio_router.request_router is None:
            self.handle.allow_lines()
        task = self.start(name, *media)
        await wait_until(lambda: name in self.answers, 60)
        return task

    async def open(self) -> None:
        """Ask once, so that the channel opens; the answer comes by it."""
        task = await self.begin("opener")
        await wait_until(lambda: self.has_line, 60)
        if self.asks:
            await wait_until(lambda: self.model._inbox.lines, 60)
        self.answers["opener"].put(update("opener", 0, last=True))
        assert await task == ([update("opener", 0, last=True)], None)


@pytest.fixture
def world():
    return World(Replica("b"))


@pytest.fixture(params=["call", "line", "process", "line asks", "process asks"])
def either(request):
    """By either kind of channel, by a line of an engine's process, and by lines that carry requests too."""
    kind, _, asks = request.param.partition(" ")
    others = [] if asks else [Replica("b")]
    with World(*others, lines=kind == "line", process=kind == "process", asks=bool(asks)) as world:
        yield world


async def test_all_answers_come_by_the_channel_that_the_first_one_opens(world):
    await world.open()
    # That no channel was open, and that one has opened since.
    assert [call.count for call in world.handle.calls["generate"]] == [2]
    tasks = [await world.begin(name) for name in ("one", "two")]
    for number in range(3):
        for name in ("one", "two"):
            world.answers[name].put(update(name, number, last=number == 2))
        await wait_until(lambda n=number: all(len(task.found) > n for task in tasks), 60)
    assert await asyncio.gather(*tasks) == [
        ([update(name, number, last=number == 2) for number in range(3)], None) for name in ("one", "two")
    ]
    # The start alone.
    assert [call.count for call in world.handle.calls["generate"]] == [2, 1, 1]
    # The start, the first answer, and three steps, each with the updates of both answers.
    assert [call.count for call in world.handle.calls["updates"]] == [1 + 1 + 3]


async def test_an_answer_comes_by_its_own_call_if_the_channel_opens_too_late(world, monkeypatch):
    with monkeypatch.context() as late:
        late.setattr(world.replica._outboxes, "find", lambda reader: None)
        task = await world.begin("one")
        world.answers["one"].put(update("one", 0))
        await wait_until(lambda: task.found, 60)
    await wait_until(lambda: world.replica._stage.has_line(world.model._inbox.name), 60)
    world.answers["one"].put(update("one", 1, last=True))
    assert await asyncio.wait_for(task, 60) == ([update("one", 0), update("one", 1, last=True)], None)
    assert [call.count for call in world.handle.calls["generate"]] == [3]
    assert [call.count for call in world.handle.calls["updates"]] == [1]


@pytest.mark.parametrize("seed", range(8))
async def test_each_answer_is_whole_whatever_others_send(either, seed):
    await either.open()
    draw = random.Random(seed)
    names = [f"r{number}" for number in range(draw.randint(1, 6))]
    tasks = {name: await either.begin(name) for name in names}
    sent: dict[str, list[StreamUpdate]] = {name: [] for name in names}
    left = [name for name in names for _ in range(draw.randint(1, 5))]
    draw.shuffle(left)
    while left:
        name = left.pop()
        length = draw.choice([0, 5, 1000, PIECE_BYTES // 5 - 60, 3 * PIECE_BYTES])
        size = {"length": length, "rows": draw.choice([0, 0, 1, 200, 600])}
        made = update(name, len(sent[name]), **size, last=name not in left)
        sent[name].append(made)
        either.answers[name].put(pickle.loads(pickle.dumps(made)))
        for _ in range(draw.randint(0, 4)):
            await asyncio.sleep(0)
    for name, task in tasks.items():
        found, error = await asyncio.wait_for(task, 120)
        assert error is None and reduce(merge_updates, found) == reduce(merge_updates, sent[name])
    assert all(call.count == 1 for call in either.handle.calls["generate"][1:])


async def test_a_refusal_comes_behind_the_text_before_it(either):
    await either.open()
    task = await either.begin("one")
    mailbox = either.answers["one"]
    mailbox.put(update("one", 0))
    mailbox.fail(NoTokenAllowed("no token may follow"))
    found, error = await asyncio.wait_for(task, 60)
    assert (
        found == [update("one", 0)] and type(error) is NoTokenAllowed and str(error) == "no token may follow"
    )


async def test_an_answer_that_is_closed_ends_in_the_replica_and_others_go_on(either):
    await either.open()
    one, two = await either.begin("one"), await either.begin("two")
    either.answers["one"].put(update("one", 0))
    await wait_until(lambda: one.found, 60)
    one.cancel()
    await wait_until(lambda: "one" not in either.answers, 60)
    either.answers["two"].put(update("two", 0, last=True))
    assert await asyncio.wait_for(two, 60) == ([update("two", 0, last=True)], None)
    assert len(either.handle.calls["updates"]) <= 1


@pytest.mark.parametrize("method", ["updates", "generate"])
async def test_an_answer_is_lost_with_its_channel_or_its_call_and_keeps_what_came(world, method):
    await world.open()
    task = await world.begin("one")
    world.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    world.handle.calls[method][-1].task.cancel()
    found, error = await asyncio.wait_for(task, 60)
    assert found == [update("one", 0)] and type(error) is StageLost
    await wait_until(lambda: not world.answers, 60)
    # The channel opens anew.
    await world.open()
    assert len(world.handle.calls["updates"]) == (2 if method == "updates" else 1)


async def test_an_answer_whose_end_was_in_a_broken_channel_is_lost(world):
    await world.open()
    channel = world.handle.calls["updates"][0]
    task = await world.begin("one")
    # The network keeps what the replica sends.
    channel.items.put_nowait = lambda item: None
    world.answers["one"].put(update("one", 0, last=True))
    await wait_until(lambda: not world.answers and world.handle.calls["generate"][-1].task.done(), 60)
    assert not task.done()
    del channel.items.put_nowait
    channel.task.cancel()
    found, error = await asyncio.wait_for(task, 60)
    assert not found and type(error) is StageLost


async def test_an_answer_whose_channel_broke_before_its_call_has_ended_is_lost(world):
    """Another replica's channel is open: it says nothing of this one's."""
    world.model._inbox.read("b")
    await world.open()
    channel, held = world.handle.calls["updates"][-1], asyncio.Event()
    assert len(world.model._inbox._channels) == 2
    hold = world.replica.hold

    async def late(*args):
        result = await hold(*args)
        await held.wait()
        return result

    world.replica.hold = late
    task = await world.begin("one", ROWS)
    # The network keeps what the replica sends.
    channel.items.put_nowait = lambda item: None
    world.answers["one"].put(update("one", 0, last=True))
    await wait_until(lambda: not world.answers, 60)
    del channel.items.put_nowait
    channel.task.cancel()
    await wait_until(lambda: len(world.model._inbox._channels) == 1, 60)
    held.set()
    found, error = await asyncio.wait_for(task, 60)
    assert not found and type(error) is StageLost


async def test_an_answer_is_not_lost_with_another_replica_s_channel(world):
    world.model._inbox.read("b")
    await world.open()
    (other,) = (
        call for call in world.handle.calls["updates"] if call is not world.handle.calls["updates"][-1]
    )
    task = await world.begin("one")
    channel = world.handle.calls["updates"][-1]
    later: list = []
    channel.items.put_nowait = later.append
    world.answers["one"].put(update("one", 0, last=True))
    await wait_until(lambda: later and world.handle.calls["generate"][-1].task.done(), 60)
    other.task.cancel()
    await wait_until(lambda: len(world.model._inbox._channels) == 1, 60)
    del channel.items.put_nowait
    for item in later:
        channel.items.put_nowait(item)
    assert await asyncio.wait_for(task, 60) == ([update("one", 0, last=True)], None)


ROWS = RowsRef(RowsInfo("h", "float32"), Stored(np.arange(2.0, dtype=np.float32)[None]))


async def test_an_answer_to_an_image_is_one_call_or_none_once_the_channel_is_open(either):
    first = await either.begin("first", ROWS)
    await wait_until(lambda: either.replica._stage.has_line(either.model._inbox.name), 60)
    either.answers["first"].put(update("first", 0, last=True))
    assert await asyncio.wait_for(first, 60) == ([update("first", 0, last=True)], None)
    assert [len(either.handle.calls[method]) for method in ("hold", "generate")] == [1, 1]
    task = await either.begin("one", ROWS)
    for number in range(3):
        either.answers["one"].put(update("one", number, last=number == 2))
        await wait_until(lambda n=number: len(task.found) > n, 60)
    assert await asyncio.wait_for(task, 60) == ([update("one", n, last=n == 2) for n in range(3)], None)
    # One that the engine ends, and one that the client leaves.
    task, left = await either.begin("two", ROWS), await either.begin("three", ROWS)
    either.answers["two"].put(update("two", 0))
    either.answers["two"].fail(NoTokenAllowed("no token may follow"))
    found, error = await asyncio.wait_for(task, 60)
    assert found == [update("two", 0)] and type(error) is NoTokenAllowed
    left.cancel()
    await wait_until(lambda: not either.answers, 60)
    calls = [len(either.handle.calls[method]) for method in ("hold", "generate")]
    assert calls == ([1, 1] if either.asks else [4, 1])
    assert not len(either.replica._held)


async def test_media_go_by_a_line_unless_they_are_large(near, monkeypatch):
    near.asks = True
    await near.open()
    seen: list[np.ndarray] = []
    generate = near.replica.served._stage.generate

    def looked_at(request, media, relay):
        seen.extend(each.rows for each in media)
        return generate(request, media, relay)

    monkeypatch.setattr(near.replica.served._stage, "generate", looked_at)
    small = np.arange(1 << 18, dtype=np.float32)[None]
    large = np.zeros((1, MOST_BYTES // 4), np.float32)
    for calls, arrays in enumerate(([small, small], [small, large])):
        media = [RowsRef(RowsInfo(str(n), "float32"), Stored(array)) for n, array in enumerate(arrays)]
        task = await near.begin("one", *media)
        assert len(near.handle.calls["hold"]) == calls
        assert all(np.array_equal(*pair) for pair in zip(seen, arrays, strict=True))
        seen.clear()
        near.answers["one"].put(update("one", 0, last=True))
        assert await asyncio.wait_for(task, 60) == ([update("one", 0, last=True)], None)


@pytest.mark.parametrize(("error", "lost"), [(ObjectLostError("", None, ""), RowsLost), (RayError(), None)])
async def test_media_that_are_lost_before_they_go_by_a_line_are_made_again(error, lost):
    """And other errors of the store are errors of the request."""
    with World(lines=True, asks=True) as near:
        await near.open()
        media = RowsRef(ROWS.info, Stored(ROWS.array.array, error))
        request = Generation("one", EngineInput([1]), SamplingParams())
        with pytest.raises(SightlineError) as caught:
            await anext(near.model.generate(request, [media]))
        assert type(caught.value) is (lost or SightlineError)
        await near.open()


async def test_what_was_encoded_comes_before_the_first_update(either, monkeypatch):
    async def embedded(infos, arrays):
        return [], [Encoded("h", True, 0.25)]

    await either.open()
    monkeypatch.setattr(either.replica.served, "embedded", embedded)
    report = begin_report({}, lambda: "id")
    task = await either.begin("one", ROWS)
    either.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    assert report.seconds == {"encode": 0.25}
    either.answers["one"].put(update("one", 1, last=True))
    assert (await asyncio.wait_for(task, 60))[1] is None
    assert len(either.handle.calls["generate"]) == 1


async def test_an_answer_to_an_image_is_lost_with_its_line(near):
    await _lose(near, lambda: next(iter(near.replica.served._lines._connections)).close())


@pytest.mark.parametrize("process", [False, True])
async def test_an_answer_to_an_image_is_lost_with_its_call(process):
    with World(lines=True, process=process) as near:
        await _lose(near, lambda: near.handle.calls["hold"][-1].task.cancel())


async def test_pixels_that_came_by_a_line_are_lost_with_the_answer():
    """They are not kept while it lasts, but prepared again."""
    with World(lines=True, asks=True) as near:
        await near.open()
        media = [RowsRef(ROWS.info, Brought(ROWS.array.array))]
        task = await near.begin("one", *media)
        next(iter(near.replica.served._lines._connections)).close()
        found, error = await asyncio.wait_for(task, 60)
        assert not found and type(error) is RowsLost
        with pytest.raises(RowsLost):
            await anext(near.model.generate(Generation("one", EngineInput([1]), SamplingParams()), media))


async def _lose(near: World, cut: Callable[[], None]) -> None:
    """Check that an answer to an image is lost with what ``cut`` cuts."""
    await near.open()
    task = await near.begin("one", ROWS)
    near.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    near.answers["one"].put(update("one", 1))
    cut()
    found, error = await asyncio.wait_for(task, 60)
    assert found[:1] == [update("one", 0)] and type(error) is StageLost
    await wait_until(lambda: not near.answers, 60)


@pytest.fixture(params=["line", "process", "line asks", "process asks"])
def near(request):
    """On one host."""
    kind, _, asks = request.param.partition(" ")
    with World(lines=True, process=kind == "process", asks=bool(asks)) as world:
        yield world


async def test_a_line_stays_open_and_makes_no_call(near):
    for _ in range(2):
        await near.open()
        # No time is set at which it ends.
        assert near.replica.served._outboxes.find(near.model._inbox.name)._timer is None
    # Or the second one is asked for by the line.
    assert [call.count for call in near.handle.calls["generate"]] == ([2] if near.asks else [2, 1])
    counted = {labels["way"]: value for labels, value in near.model.ways.family().samples}
    assert counted == ({"line": 1, "call": 1} if near.asks else {"line": 0, "call": 2})
    assert not near.handle.calls["updates"]


@pytest.mark.parametrize("asks", [False, True])
def test_a_line_on_the_event_loop_that_replicas_have(asks):
    uvloop = pytest.importorskip("uvloop")

    async def open_twice() -> None:
        near = World(lines=True, asks=asks)
        for _ in range(2):
            await near.open()
        assert [call.count for call in near.handle.calls["generate"]] == ([2] if asks else [2, 1])
        assert not near.handle.calls["updates"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(open_twice())


async def test_answers_are_lost_with_their_line_and_another_one_opens(near):
    await near.open()
    task = await near.begin("one")
    near.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    (connection,) = near.replica.served._lines._connections
    connection.close()
    found, error = await asyncio.wait_for(task, 60)
    assert found == [update("one", 0)] and type(error) is StageLost
    await wait_until(lambda: not near.answers and not near.has_line, 60)
    await near.open()


async def test_a_line_breaks_if_an_update_cannot_be_sent(near):
    await near.open()
    task = await near.begin("one")
    near.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    odd = update("one", 1)
    odd.deltas[0].stop_reason = lambda: None
    near.answers["one"].put(odd)
    found, error = await asyncio.wait_for(task, 60)
    assert found == [update("one", 0)] and type(error) is StageLost
    await wait_until(lambda: not near.answers and not near.has_line, 60)
    await near.open()


async def test_a_reader_that_leaves_takes_its_line_along(near):
    await near.open()
    (channel,) = near.model._inbox._channels.values()
    channel.cancel()
    await wait_until(lambda: not near.replica.served._lines._connections, 60)
    await wait_until(lambda: not near.has_line, 60)


async def test_other_users_have_no_line(near, monkeypatch):
    read: list = []
    address = await near.replica._stage.line()
    with monkeypatch.context() as patch:
        patch.setattr("deployments.ray_serve.frames.is_own_user", lambda transport: False)
        assert await asyncio.wait_for(follow(address, "reader", read.append, read.append), 60)
    monkeypatch.setattr("deployments.ray_serve.frames.os.getuid", lambda: -1)
    assert not await asyncio.wait_for(follow(address, "reader", read.append, read.append), 60)
    assert not read and near.replica.served._outboxes.find("reader") is None


async def test_a_line_is_asked_up_to_the_limit_and_only_where_all_replicas_have_one():
    with World(lines=True) as near:
        await near.open()
        router = near.handle.allow_lines()
        names = [f"r{number}" for number in range(Routed.max_ongoing_requests + 1)]
        tasks = [await near.begin(name) for name in names]
        # The last one went by Ray Serve.
        assert len(near.handle.calls["generate"]) == 2 and router.asked == {"a": len(names) - 1}
        for name in names:
            near.answers[name].put(update(name, 0, last=True))
        assert await asyncio.gather(*tasks) == [([update(name, 0, last=True)], None) for name in names]
        assert not router.asked.total()
        router.update_replicas([Routed("a"), Routed("new")])
        await near.open()
        assert len(near.handle.calls["generate"]) == 3


async def test_a_replica_that_stops_ends_its_answers_first(near):
    near.asks = True
    await near.open()
    task = await near.begin("one")
    ended = asyncio.ensure_future(near.replica._stage.answered())
    near.answers["one"].put(update("one", 0))
    await wait_until(lambda: task.found, 60)
    assert not ended.done()
    near.answers["one"].put(update("one", 1, last=True))
    await asyncio.wait_for(ended, 60)
    assert await task == ([update("one", 0), update("one", 1, last=True)], None)


async def test_what_cannot_be_read_ends_a_line(near):
    await near.open()
    near.model._inbox.lines["a"](("no request", {}))  # type: ignore[arg-type]
    await wait_until(lambda: not (near.has_line or near.model._inbox.lines), 60)
    await near.open()


async def test_a_channel_to_another_replica_is_refused(world):
    items = [item async for item in world.replica.updates("reader", "other")]
    assert len(items) == 1 and isinstance(items[0], Refusal) and isinstance(items[0].error, Misrouted)


async def test_a_reader_s_new_channel_takes_the_place_of_its_old_one():
    outboxes = Outboxes()
    with outboxes.open("r") as old:
        assert outboxes.find("r") is old
        with outboxes.open("r") as new:
            assert not await asyncio.wait_for(_all(old), 60)
            with pytest.raises(StageLost):
                old.put(update("one", 0))
            assert not old.fail("one", StageLost("lost"))
            outboxes.find("r").put(update("one", 0))
            new.close()
            assert len(await asyncio.wait_for(_all(new), 60)) == 1
    assert outboxes.find("r") is None


async def test_a_channel_ends_without_answers_and_only_then():
    outbox = Outbox(0.0)
    with outbox.answer():
        messages = asyncio.ensure_future(_all(outbox))
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.01, later.set)
        await later.wait()
        assert not outbox.closed
        outbox.put(replace(update("one", 0), finished=True))
    assert len(await asyncio.wait_for(messages, 60)) == 1 and outbox.closed


async def _all(outbox: Outbox) -> list:
    return [message async for message in outbox.messages()]
