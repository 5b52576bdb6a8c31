"""Replicas: requests wait for their streams, and refusals are returned."""

import asyncio
from typing import Any

import numpy as np
import pytest

from deployments.ray_serve.channel import Outboxes
from deployments.ray_serve.engine_process import EngineProcess
from deployments.ray_serve.held_requests import Held, HeldRequests
from deployments.ray_serve.packing import PixelsInfo, RowsInfo
from deployments.ray_serve.refusals import Misrouted, Refusal, answered, checked
from deployments.ray_serve.replicas import (
    LanguageModelReplica,
    PreprocessorReplica,
    VisionEncoderReplica,
)
from deployments.ray_serve.served_model import ServedModel
from deployments.stage_config import LanguageModelConfig
from deployments.stages import Generation
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.media.keys import KeptFiles
from engine.prompt import EmbeddedMedia, EngineInput, MediaItem, PlaceholderRun, PreparedMedia
from engine.sampling_params import SamplingParams

HELD = Held(
    Generation("one", EngineInput([1]), SamplingParams()),
    [EmbeddedMedia("h", np.zeros((2, 3), np.float32), "float32")],
)


async def test_held_requests_are_taken_once():
    held = HeldRequests()
    held.keep(HELD)
    assert held.take("one") is HELD and len(held) == 0
    for name in ("one", "other"):
        with pytest.raises(Misrouted):
            held.take(name)


async def test_held_requests_are_dropped_after_a_while():
    held = HeldRequests(0.0)
    held.keep(HELD)
    assert len(held) == 1
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.001, later.set)
    await asyncio.wait_for(later.wait(), 60)
    assert len(held) == 0


class Starting(LanguageModelReplica):
    def __del__(self) -> None:
        """Nothing was loaded."""


def test_a_process_that_hangs_is_given_up_well_before_ray_serve_gives_up_its_replica(monkeypatch):
    def start(*args: Any) -> None:
        given.append(args[-1])

    given: list[float] = []
    monkeypatch.setattr("deployments.ray_serve.replicas.prepare_process", lambda: None)
    monkeypatch.setattr(EngineProcess, "start", start)
    Starting(None, LanguageModelConfig(health_check_timeout_s=30.0), EngineConfig(model="model"))
    (patience_s,) = given
    # The replica's event loop may be late by seconds.
    assert 15 < patience_s <= 25


class Encoding(LanguageModelReplica):
    """A replica whose encoder doubles pixels, and has seen those of one tenant before."""

    def __init__(self) -> None:
        self._held, self._outboxes = HeldRequests(), Outboxes()
        self._stage = ServedModel(None, self._outboxes, self)

    def _name(self) -> str:
        return "a"

    async def encode(self, media: PreparedMedia, salt: str, asked: float) -> EmbeddedMedia:
        assert asked == 5.0
        if salt == "stranger":
            raise InvalidRequest("no", param="image")
        return EmbeddedMedia(media.item.hash, media.pixels * 2, "float32", cached=salt == "tenant")

    def __del__(self) -> None:
        """Nothing was loaded."""


async def test_a_replica_encodes_what_comes_as_pixels():
    replica, rows = Encoding(), np.ones((1, 2), np.float32)
    infos = [
        PixelsInfo(described("x"), "tenant", 5.0),
        RowsInfo("y", "float32"),
        PixelsInfo(described("z"), "", 5.0),
    ]
    name, encoded = await replica.hold(HELD.request, {}, "reader", infos, rows, rows * 3, rows * 5)
    assert name == "a" and sorted((each.hash, each.cached) for each in encoded) == [("x", True), ("z", False)]
    media = replica._held.take("one").media
    assert [(each.hash, each.rows[0, 0]) for each in media] == [("x", 2), ("y", 3), ("z", 10)]
    refusal = await replica.hold(
        HELD.request, {}, "reader", [PixelsInfo(described("x"), "stranger", 5.0)], rows
    )
    assert isinstance(refusal, Refusal) and refusal.error.param == "image" and not len(replica._held)


class Salted(PreprocessorReplica, VisionEncoderReplica):
    """A preprocessor and an encoder whose stage notes the salts that it gets."""

    def __init__(self) -> None:
        self.salts: list[str] = []
        self._stage = self._store = Stage(self.salts)

    def __del__(self) -> None:
        """Nothing was loaded."""


class Stage:
    """Of :class:`Salted`; its object store, too."""

    def __init__(self, salts: list[str]) -> None:
        self.salts = salts

    async def prepare(self, sources, files, caller, images, salt):
        self.salts.append(salt)
        return []

    async def prepare_pages(self, file, pages, images, salt):
        self.salts.append(salt)
        return []

    async def encode(self, media, salt, asked):
        assert asked == 5.0
        self.salts.append(salt)
        return EmbeddedMedia(media.item.hash, media.pixels, "float32")

    async def put(self, value):
        return value


async def test_replicas_pass_the_salt_on():
    replica = Salted()
    assert await replica.prepare([], "key", 2, "one", {}, []) == []
    assert await replica.prepare_pages([], 2, "two", {}, KeptFiles(None, "digest", 1), b"") == []
    checked(await replica.encode(described("x"), np.ones((1, 2), np.float32), "three", 5.0, {}))
    assert replica.salts == ["one", "two", "three"]


def described(name: str) -> MediaItem:
    return MediaItem("image", name, 1, (1, 1, 1), (1, 1), (PlaceholderRun(0, 1, True),))


async def test_a_refusal_is_a_result_and_a_bug_is_raised():
    async def work(error):
        raise error

    refusal = await answered(work(InvalidRequest("no", param="a")))
    assert isinstance(refusal, Refusal)
    with pytest.raises(InvalidRequest) as caught:
        checked(refusal)
    assert caught.value.param == "a"
    with pytest.raises(ZeroDivisionError):
        await answered(work(ZeroDivisionError()))
