"""Replicas of the ingress share the media that requests name by ``uuid``."""

import asyncio
import pickle
from types import SimpleNamespace

import pytest
import ray.exceptions

from deployments.ray_serve import references as replica
from deployments.ray_serve.stores import RemoteKeeper, RemoteReferences
from deployments.references import Owner, ReferenceConfig, ReferenceConflict, UnknownReference
from deployments.response_store import ResponseStore, StoredResponse
from deployments.stages import StageLost
from engine.media.keys import kept_files
from engine.media.source import MediaSource

ALICE = Owner("alice", "", "model")
PAYLOAD = "data:image/png;base64," + "A" * 10_000


class Handle:
    """A handle of the one replica, to which calls go as bytes."""

    def __init__(self, config: ReferenceConfig) -> None:
        self._replica = replica.ReferencesReplica(config)
        self.sent: list[bytes] = []
        self.dead = self.hangs = False

    def options(self, **_):
        return self

    def __getattr__(self, name):
        async def call(*args):
            if self.dead:
                raise ray.exceptions.ActorDiedError()
            if self.hangs:
                await asyncio.Future()
            self.sent.append(pickle.dumps(args))
            return pickle.loads(
                pickle.dumps(await getattr(self._replica, name)(*pickle.loads(self.sent[-1])))
            )

        return SimpleNamespace(remote=lambda *args: asyncio.ensure_future(call(*args)))


@pytest.fixture
def handle(monkeypatch):
    monkeypatch.setattr(replica, "prepare_process", lambda: None)
    return Handle(ReferenceConfig(max_items=2))


def image(uuid: str, index: int = 0, url: str | None = None) -> MediaSource:
    return MediaSource(index, f"messages[0].content[{index}]", url=url, uuid=uuid)


async def test_media_that_one_replica_keeps_are_found_by_another(handle):
    one, other = RemoteReferences(handle), RemoteReferences(handle)
    await one.keep(ALICE, image("a", url=PAYLOAD), kept_files([b"pixels"]))
    brought = image("", 0, PAYLOAD)
    resolved, files = await other.resolve(ALICE, [brought, image("a", 1)])
    assert resolved[0] is brought and resolved[1].index == 1 and not files.keys() - {1}
    assert files[1].files == [b"pixels"]
    assert max(map(len, handle.sent)) < 5_000
    with pytest.raises(UnknownReference) as error:
        await other.resolve(Owner("bob", "", "model"), [image("a", 3)])
    assert error.value.status == 404 and error.value.param == "messages[0].content[3]"
    with pytest.raises(ReferenceConflict):
        await other.keep(ALICE, image("a", url=PAYLOAD), kept_files([b"other pixels"]))
    with pytest.raises(UnknownReference):
        await other.lost(ALICE, [image("a")])
    with pytest.raises(UnknownReference):
        await one.resolve(ALICE, [image("a")])


async def test_requests_that_name_nothing_do_not_ask(handle):
    brought = [image("", 0, PAYLOAD), image("new", 1, PAYLOAD)]
    assert await RemoteReferences(handle).resolve(ALICE, brought) == (brought, {})
    assert not handle.sent


async def test_a_lost_store_fails_the_requests_alone_that_name_media(handle):
    references = RemoteReferences(handle)
    handle.dead = True
    await references.keep(ALICE, image("a", url=PAYLOAD), kept_files([b"pixels"]))
    with pytest.raises(StageLost):
        await references.resolve(ALICE, [image("a")])
    handle.dead = False
    with pytest.raises(UnknownReference):
        await references.resolve(ALICE, [image("a")])


async def test_no_answer_waits_for_a_store_that_hangs(handle, caplog):
    handle.hangs = True
    kept = RemoteReferences(handle, keep_s=0.01).keep(ALICE, image("a", url=PAYLOAD), kept_files([b"pixels"]))
    await asyncio.wait_for(kept, 60)
    assert "media of the uuid 'a' are not kept: The store of references has not answered" in caplog.text
    store = ResponseStore(RemoteKeeper(handle, keep_s=0.01))
    for keep in (store.put, store.update):
        caplog.clear()
        await asyncio.wait_for(keep(StoredResponse({"id": "resp_1"}, [], [])), 60)
        assert "the response resp_1 is not kept: The store of responses has not answered" in caplog.text
