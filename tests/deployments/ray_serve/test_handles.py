"""Stages behind handles: calls, streams and failures, with replicas that a test plays."""

import asyncio
from types import SimpleNamespace

import pytest
import ray.exceptions

from deployments.ray_serve.failures import Misrouted, Refusal
from deployments.ray_serve.handles import RemoteEncoder, RemoteLanguageModel, RemotePreprocessor
from deployments.ray_serve.handoff import PixelsRef, RowsInfo, RowsRef, pack
from deployments.stages import Generation, StageLost
from engine.errors import InvalidRequest, SightlineError, Unavailable
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams

UPDATE = StreamUpdate("one", [OutputDelta(0, "token", [1])], Usage())
ROWS = RowsRef(RowsInfo("h", "float32"), None)


class Handle:
    """A deployment handle. ``generate`` yields what ``play`` returns for each start of a stream, from 1."""

    def __init__(self, play):
        self.play = play
        self.starts: list[dict] = []
        self.cancelled = 0
        self.hold = SimpleNamespace(remote=self._hold)
        self.generate = SimpleNamespace(remote=self._generate)
        self._options: dict = {}

    def options(self, **options):
        self._options = options
        return self

    def _generate(self, request, has_media):
        self.starts.append(self._options | {"has_media": has_media})
        return Response(self, self.play(len(self.starts)))

    async def _hold(self, request_id, infos, *rows):
        return "b"


class Response:
    def __init__(self, handle, items):
        self._handle, self._items = handle, items

    async def __aiter__(self):
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self):
        self._handle.cancelled += 1


def generation(**params) -> Generation:
    return Generation("one", EngineInput([1]), SamplingParams(**params))


async def run(handle, media=(ROWS,), **params):
    return [update async for update in RemoteLanguageModel(handle).generate(generation(**params), media)]


@pytest.mark.parametrize("misses", [0, 2])
async def test_a_misrouted_stream_is_started_again(misses):
    handle = Handle(lambda start: [Refusal(Misrouted("elsewhere")) if start <= misses else pack(UPDATE)])
    assert await run(handle) == [UPDATE]
    assert [options["session_id"] for options in handle.starts] == ["b"] * (misses + 1)
    assert all(options["has_media"] and not options["_by_reference"] for options in handle.starts)


async def test_a_stream_that_never_finds_its_replica_ends():
    handle = Handle(lambda start: [Refusal(Misrouted("elsewhere"))])
    with pytest.raises(Unavailable):
        await run(handle)
    assert 1 < len(handle.starts) < 9


async def test_large_items_and_prompts_without_media():
    handle = Handle(lambda start: [pack(UPDATE)])
    assert await run(handle, (), prompt_logprobs=5) == [UPDATE]
    assert handle.starts == [{"stream": True, "_by_reference": True, "session_id": "", "has_media": False}]


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (Refusal(InvalidRequest("no")), InvalidRequest),
        (ray.exceptions.ActorDiedError(), StageLost),
        (ray.exceptions.ActorUnavailableError("gone", None), StageLost),
        (ZeroDivisionError(), SightlineError),
    ],
)
async def test_a_stream_s_failure_is_reported_and_not_repeated(item, kind):
    handle = Handle(lambda start: [pack(UPDATE), item])
    stream = RemoteLanguageModel(handle).generate(generation(), ())
    assert await anext(stream) == UPDATE
    with pytest.raises(SightlineError) as caught:
        await anext(stream)
    assert type(caught.value) is kind and len(handle.starts) == 1


async def test_a_stream_that_is_closed_early_is_cancelled():
    handle = Handle(lambda start: [pack(UPDATE)] * 3)
    stream = RemoteLanguageModel(handle).generate(generation(), ())
    await anext(stream)
    await stream.aclose()
    assert handle.cancelled == 1


async def test_the_salt_reaches_the_encoder_s_replica():
    seen = []

    async def encode(item, pixels, salt):
        seen.append((item, pixels, salt))

    handle = SimpleNamespace(encode=SimpleNamespace(remote=encode))
    stage = RemoteEncoder(SimpleNamespace(options=lambda **_: handle))
    await stage.encode(PixelsRef("item", "reference"), "tenant")
    assert seen == [("item", "reference", "tenant")]


async def test_a_cancelled_call_is_cancelled_in_the_replica_too():
    cancelled = []

    class Call:
        def __await__(self):
            future = asyncio.get_running_loop().create_future()
            return future.__await__()

        def cancel(self):
            cancelled.append(True)

    handle = SimpleNamespace(prepare=SimpleNamespace(remote=lambda sources: Call()))
    stage = RemotePreprocessor(SimpleNamespace(options=lambda **_: handle))
    task = asyncio.ensure_future(stage.prepare([]))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled
