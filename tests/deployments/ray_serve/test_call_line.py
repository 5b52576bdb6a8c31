"""Calls of replicas by lines: results, refusals, losses, and which replica is called."""

import asyncio
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deployments.ray_serve.call_line import CallLine, CallLines, ReplicaLines
from deployments.ray_serve.frames import MOST_BYTES, LineEnd, connected
from deployments.ray_serve.handles import RemoteEncoder, RemotePreprocessor
from deployments.ray_serve.handoff import Brought, PixelsRef, RowsRef, taken
from deployments.ray_serve.line import _Reader
from deployments.ray_serve.packing import RowsInfo
from deployments.ray_serve.refusals import Refusal, TooLong, answered
from deployments.ray_serve.replicas import PreprocessorReplica, VisionEncoderReplica
from deployments.ray_serve.routing import EncoderRouter
from deployments.stages import RowsLost, StageLost
from engine.errors import InvalidRequest, SightlineError
from engine.media.documents.pages import PageOptions
from engine.media.source import MediaSource, RowsSource
from engine.prompt import EmbeddedMedia, KeptFiles, MediaItem, PlaceholderRun, PreparedMedia
from tests.deployments.ray_serve.doubles import Candidate, router_of, serve_router
from tests.serving import wait_until


class Replica:
    """Answers calls with what a test gives.

    Attributes:
        calls: futures of the open calls, by their first arguments.
    """

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.calls: dict[Any, asyncio.Future] = {}
        self.lines = CallLines(self._answer)

    async def _answer(self, name: Any, *args: Any) -> Any:
        self.calls[name] = asyncio.get_running_loop().create_future()
        try:
            return await answered(self.calls[name])
        finally:
            del self.calls[name]

    async def begin(self, line: CallLine, name: Any, *args: Any) -> asyncio.Task:
        """A call, once the replica works on it."""
        task = asyncio.ensure_future(line.call(name, *args))
        await wait_until(lambda: name in self.calls, 60)
        return task

    async def connect(self) -> CallLine:
        line = await connected(await self.lines.address(), lambda: CallLine(lambda: None))
        assert line is not None
        return line

    async def break_lines(self) -> None:
        await wait_until(lambda: self.lines._connections, 60)
        for connection in list(self.lines._connections):
            connection._transport.abort()


async def _results() -> None:
    replica = Replica()
    line = await replica.connect()
    first, second, third = [await replica.begin(line, name) for name in (1, 2, 3)]
    assert line.busy == 3
    array = np.arange(1 << 20, dtype=np.float32)
    replica.calls[2].set_result(array)
    assert np.array_equal(await second, array)
    replica.calls[1].set_exception(InvalidRequest("no", param="x"))
    with pytest.raises(InvalidRequest) as refused:
        await first
    assert refused.value.param == "x"
    # Neither an error of the code nor a result that can't be sent ends the line.
    replica.calls[3].set_exception(ZeroDivisionError())
    with pytest.raises(SightlineError) as failed:
        await third
    assert failed.value.status == 500
    fourth = await replica.begin(line, 4)
    replica.calls[4].set_result(lambda: None)
    with pytest.raises(SightlineError):
        await fourth
    assert not line.busy
    line._transport.close()


async def test_results_and_errors_come_back_in_any_order():
    await _results()


def test_a_line_on_the_event_loop_that_replicas_have():
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_results())


def test_what_is_said_on_a_line_that_has_ended_is_lost():
    """uvloop's transports raise there, asyncio's don't."""
    uvloop = pytest.importorskip("uvloop")

    async def said() -> None:
        replica = Replica()
        line = await replica.connect()
        task = await replica.begin(line, 1)
        line._on_end = task.cancel
        reader = await connected(await replica.lines.address(), lambda: _Reader(print, print))
        assert reader is not None
        await wait_until(lambda: len(replica.lines._connections) == 2, 60)
        await replica.break_lines()
        # Cancelled in the moment of the loss, a call is cancelled.
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(reader.ended, 60)
        with pytest.raises(StageLost):
            reader.say("one")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(said())


async def test_a_call_that_is_cancelled_ends_in_the_replica():
    replica = Replica()
    line = await replica.connect()
    left, other = [await replica.begin(line, name) for name in (1, 2)]
    left.cancel()
    await wait_until(lambda: 1 not in replica.calls, 60)
    with pytest.raises(asyncio.CancelledError):
        await left
    replica.calls[2].set_result("done")
    assert await other == "done"


async def test_calls_are_lost_with_their_line_and_end_with_their_caller():
    replica = Replica()
    line = await replica.connect()
    task = await replica.begin(line, 1)
    await replica.break_lines()
    with pytest.raises(StageLost):
        await task
    await wait_until(lambda: not replica.calls, 60)
    line = await replica.connect()
    task = await replica.begin(line, 1)
    line._transport.close()
    with pytest.raises(StageLost):
        await task
    await wait_until(lambda: not replica.calls, 60)


async def test_a_call_on_a_line_that_has_ended_is_lost():
    replica = Replica()
    line = await replica.connect()
    await replica.break_lines()
    await wait_until(lambda: line._transport.is_closing(), 60)
    with pytest.raises(StageLost):
        await asyncio.wait_for(line.call(1), 60)


async def test_an_answer_that_is_too_long_is_refused_and_the_line_goes_on(monkeypatch):
    monkeypatch.setattr("deployments.ray_serve.frames._WITH_ARRAYS", 1 << 14)
    replica = Replica()
    line = await replica.connect()
    for result in (b"x" * (1 << 14), np.zeros(1 << 14, np.uint8)):
        task = await replica.begin(line, 1)
        replica.calls[1].set_result(result)
        with pytest.raises(TooLong):
            await asyncio.wait_for(task, 60)
    task = await replica.begin(line, 2)
    replica.calls[2].set_result("short")
    assert await asyncio.wait_for(task, 60) == "short"


async def test_a_replica_that_stops_ends_its_calls_first():
    replica = Replica()
    task = await replica.begin(await replica.connect(), 1)
    ended = asyncio.ensure_future(replica.lines.answered())
    await asyncio.sleep(0)
    assert not ended.done()
    replica.calls[1].set_result("done")
    assert await task == "done"
    await asyncio.wait_for(ended, 60)


async def test_other_users_have_no_line(monkeypatch):
    replica = Replica()
    with monkeypatch.context() as patch:
        patch.setattr("deployments.ray_serve.frames.is_own_user", lambda transport: False)
        with pytest.raises(StageLost):
            await asyncio.wait_for((await replica.connect()).call(1), 60)
    assert not replica.calls
    # Nor do those who listen at a replica's address.
    monkeypatch.setattr("deployments.ray_serve.frames.os.getuid", lambda: -1)
    assert await connected(await replica.lines.address(), LineEnd) is None


#: Has no descriptor left for a while, which other threads of the process of the tests could not bear.
NO_DESCRIPTOR_LEFT = """
import asyncio, resource
from deployments.ray_serve.frames import LineEnd, LineServer, ServedLine, connected, is_own_user

async def main():
    server = LineServer(ServedLine, "")
    address = await server.address()
    line = await connected(address, lambda: ServedLine(set()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    assert is_own_user(line._transport)
    assert await connected(address, LineEnd) is None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not line._transport.is_closing() and is_own_user(line._transport)
    assert await connected(address, LineEnd) is not None

asyncio.run(main())
"""


def test_lines_take_no_descriptor_but_their_own():
    """Otherwise a replica that has none left would hold a line to which it doesn't listen."""
    subprocess.run([sys.executable, "-c", NO_DESCRIPTOR_LEFT], check=True, timeout=240)


async def test_a_call_whose_work_was_cancelled_is_lost():
    replica = Replica()
    task = await replica.begin(await replica.connect(), 1)
    replica.calls[1].cancel()
    with pytest.raises(StageLost):
        await asyncio.wait_for(task, 60)


class Deployment:
    """Replicas, of which some may have no line.

    Attributes:
        asked: how often the replicas were asked for their lines.
    """

    def __init__(self, *replicas: Replica, far: tuple[str, ...] = ()) -> None:
        self.replicas, self._far, self.asked = replicas, far, 0

    async def addresses(self) -> list[tuple[str, str]]:
        self.asked += 1
        near = [(replica.name, await replica.lines.address()) for replica in self.replicas]
        return [*near, *((name, "\0nowhere") for name in self._far)]


async def test_the_less_busy_replica_is_called_up_to_its_limit():
    one, two = Replica("one"), Replica("two")
    lines, limits = ReplicaLines(Deployment(one, two).addresses), {"one": 2, "two": 1}
    assert lines.choose({}) is None and lines.choose(limits) is None
    await wait_until(lambda: lines.choose(limits) is not None, 60)
    first = lines._lines["one"]
    tasks = [await one.begin(first, 1)]
    assert lines.choose(limits) is lines._lines["two"]
    tasks.append(await two.begin(lines._lines["two"], 2))
    # Both have one; the first may have another.
    assert lines.choose({"one": 2}) is first
    tasks.append(await one.begin(first, 3))
    assert lines.choose(limits) is None
    for replica, name in ((one, 1), (two, 2), (one, 3)):
        replica.calls[name].set_result(name)
    assert await asyncio.gather(*tasks) == [1, 2, 3]


async def test_lines_are_used_only_where_all_replicas_have_one():
    near = Replica("near")
    deployment = Deployment(near, far=("far",))
    lines = ReplicaLines(deployment.addresses)
    assert lines.choose({"near": 1, "far": 1}) is None
    await wait_until(lambda: "near" in lines._lines, 60)
    for _ in range(9):
        assert lines.choose({"near": 1, "far": 1}) is None
        await asyncio.sleep(0)
    # Not for each request.
    assert deployment.asked == 1
    assert lines.choose({"near": 1}) is lines._lines["near"]


async def test_a_line_that_broke_opens_again():
    replica = Replica()
    lines = ReplicaLines(Deployment(replica).addresses)
    for _ in range(2):
        await wait_until(lambda: lines.choose({"a": 1}) is not None, 60)
        await replica.break_lines()
        await wait_until(lambda: not lines._lines, 60)


IMAGE = MediaSource(0, "image", url="data:,0")
ITEM = MediaItem("image", "h", 1, (1, 1, 1), (1, 1), (PlaceholderRun(0, 1, True),))


class Near:
    """A replica with lines, and a handle of its deployment.

    Attributes:
        calls: calls by Ray Serve.
    """

    _lines: CallLines

    def __init__(self, router: Any) -> None:
        self.calls = 0
        self._router = serve_router(router)

    def options(self, **_: Any) -> "Near":
        return self

    def broadcast(self, method: str) -> Any:
        assert method == "line"

        async def address() -> tuple[str, str]:
            return "a", await self._lines.address()

        async def results() -> list[Any]:
            return [SimpleNamespace(get_async=address)]

        return SimpleNamespace(_fetch_replica_results_async=results)

    def remote(self, *_: Any) -> Any:
        self.calls += 1
        return self._by_ray_serve()

    async def _by_ray_serve(self) -> Any:
        return Refusal(InvalidRequest("by Ray Serve"))

    def __del__(self) -> None:
        """Nothing was loaded."""


class Preparing(Near, PreprocessorReplica):
    """Of a stage that makes ``pixels``, or refuses."""

    def __init__(self, pixels: np.ndarray | SightlineError) -> None:
        loop, replicas = asyncio.get_running_loop(), {"a": Candidate("a")}
        super().__init__(SimpleNamespace(curr_replicas=replicas, _event_loop=loop))
        self._pixels, self._stage = pixels, self
        self._lines = CallLines(self._prepare_near)

    async def prepare(self, sources, files, caller, images, salt) -> Any:
        assert (caller, images, salt) == ("caller", 1, "salt")
        if isinstance(self._pixels, SightlineError):
            raise self._pixels
        return [PreparedMedia(ITEM, self._pixels, {"fetch": 0.5}, 3, note="note")]


def stage_of(replica: Preparing) -> RemotePreprocessor:
    stage = RemotePreprocessor(replica)  # type: ignore[arg-type]
    stage._handle = SimpleNamespace(_router=replica._router, prepare=replica, broadcast=replica.broadcast)  # type: ignore[assignment]
    return stage


def ways(stage: RemotePreprocessor | RemoteEncoder) -> dict[str, float]:
    return {labels["way"]: value for labels, value in stage.ways.family().samples}


async def prepared(stage: RemotePreprocessor, *sources: MediaSource, files=None) -> Any:
    return await stage.prepare(sources, files or {}, "caller", 1, "salt")


async def opened(stage: RemotePreprocessor, replica: Preparing) -> None:
    """Return once the stage has a line; until then its calls go by Ray Serve."""
    with pytest.raises(InvalidRequest):
        await prepared(stage, IMAGE)
    await wait_until(lambda: stage._lines._lines, 60)
    assert replica.calls == 1
    replica.calls = 0


async def test_images_are_prepared_by_a_line():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    replica = Preparing(pixels)
    stage = stage_of(replica)
    await opened(stage, replica)
    (found,) = await prepared(stage, IMAGE)
    assert type(found) is PixelsRef and np.array_equal(found.pixels.take(), pixels)
    # It is not kept as long as the answer lasts.
    with pytest.raises(RowsLost):
        found.pixels.take()
    assert (found.item, found.seconds, found.frames, found.note) == (ITEM, {"fetch": 0.5}, 3, "note")
    assert found.kept is None and not replica.calls
    assert ways(stage) == {"line": 1, "call": 1}
    replica._pixels = InvalidRequest("by line", param="image")
    with pytest.raises(InvalidRequest, match="by line"):
        await prepared(stage, IMAGE)
    assert not replica.calls


async def test_large_requests_and_what_is_kept_are_prepared_by_ray_serve():
    replica = Preparing(np.zeros(MOST_BYTES + 1, np.uint8))
    stage = stage_of(replica)
    await opened(stage, replica)
    # What has been done is not done again.
    (found,) = await prepared(stage, IMAGE)
    assert found.pixels.take().nbytes > MOST_BYTES and not replica.calls
    others = [
        MediaSource(0, "video", "video", url="data:,0"),
        MediaSource(0, "video", "video", frames=(IMAGE,)),
        MediaSource(0, "image", url="data:,0", uuid="name"),
        MediaSource(0, "image", url="data:,0", pages=PageOptions()),
        MediaSource(0, "image", rows=RowsSource("aGVsbG8=")),
        MediaSource(0, "image", url="data:," + "0" * MOST_BYTES),
    ]
    for calls, source in enumerate(others):
        with pytest.raises(InvalidRequest, match="by Ray Serve"):
            await prepared(stage, source)
        assert replica.calls == calls + 1
    with pytest.raises(InvalidRequest, match="by Ray Serve"):
        await prepared(stage, IMAGE, files={0: KeptFiles([b""], "digest", 1)})


async def test_images_that_are_too_long_for_a_line_when_prepared_come_by_ray_serve(monkeypatch):
    replica = Preparing(np.zeros(1 << 14, np.uint8))
    stage = stage_of(replica)
    await opened(stage, replica)
    monkeypatch.setattr("deployments.ray_serve.frames._WITH_ARRAYS", 1 << 14)
    with pytest.raises(InvalidRequest, match="by Ray Serve"):
        await prepared(stage, IMAGE)
    assert replica.calls == 1 and ways(stage) == {"line": 1, "call": 2}


async def test_replicas_whose_calls_are_counted_are_called_by_ray_serve():
    replica = Preparing(np.zeros(1, np.uint8))
    stage = stage_of(replica)
    await opened(stage, replica)
    replica._router._asyncio_router._metrics_manager.autoscaling_config = object()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="by Ray Serve"):
            await prepared(stage, IMAGE)


class Encoding(Near, VisionEncoderReplica):
    """Of a stage whose embedding rows are what a test gives.

    Attributes:
        rows: a future of them, or of an error.
        given: what each call came with.
        row_bytes: of the rows that Ray Serve brings; 0 if it brings none.
    """

    def __init__(self, router: EncoderRouter) -> None:
        super().__init__(router)
        self._stage = self
        self._lines = CallLines(self._encode_near)
        self.rows: asyncio.Future = asyncio.get_running_loop().create_future()
        self.given: list[Any] = []
        self.row_bytes = 6

    async def _by_ray_serve(self) -> Any:
        info = RowsInfo("h", "bfloat16", row_bytes=self.row_bytes)
        return RowsRef(info, "reference") if self.row_bytes else await super()._by_ray_serve()  # type: ignore[arg-type]

    async def encode(self, media, salt, asked) -> Any:
        self.given.append((media, salt, asked))
        return EmbeddedMedia(media.item.hash, await asyncio.shield(self.rows), "bfloat16", cached=True)


async def encoder(row_bytes: int = 6, onward: bool = True) -> tuple[Encoding, RemoteEncoder]:
    """An encoder's replica, and the stage, which has a line to it and knows the bytes of a row."""
    replica = Encoding(await router_of(EncoderRouter, Candidate("a")))
    stage = RemoteEncoder(replica, lambda: onward)  # type: ignore[arg-type]
    stage._handle = SimpleNamespace(_router=replica._router, encode=replica, broadcast=replica.broadcast)  # type: ignore[assignment]
    replica.row_bytes = row_bytes
    await encoded(stage, np.zeros(1, np.uint8))
    await wait_until(lambda: stage._lines._lines, 60)
    replica.row_bytes = 0
    return replica, stage


def encoded(stage: RemoteEncoder, pixels: np.ndarray) -> Any:
    return stage.encode(PixelsRef(ITEM, Brought(pixels)), "salt", 5.0)


async def test_what_has_come_by_a_line_is_encoded_by_a_line():
    replica, stage = await encoder()
    pixels, rows = np.arange(12, dtype=np.uint8).reshape(2, 2, 3), np.arange(6, dtype=np.uint16).reshape(2, 3)
    kept, task = weakref.ref(pixels), asyncio.ensure_future(encoded(stage, pixels))
    await wait_until(lambda: replica.given, 60)
    ((media, *others),) = replica.given
    assert np.array_equal(media.pixels, pixels) and (media.item, *others) == (ITEM, "salt", 5.0)
    # They are there in the replica: this process has no further use for them.
    del pixels
    await wait_until(lambda: kept() is None, 60)
    replica.rows.set_result(rows)
    found = await task
    # Each process that the answer is asked of gets them, as from the object store.
    for _ in range(2):
        assert np.array_equal(taken(found.array), rows)
    assert found.info == RowsInfo("h", "bfloat16", True, 6) and replica.calls == 1
    assert ways(stage) == {"line": 1, "call": 1}
    router = replica._router._asyncio_router.request_router
    assert not any(router.asked.values()) and not router._places._in_flight


async def test_an_item_s_refusal_loss_and_end_come_by_the_line():
    replica, stage = await encoder()
    replica.rows.set_exception(InvalidRequest("by line"))
    with pytest.raises(InvalidRequest, match="by line"):
        await encoded(stage, np.zeros(1, np.uint8))
    replica.rows = asyncio.get_running_loop().create_future()
    left, lost = [asyncio.ensure_future(encoded(stage, np.zeros(1, np.uint8))) for _ in range(2)]
    await wait_until(lambda: len(replica.given) == 3, 60)
    left.cancel()
    (line,) = replica._lines._connections
    await wait_until(lambda: len(line.tasks) == 1, 60)
    line._transport.abort()
    with pytest.raises(StageLost):
        await lost
    assert replica.calls == 1


async def test_what_is_large_or_in_the_object_store_is_encoded_by_ray_serve():
    replica, stage = await encoder()
    for pixels in (Brought(np.zeros(MOST_BYTES + 1, np.uint8)), "reference"):
        with pytest.raises(InvalidRequest, match="by Ray Serve"):
            await stage.encode(PixelsRef(ITEM, pixels), "salt", 5.0)
    assert replica.calls == 3 and not replica.given


@pytest.mark.parametrize(
    ("row_bytes", "onward"), [(MOST_BYTES + 1, True), (0, True), (6, False)], ids=["many", "unknown", "far"]
)
async def test_rows_that_cannot_go_on_by_a_line_do_not_come_by_one(row_bytes, onward):
    """They may take many times the bytes of the pixels, and this process would keep them."""
    replica, stage = await encoder(1, onward)
    stage._row_bytes = row_bytes
    with pytest.raises(InvalidRequest, match="by Ray Serve"):
        await encoded(stage, np.zeros(1, np.uint8))
    assert not replica.given
