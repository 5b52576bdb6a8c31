"""Streams reach the replica that holds their embeddings, or are told that they did not."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from deployments import language_model, pipeline
from deployments.errors import Misrouted
from deployments.handoff import Generation, RowsInfo, RowsRef, pack
from deployments.language_model import LanguageModel
from deployments.pipeline import Pipeline, Prompt
from deployments.routing import SessionRouter
from engine.errors import Unavailable
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.sampling_params import SamplingParams


def replicas(*names):
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


def chosen(session, among):
    router = object.__new__(SessionRouter)
    request = SimpleNamespace(metadata=SimpleNamespace(session_id=session))
    (found,) = asyncio.run(router.choose_replicas(among, request))
    return {replica.replica_id.unique_id for replica in found}


def test_a_session_s_replica_is_the_only_choice():
    among = replicas("a", "b", "c")
    assert chosen("b", among) == {"b"}
    assert all(len(chosen(session, among)) == 2 for session in ("", "gone"))
    assert chosen("gone", replicas("a")) == {"a"}


def test_what_is_held_is_let_go_after_a_while(monkeypatch):
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"))
    monkeypatch.setattr(language_model.serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(language_model, "HOLD_S", 0.0)
    model, rows = SimpleNamespace(_held={}), np.zeros((2, 3), np.float32)

    async def hold():
        assert await LanguageModel.hold(model, "one", [RowsInfo("h", "float32")], rows) == "a"
        assert [media.hash for media in model._held["one"]] == ["h"]
        # What is due later comes later.
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.001, later.set)
        await asyncio.wait_for(later.wait(), 10)

    asyncio.run(hold())
    assert not model._held


def test_embeddings_that_are_elsewhere_are_missed():
    async def ask():
        request = Generation("one", None, SamplingParams(), has_media=True)
        return [update async for update in LanguageModel.generate(SimpleNamespace(_held={}), request)]

    with pytest.raises(Misrouted):
        asyncio.run(ask())


@pytest.mark.parametrize(("misses", "served"), [(0, True), (2, True), (9, False)])
def test_a_misrouted_stream_is_begun_again(monkeypatch, misses, served):
    sessions, sizes = [], []
    update = StreamUpdate("one", [OutputDelta(0, "token", [1])], Usage())

    @asynccontextmanager
    async def stream(handle, method, request, replica="", large=False):
        sizes.append(large)

        async def items():
            sessions.append(replica)
            if len(sessions) <= misses:
                raise Misrouted("elsewhere")
            yield pack(update)

        yield items()

    async def hold(request_id, infos, *rows):
        return "b"

    monkeypatch.setattr(pipeline, "stream", stream)
    one = object.__new__(Pipeline)
    one._language_model = SimpleNamespace(hold=SimpleNamespace(remote=hold))
    prompt = Prompt(None, (RowsRef(RowsInfo("h", "float32"), None),))

    async def run(**params):
        return [update async for update in one.generate("one", prompt, SamplingParams(**params))]

    if served:
        assert asyncio.run(run()) == [update]
        assert sessions == ["b"] * (misses + 1) and not any(sizes)
        assert asyncio.run(run(prompt_logprobs=5)) == [update] and sizes[-1]
    else:
        with pytest.raises(Unavailable):
            asyncio.run(run())
        assert len(sessions) < misses
