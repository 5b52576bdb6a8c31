"""Stages behind handles: calls, streams and failures, with replicas that a test plays."""

import asyncio
import concurrent.futures
import gc
import inspect
import logging
import pickle
import threading
import weakref
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import ray.exceptions
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deployments.config import ReplayConfig
from deployments.errors import error_headers
from deployments.ray_serve.channel import Here
from deployments.ray_serve.handles import (
    RemoteEncoder,
    RemoteLanguageModel,
    RemotePreprocessor,
    remote_stages,
)
from deployments.ray_serve.handoff import Brought, ObjectStore, PixelsRef, RowsRef, cancel
from deployments.ray_serve.packing import Encoded, PixelsInfo, RowsInfo, pack, pieces
from deployments.ray_serve.refusals import Misrouted, Refusal
from deployments.ray_serve.replicas import LanguageModelReplica, PreprocessorReplica, VisionEncoderReplica
from deployments.replay import Patience, carried_on
from deployments.report import ItemReport, begin_report
from deployments.stages import Generation, OpenFile, Pooling, RowsLost, StageLost
from deployments.tasks import all_or_none
from engine.errors import InvalidRequest, Overloaded, SightlineError, Unavailable
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage
from engine.pooling_params import PoolingParams
from engine.preparation import PagedFile
from engine.prompt import EngineInput, KeptFiles, MediaItem, PlaceholderRun
from engine.sampling_params import SamplingParams
from tests.serving import wait_until

UPDATE = StreamUpdate("one", [OutputDelta(0, "token", [1])], Usage())
LAST = replace(UPDATE, finished=True)
ROWS = RowsRef(RowsInfo("h", "float32"), None)


class Handle:
    """A deployment handle whose replica has no channel. ``generate`` yields what ``play`` returns for each
    start of a stream, from 1."""

    def __init__(self, play):
        self.play = play
        self.starts: list[dict] = []
        self.cancelled = 0
        self.held: list[tuple] = []
        self.hold = SimpleNamespace(remote=self._hold)
        self.generate = SimpleNamespace(remote=self._generate)
        self._options: dict = {}

    def options(self, **options):
        self._options = options
        return self

    def _generate(self, given, span, reader):
        self.starts.append(self._options | {"given": given})
        items = self.play(len(self.starts))
        return Response(self, items if isinstance(items[0], Refusal) else [Here("b"), *items])

    @property
    def updates(self):
        refusal = Refusal(Misrouted("no channel"))
        return SimpleNamespace(remote=lambda reader, replica: Response(self, [refusal]))

    async def _hold(self, request, span, reader, infos, *arrays):
        self.held.append((request, len(arrays)))
        return "b", []


class Response:
    def __init__(self, handle, items):
        self._handle, self._items = handle, items

    async def __aiter__(self):
        for item in self._items:
            if isinstance(item, BaseException):
                raise item
            yield item
            # Otherwise the reader would get the next item merged with this one.
            for _ in range(5):
                await asyncio.sleep(0)

    def cancel(self):
        self._handle.cancelled += 1


def grpc_error(code):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


def generation(**params) -> Generation:
    return Generation("one", EngineInput([1]), SamplingParams(**params))


async def run(handle, media=(ROWS,), **params):
    return [update async for update in RemoteLanguageModel(handle).generate(generation(**params), media)]


@pytest.mark.parametrize("misses", [0, 2])
async def test_a_misrouted_stream_is_started_again(misses):
    handle = Handle(lambda start: [Refusal(Misrouted("elsewhere")) if start <= misses else pack(LAST)])
    assert await run(handle) == [LAST]
    assert [options["session_id"] for options in handle.starts] == ["b"] * (misses + 1)
    assert all(options["given"] == "one" and not options["_by_reference"] for options in handle.starts)
    assert handle.held == [(generation(), 1)]


async def test_a_stream_that_never_finds_its_replica_ends():
    handle = Handle(lambda start: [Refusal(Misrouted("elsewhere"))])
    # Another try hands the request over once more.
    with pytest.raises(StageLost):
        await run(handle)
    assert 1 < len(handle.starts) < 9


async def test_a_prompt_without_media_goes_with_its_stream_unless_it_is_large():
    handle = Handle(lambda start: [pack(LAST)])
    assert await run(handle, ()) == [LAST] and not handle.held
    assert handle.starts == [
        {"stream": True, "_by_reference": False, "session_id": "", "given": generation()}
    ]
    large = Generation("one", EngineInput([7] * 300_000), SamplingParams())
    updates = RemoteLanguageModel(handle).generate(large, ())
    assert [update async for update in updates] == [LAST]
    assert handle.held == [(large, 0)] and handle.starts[-1]["given"] == "one"


def large_update(rows: int, width: int) -> StreamUpdate:
    row = {token: TokenLogprob(-1.5, token, "token", b"token") for token in range(width)}
    return StreamUpdate("one", [OutputDelta(0, "a" * rows, [1] * rows, [row] * rows)], Usage(), [None, row])


@pytest.mark.parametrize(("rows", "width"), [(1, 20), (300, 20), (10_000, 20), (200, 533)])
async def test_an_item_of_any_size_comes_whole_in_messages_of_bounded_size(rows, width):
    update = large_update(rows, width)
    # Rows that are the same object would be pickled once.
    delta = update.deltas[0]
    delta.logprobs = [
        {key: replace(value, logprob=-number) for key, value in row.items()}
        for number, row in enumerate(delta.logprobs)
    ]
    items = [*pieces(update), *pieces(UPDATE), *pieces(replace(update, finished=True))]
    assert all(len(pickle.dumps(item)) < 4 << 20 for item in items)
    assert (len(items) > 6) == (rows * width > 100_000)
    assert await run(Handle(lambda start: items)) == [update, UPDATE, replace(update, finished=True)]


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (Refusal(InvalidRequest("no")), InvalidRequest),
        (ray.exceptions.ActorDiedError(), StageLost),
        (ray.exceptions.ActorUnavailableError("gone", None), StageLost),
        (ray.exceptions.OwnerDiedError("a", None, "b"), RowsLost),
        (ray.exceptions.NodeDiedError("gone"), StageLost),
        (grpc_error(grpc.StatusCode.INTERNAL), StageLost),
        (grpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED), SightlineError),
        (asyncio.CancelledError(), StageLost),
        (ZeroDivisionError(), SightlineError),
        (ray.exceptions.LocalRayletDiedError(), StageLost),
        (ray.exceptions.ObjectStoreFullError("/dev/shm"), Unavailable),
        (ray.exceptions.OutOfDiskError("/tmp"), Unavailable),
    ],
)
async def test_a_stream_s_failure_is_reported_and_not_repeated(item, kind):
    handle = Handle(lambda start: [pack(UPDATE), item])
    stream = RemoteLanguageModel(handle).generate(generation(), ())
    assert await anext(stream) == UPDATE
    with pytest.raises(SightlineError) as caught:
        await anext(stream)
    assert type(caught.value) is kind and len(handle.starts) == 1


async def test_a_full_queue_hides_no_replica_that_is_well():
    answers: list = [2048, 1024, Refusal(Misrouted("the second host")), asyncio.CancelledError()]

    async def answer(given):
        if isinstance(given, BaseException):
            raise given
        return given

    async def results():
        return [SimpleNamespace(get_async=partial(answer, each)) for each in answers]

    async def full():
        raise BackPressureError(1, 1)

    handle = Handle(lambda start: [])
    handle.broadcast = lambda method: SimpleNamespace(_fetch_replica_results_async=results)
    handle.max_model_len = SimpleNamespace(remote=full)
    model = RemoteLanguageModel(handle)
    assert await model.max_model_len() == 1024
    # Where none answers, the queue says what there is to be said.
    answers.clear()
    with pytest.raises(Overloaded):
        await model.max_model_len()


async def test_a_call_that_can_t_be_made_is_reported():
    def hold(*args):
        raise DeploymentUnavailableError(DeploymentID("model"))

    handle = Handle(lambda start: [])
    handle.hold = SimpleNamespace(remote=hold)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(run(handle), 60)


async def test_a_call_that_ends_without_its_acceptance_is_lost():
    """Ray Serve reads it in the metadata of a gRPC stream, and raises a RuntimeError without it."""
    from ray.serve._private.replica_result import gRPCReplicaResult

    async def found(value):
        return value

    answers = {"initial_metadata": {}, "code": grpc.StatusCode.OK, "details": "", "wait_for_connection": None}
    result = object.__new__(gRPCReplicaResult)
    result._call = SimpleNamespace(**{name: partial(found, value) for name, value in answers.items()})
    result._with_rejection, result._rejection_response = True, None
    with pytest.raises(RuntimeError) as raised:
        await result.get_rejection_response()
    # The frames of this test aren't the error's own.
    handle = Handle(lambda start: [raised.value.with_traceback(None)])
    with pytest.raises(StageLost):
        await run(handle, ())


async def test_a_stream_that_is_closed_early_is_cancelled():
    handle = Handle(lambda start: [pack(UPDATE)] * 3)
    stream = RemoteLanguageModel(handle).generate(generation(), ())
    await anext(stream)
    await stream.aclose()
    assert handle.cancelled == 1


class Assigned:
    """A call that was assigned to a replica, which its caller has not seen yet."""

    def __init__(self):
        self._replica_result_future = asyncio.get_running_loop().create_future()
        self._replica_result_future.set_result(self)
        self.cancels = 0

    def cancel(self):
        self.cancels += 1


async def test_a_call_is_cancelled_in_its_replica_whatever_its_caller_has_seen():
    call = Assigned()
    cancel(call)
    assert call.cancels == 2
    waiting = Assigned()
    waiting._replica_result_future = asyncio.get_running_loop().create_future()
    cancel(waiting)
    assert waiting.cancels == 1
    waiting._replica_result_future.set_exception(ZeroDivisionError())
    cancel(waiting)
    assert waiting.cancels == 2 and waiting._replica_result_future.exception()


async def test_a_call_that_its_replica_cancels_is_lost_and_its_caller_goes_on():
    class Call:
        def __await__(self):
            raise asyncio.CancelledError
            yield

        def cancel(self):
            pass

    handle = SimpleNamespace(prepare=SimpleNamespace(remote=lambda *_: Call()))
    stage = RemotePreprocessor(SimpleNamespace(options=lambda **_: handle))
    with pytest.raises(StageLost):
        await stage.prepare([], {}, "")


async def test_a_cancelled_call_is_cancelled_in_the_replica_too():
    cancelled = []

    class Call:
        def __await__(self):
            future = asyncio.get_running_loop().create_future()
            return future.__await__()

        def cancel(self):
            cancelled.append(True)

    handle = SimpleNamespace(prepare=SimpleNamespace(remote=lambda *_: Call()))
    stage = RemotePreprocessor(SimpleNamespace(options=lambda **_: handle))
    task = asyncio.ensure_future(stage.prepare([], {}, ""))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled


class Recorder:
    """A handle that notes what its methods are called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []

    def options(self, **_):
        return self

    def __getattr__(self, name: str):
        def remote(*args):
            self.calls.append((name, args))
            streams = {"generate": [Here("b"), pack(LAST)], "updates": []}
            return Response(self, streams[name]) if name in streams else self._answer(name)

        return SimpleNamespace(remote=remote)

    def broadcast(self, method: str):
        async def none() -> list:
            return []

        self.calls.append((method, ()))
        return SimpleNamespace(_fetch_replica_results_async=none)

    async def _answer(self, name: str) -> Any:
        if name == "encode":
            return ROWS
        return ("b", []) if name in ("hold", "embed") else "b"


async def test_every_call_fits_the_method_of_its_replica():
    """Ray binds arguments to parameters in another process, where no type checker looks."""
    model, preprocessor, encoder = Recorder(), Recorder(), Recorder()
    stages = remote_stages(model, preprocessor, encoder)
    file = KeptFiles("reference", "digest", 1)
    for files in ({}, {3: file}):
        await stages.preprocessor.prepare([], files, "key", 2, "tenant")
        await stages.preprocessor.open([], files, "key", 2)
    await stages.preprocessor.prepare_pages(OpenFile(PagedFile(()), file), [], 2, "tenant")
    await stages.encoder.encode(PixelsRef("item", "reference"), "tenant", 5.0)
    for media in ((), (ROWS,)):
        assert [update async for update in stages.language_model.generate(generation(), media)] == [LAST]
        await stages.language_model.embed(Pooling("one", EngineInput([1]), PoolingParams()), media)
    await stages.language_model.max_model_len()
    await stages.language_model.device()
    replicas = {
        LanguageModelReplica: model,
        PreprocessorReplica: preprocessor,
        VisionEncoderReplica: encoder,
    }
    for replica, handle in replicas.items():
        for name, args in handle.calls:
            bound = inspect.signature(getattr(replica, name)).bind(None, *args).arguments
            # Parameters of one type in the wrong order would be bound as well.
            assert bound.get("span", {}) == {}, name
            assert all(row is None for row in bound.get("arrays", ())), name
            assert bound.get("salt", "tenant") == "tenant" and bound.get("images", 2) == 2, name
            if name in ("prepare", "open"):
                kept = [replace(file, files=None) for _ in bound.get("files", ())]
                assert bound["caller"] == "key" and [entry for _, entry in bound["kept"]] == kept
                assert bound.get("files", ()) in ((), ("reference",))
    called = {name for name, _ in model.calls}
    assert called == {"hold", "generate", "updates", "embed", "max_model_len", "device"}
    assert {name for name, _ in preprocessor.calls} == {"prepare", "open", "prepare_pages"}


@pytest.mark.parametrize(("size", "given"), [(1 << 20, np.ndarray), ((1 << 20) + 1, str)])
async def test_large_arrays_that_came_by_a_line_are_put_into_the_store_on_a_thread(size, given):
    """Ray would copy them on the event loop, as arguments of a call."""
    here, makers = threading.get_ident(), []

    def put(array):
        makers.append(threading.get_ident())
        return "reference"

    handle, store = Recorder(), ObjectStore(put, 0.0)
    model, encoder = RemoteLanguageModel(handle, store), RemoteEncoder(handle, lambda: False, store)

    def brought():
        return Brought(np.zeros(size, np.uint8))

    rows = [RowsRef(RowsInfo("h", "float32"), brought()) for _ in range(2)]
    assert [update async for update in model.generate(generation(), rows[:1])] == [LAST]
    await model.embed(Pooling("one", EngineInput([1]), PoolingParams()), rows[1:])
    await encoder.encode(PixelsRef("item", brought()), "tenant", 5.0)
    passed = {name: args for name, args in handle.calls if name in ("hold", "embed", "encode")}
    assert [type(passed[name][place]) for name, place in (("hold", 4), ("embed", 3), ("encode", 1))] == [
        given
    ] * 3
    assert len(makers) == (3 if given is str else 0) and here not in makers


#: The ways by which arrays that came by a line go on by a call.
PASSING = {
    "encode": lambda handle, store, array: RemoteEncoder(handle, lambda: False, store).encode(
        PixelsRef("item", array), "tenant", 5.0
    ),
    "embed": lambda handle, store, array: RemoteLanguageModel(handle, store).embed(
        Pooling("one", EngineInput([1]), PoolingParams()), [RowsRef(RowsInfo("h", "float32"), array)]
    ),
    "hold": lambda handle, store, array: anext(
        RemoteLanguageModel(handle, store).generate(generation(), [RowsRef(RowsInfo("h", "float32"), array)])
    ),
}


@pytest.mark.parametrize("way", PASSING)
async def test_a_full_store_is_no_defect_and_frees_what_it_had_no_room_for(way, caplog):
    # Records of a test are kept, and with them the errors that they name.
    caplog.set_level(logging.CRITICAL, "ray.serve")
    found = []

    def put(array):
        raise ray.exceptions.ObjectStoreFullError("full")

    async def work():
        array = np.zeros((1 << 20) + 1, np.uint8)
        found.append(weakref.ref(array))
        await PASSING[way](Recorder(), ObjectStore(put), Brought(array))

    gc.disable()
    try:
        with pytest.raises(Unavailable, match="no room for more images"):
            await work()
        del work
        await wait_until(lambda: found[0]() is None, 10)
    finally:
        gc.enable()


@pytest.mark.parametrize("way", PASSING)
async def test_what_came_by_a_line_is_not_kept_while_its_call_lasts(way):
    found, called = [], asyncio.Event()

    async def lasting():
        called.set()
        await asyncio.Event().wait()

    handle = SimpleNamespace(
        **{way: SimpleNamespace(remote=lambda *_: asyncio.ensure_future(lasting()))},
        updates=Recorder().updates,
    )
    stage = SimpleNamespace(options=lambda **_: handle)

    def begin():
        array = np.zeros(1)
        found.append(weakref.ref(array))
        return asyncio.ensure_future(PASSING[way](stage, None, Brought(array)))

    task = begin()
    await asyncio.wait_for(called.wait(), 60)
    assert found[0]() is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_report_says_what_the_language_model_s_replica_has_encoded():
    handle = Recorder()
    handle.app_name, handle.deployment_name = "app", "LanguageModel"
    held = [Encoded("h", True, 0.25)]
    handle._answer = lambda name: answer(("b", held) if name == "hold" else (None, held))

    async def answer(found):
        return found

    stages = remote_stages(handle, None, handle)
    item = MediaItem("image", "h", 1, (1, 1, 1), (1, 1), (PlaceholderRun(0, 1, True),))
    rows = await stages.encoder.encode(PixelsRef(item, "pixels"), "tenant", 5.0)
    assert rows == RowsRef(PixelsInfo(item, "tenant", 5.0), "pixels") and not rows.cached and not handle.calls
    for ask in (
        lambda: anext(stages.language_model.generate(generation(), (rows,))),
        lambda: stages.language_model.embed(Pooling("one", EngineInput([1]), PoolingParams()), (rows,)),
    ):
        report = begin_report({}, lambda: "id")
        report.prepared([ItemReport(item, rows.cached, {"fetch": 0.5, "encode": 0.0})])
        await ask()
        assert report.media == [ItemReport(item, True, {"fetch": 0.5, "encode": 0.25})]
        assert report.seconds == {"fetch": 0.5, "encode": 0.25}


class FailingCall:
    """A call as Serve's: a future keeps its error, and the error's frames keep the call."""

    def __init__(self, *arguments):
        self._arguments = arguments
        self._future = concurrent.futures.Future()

    def __await__(self):
        return self._result().__await__()

    async def _result(self):
        try:
            raise ray.exceptions.OwnerDiedError("a", None, "b")
        except ray.exceptions.OwnerDiedError as error:
            self._future.set_exception(error)
        return await asyncio.wrap_future(self._future)

    def cancel(self):
        pass


async def test_what_a_lost_call_was_given_is_freed_at_once():
    """Objects in Ray's store stay there while an error refers to the frames that know their references."""
    handle = SimpleNamespace(encode=SimpleNamespace(remote=FailingCall))
    stage = RemoteEncoder(SimpleNamespace(options=lambda **_: handle), lambda: True)
    found = []

    async def work():
        pixels = SimpleNamespace(item=None, pixels=np.zeros(1))
        found.append(weakref.ref(pixels.pixels))
        return await all_or_none([stage.encode(pixels, "", 0.0), stage.encode(pixels, "", 0.0)])

    gc.disable()
    try:
        with pytest.raises(RowsLost):
            await work()
        await wait_until(lambda: all(reference() is None for reference in found), 10)
    finally:
        gc.enable()


async def test_what_a_misrouted_stream_was_given_is_freed_at_once():
    handle = Handle(lambda start: [Refusal(Misrouted("elsewhere"))])
    handle.held = SimpleNamespace(append=lambda _: None)
    found = []

    async def work():
        rows = np.zeros(1)
        found.append(weakref.ref(rows))
        media = [RowsRef(RowsInfo("h", "float32"), rows)]
        async with aclosing(RemoteLanguageModel(handle).generate(generation(), media)) as updates:
            await anext(updates)

    gc.disable()
    try:
        with pytest.raises(StageLost):
            await work()
        await wait_until(lambda: found[0]() is None, 10)
    finally:
        gc.enable()


@pytest.mark.parametrize("tries", [1, 99], ids=["carried on", "given up"])
@pytest.mark.parametrize(
    "item",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.OwnerDiedError("a", None, "b"),
        grpc_error(grpc.StatusCode.INTERNAL),
        asyncio.CancelledError(),
        Refusal(StageLost("stopped")),
    ],
    ids=lambda item: type(item).__name__,
)
async def test_what_a_lost_stream_was_given_is_freed_at_once(item, tries, caplog):
    # Records of a test are kept, and with them the errors that they name.
    caplog.set_level(logging.CRITICAL, "ray.serve")
    last = replace(LAST, deltas=[OutputDelta(0, "", [2], finish_reason="length")])
    handle = Handle(lambda start: [pack(UPDATE), item if start <= tries else pack(last)])
    handle.held = SimpleNamespace(append=lambda _: None)
    found = []

    async def encode():
        rows = np.zeros(1)
        found.append(weakref.ref(rows))
        return [RowsRef(RowsInfo("h", "float32"), rows)]

    async def work():
        patience = Patience(ReplayConfig(max_losses=2, pause_s=0.001))
        model = RemoteLanguageModel(handle)
        async with aclosing(carried_on(model, generation(), await encode(), encode, patience)) as updates:
            return [update async for update in updates]

    gc.disable()
    try:
        if tries == 1:
            assert len(await work()) == 3
        else:
            with pytest.raises(StageLost):
                await work()
        await wait_until(lambda: all(rows() is None for rows in found), 10)
    finally:
        gc.enable()


async def test_calls_of_a_full_stage_are_told_to_come_back_one_after_the_other():
    async def full():
        raise BackPressureError(num_queued_requests=1, max_queued_requests=1)

    handle = SimpleNamespace(encode=SimpleNamespace(remote=lambda *_: full()))
    stage = RemoteEncoder(SimpleNamespace(options=lambda **_: handle), lambda: True)
    waits = []
    for _ in range(40):
        with pytest.raises(Overloaded, match="wait for the encoder") as caught:
            await stage.encode(PixelsRef("item", "reference"), "", 0.0)
        waits.append(int(error_headers(caught.value)["Retry-After"]))
    assert waits[0] < 10 < waits[-1]
