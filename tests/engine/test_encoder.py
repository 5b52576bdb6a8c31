"""The encoder engine: batching, remembering, sharing and failing alone."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch

from engine import encoder as encoder_module
from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.errors import CheckpointError, InvalidRequest, Unavailable
from engine.families.qwen2_vl.family import FAMILY
from engine.prompt import EmbeddedMedia, MediaItem, PreparedMedia
from engine.turns import Turns
from tests.engine.tiny import make_qwen2_vl, make_text, picture, reference_inputs, reference_model
from tests.serving import wait_until

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen2_vl(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def processor(path):
    checkpoint = Checkpoint.open(str(path))
    return FAMILY.media_processor(checkpoint, FAMILY.parse(checkpoint), {})


@pytest.fixture
def engine(path):
    engine = EncoderEngine.load(EngineConfig(model=str(path), device="cpu"), max_batch_cost=200)
    yield engine
    engine.shutdown()


class GatedEncoder:
    """Stands in for a tower: rows are the item's first pixel. Holds each launch until it is let go."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[str]] = []

    def cost(self, item: MediaItem) -> int:
        return item.num_tokens

    def encode(self, media: Sequence[PreparedMedia]) -> list[torch.Tensor]:
        self.entered.release()
        self.gate.acquire()
        self.batches.append([entry.item.hash for entry in media])
        if any(entry.item.hash.startswith("bad") for entry in media):
            raise InvalidRequest("bad pixels", param="image")
        return [
            torch.full((entry.item.num_tokens, 2), float(entry.pixels.flat[0])).bfloat16() for entry in media
        ]

    async def wait_until_running(self) -> None:
        await asyncio.to_thread(self.entered.acquire)

    def release(self, launches: int = 100) -> None:
        self.gate.release(launches)


def item(name: str, rows: int = 4, value: int = 7) -> PreparedMedia:
    from engine.prompt import PlaceholderRun

    described = MediaItem("image", name, rows, (1, rows, 1), (1, 1), (PlaceholderRun(0, rows, True),))
    return PreparedMedia(described, np.full((1, 1, 3), value, np.uint8))


@pytest.fixture
def gated():
    encoder = GatedEncoder()
    engine = EncoderEngine(encoder, CPU, max_batch_cost=10, cache_bytes=64)
    yield encoder, engine
    encoder.release()
    engine.shutdown()


async def test_rows_equal_transformers(path, processor, engine):
    pictures = [picture(60, 44), picture(8, 90, 1), picture(200, 200, 2)]
    reference = reference_model(path).model
    results = await asyncio.gather(*(engine.encode_async(processor.prepare(p)) for p in pictures))
    for image, result in zip(pictures, results, strict=True):
        inputs = reference_inputs(path, "<|image_pad|>", [image])
        with torch.inference_mode():
            expected = reference.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            ).pooler_output[0]
        assert result.dtype == "float32" and result.rows.dtype == np.float32
        np.testing.assert_allclose(result.rows, expected.numpy(), atol=1e-4, rtol=0)


async def test_batched_and_alone_are_the_same(processor, engine):
    media = [processor.prepare(picture(8 + 9 * n, 90 - 5 * n, n)) for n in range(6)]
    together = engine.encode(media)
    for entry, rows in zip(media, together, strict=True):
        torch.testing.assert_close(rows, engine.encode([entry])[0], atol=1e-5, rtol=0)
    assert engine.metrics()["batches"] < 12


async def test_what_gathers_during_a_launch_makes_the_next(gated):
    encoder, engine = gated
    tasks = [asyncio.create_task(engine.encode_async(item("a")))]
    await encoder.wait_until_running()
    # 4 + 4 fit into ten, the third doesn't; what is too large for any launch goes alone.
    tasks += [asyncio.create_task(engine.encode_async(item(name))) for name in "bcd"]
    tasks.append(asyncio.create_task(engine.encode_async(item("large", rows=30))))
    await asyncio.sleep(0)
    assert engine.metrics()["waiting"] == 4 and engine.metrics()["pending_rows"] == 4 * 4 + 30
    encoder.release()
    results = await asyncio.gather(*tasks)
    assert engine.metrics()["pending_rows"] == 0
    assert encoder.batches == [["a"], ["b", "c"], ["d"], ["large"]]
    assert [len(result.rows) for result in results] == [4, 4, 4, 4, 30]
    assert results[0].dtype == "bfloat16" and results[0].rows.dtype == np.uint16
    assert torch.from_numpy(results[0].rows.view(np.int16).copy()).view(torch.bfloat16).eq(7).all()


async def test_equal_items_are_encoded_once(gated):
    encoder, engine = gated
    tasks = [asyncio.create_task(engine.encode_async(item("a"))) for _ in range(3)]
    await encoder.wait_until_running()
    encoder.release()
    first, *others = await asyncio.gather(*tasks)
    assert all(other is first for other in others)
    again = await engine.encode_async(item("a"))
    assert again.rows is first.rows and again.cached and not first.cached
    assert encoder.batches == [["a"]]
    assert (engine.metrics()["joined"], engine.metrics()["cache_hits"]) == (2, 1)
    with pytest.raises(ValueError, match="read-only"):
        first.rows[0] = 0


async def test_tenants_share_nothing(gated):
    encoder, engine = gated
    encoder.release()
    await engine.encode_async(item("a"), salt="one")
    await engine.encode_async(item("a"), salt="two")
    assert len(encoder.batches) == 2


async def test_cache_keeps_to_its_budget(gated):
    encoder, engine = gated
    encoder.release()
    for name in "abcd":  # 4 rows of two bfloat16 are 16 bytes; four fill the budget
        await engine.encode_async(item(name))
    await engine.encode_async(item("a"))
    await engine.encode_async(item("e"))  # drops b, the least recently used
    launched = len(encoder.batches)
    await engine.encode_async(item("a"))
    assert len(encoder.batches) == launched
    await engine.encode_async(item("b"))
    assert len(encoder.batches) == launched + 1
    await engine.encode_async(item("huge", rows=40))
    assert engine.metrics()["cached_items"] == 4 and engine.metrics()["cached_bytes"] == 64


async def test_a_bad_item_fails_alone(gated):
    encoder, engine = gated
    first = asyncio.create_task(engine.encode_async(item("first")))
    await encoder.wait_until_running()
    names = ["good", "bad"]
    tasks = [asyncio.create_task(engine.encode_async(item(name))) for name in names]
    await asyncio.sleep(0)
    encoder.release()
    good, bad = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    assert encoder.batches[1] == names
    assert good.rows.shape == (4, 2)
    assert isinstance(bad, InvalidRequest)
    # A failure isn't remembered.
    with pytest.raises(InvalidRequest):
        await engine.encode_async(item("bad"))
    assert engine.metrics()["waiting"] == 0


async def test_an_item_without_a_cost_fails_alone(gated, monkeypatch):
    encoder, engine = gated
    cost = encoder.cost

    def planted(described: MediaItem) -> int:
        if described.hash == "bad":
            raise ValueError("planted")
        return cost(described)

    monkeypatch.setattr(encoder, "cost", planted)
    encoder.release()
    results = await asyncio.gather(
        *(engine.encode_async(item(name)) for name in ("good", "bad", "other")), return_exceptions=True
    )
    assert [type(result) for result in results] == [EmbeddedMedia, ValueError, EmbeddedMedia]
    engine.check_health()
    assert engine.metrics()["waiting"] == 0
    with pytest.raises(ValueError, match="planted"):
        engine.encode([item("good"), item("bad")])


async def test_an_item_whose_rows_cannot_be_handed_on_fails_alone(gated, monkeypatch):
    encoder, engine = gated
    embedded = encoder_module._embedded

    def planted(content_hash: str, rows: torch.Tensor) -> EmbeddedMedia:
        if content_hash == "odd":
            raise ValueError("planted")
        return embedded(content_hash, rows)

    monkeypatch.setattr(encoder_module, "_embedded", planted)
    encoder.release()
    results = await asyncio.gather(
        *(engine.encode_async(item(name)) for name in ("good", "odd", "other")), return_exceptions=True
    )
    assert [type(result) for result in results] == [EmbeddedMedia, ValueError, EmbeddedMedia]
    engine.check_health()


async def test_a_thread_that_dies_fails_all_and_is_noticed(gated, monkeypatch):
    encoder, engine = gated
    first = asyncio.create_task(engine.encode_async(item("first")))
    await encoder.wait_until_running()
    others = [asyncio.create_task(engine.encode_async(item(name))) for name in "abcd"]
    await asyncio.sleep(0)
    engine.check_health()
    monkeypatch.setattr(engine, "_launch", lambda media: (_ for _ in ()).throw(SystemExit("planted")))
    encoder.release()
    assert len((await first).rows) == 4
    results = await asyncio.gather(*others, return_exceptions=True)
    assert all(isinstance(result, Unavailable) for result in results)
    with pytest.raises(Unavailable, match="planted"):
        engine.check_health()
    with pytest.raises(Unavailable, match="planted"):
        await engine.encode_async(item("late"))


async def test_real_pixels_that_lie_fail_alone(processor, engine):
    good, other = processor.prepare(picture(60, 44)), processor.prepare(picture(16, 64))
    lying = PreparedMedia(other.item, good.pixels)
    results = await asyncio.gather(
        engine.encode_async(good), engine.encode_async(lying), return_exceptions=True
    )
    assert results[0].rows.shape == (good.item.num_tokens, 64)
    assert isinstance(results[1], InvalidRequest)


async def test_cancelled_callers(gated):
    encoder, engine = gated
    first = asyncio.create_task(engine.encode_async(item("first")))
    await encoder.wait_until_running()
    lonely = asyncio.create_task(engine.encode_async(item("lonely")))
    leaving, staying = (asyncio.create_task(engine.encode_async(item("shared"))) for _ in range(2))
    await asyncio.sleep(0)
    for task in (lonely, leaving):
        task.cancel()
    await asyncio.gather(lonely, leaving, return_exceptions=True)
    # Nothing is kept of the one that nobody waits for any more.
    found = engine.metrics()
    assert (found["waiting"], found["pending_rows"]) == (1, 8)
    encoder.release()
    assert len((await staying).rows) == 4
    await first
    assert encoder.batches == [["first"], ["shared"]]
    # The one that was dropped can be asked for again.
    assert len((await engine.encode_async(item("lonely"))).rows) == 4


async def test_shutdown_refuses_what_waits(gated):
    encoder, engine = gated
    running = asyncio.create_task(engine.encode_async(item("running")))
    await encoder.wait_until_running()
    waiting = asyncio.create_task(engine.encode_async(item("waiting")))
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(engine.shutdown))
    with pytest.raises(Unavailable):
        await waiting
    encoder.release()
    await closing
    assert len((await running).rows) == 4
    with pytest.raises(Unavailable):
        await engine.encode_async(item("late"))
    engine.shutdown()


async def test_rests_between_launches():
    encoder = GatedEncoder()
    encoder.release()
    for duty_cycle, least in ((1.0, 0.0), (0.25, 3.0)):
        engine = EncoderEngine(encoder, CPU, cache_bytes=0, duty_cycle=duty_cycle)
        for name in "abc":
            await engine.encode_async(item(name))
        engine.shutdown()
        counters = engine.metrics()
        assert counters["batches"] == 3 and counters["rest_seconds"] >= least * counters["seconds"]
        assert (counters["rest_seconds"] == 0) == (duty_cycle == 1)


def _noted(notes: list[float], note: float, work: Callable[[], None]) -> None:
    notes.append(note)
    work()


async def test_rests_between_the_pieces_of_a_launch(path, processor, monkeypatch):
    monkeypatch.setattr("engine.vision.transformer._PIECE", 1)
    config, media = EngineConfig(model=str(path), device="cpu"), processor.prepare(picture(60, 44))
    rested: list[float] = []
    for duty_cycle in (1.0, 0.5):
        engine = EncoderEngine.load(config, cache_bytes=0, duty_cycle=duty_cycle)
        monkeypatch.setattr(engine, "_rest", partial(_noted, rested, duty_cycle, engine._rest))
        rows = (await engine.encode_async(media)).rows
        engine.shutdown()
        np.testing.assert_allclose(rows, engine.encode([media])[0].numpy(), atol=1e-5)
    layers = len(engine._encoder.tower.blocks)
    assert layers > 1 and rested == [1.0, *[0.5] * layers]


async def test_pieces_make_way_for_an_engine_unless_many_items_wait(path, processor, monkeypatch):
    monkeypatch.setattr("engine.vision.transformer._PIECE", 1)
    monkeypatch.setattr("engine.encoder._TOGETHER", 1)
    waits: list[int] = []
    turns = Turns()
    turns.has_steps = True

    class Event:
        def synchronize(self) -> None:
            waits.append(len(engine._queue))

        def query(self) -> bool:
            self.synchronize()
            return True

    monkeypatch.setattr("engine.encoder.record_event", lambda *_, **__: Event())
    config = EngineConfig(model=str(path), device="cpu")
    engine = EncoderEngine.load(config, max_batch_cost=1, turns=turns)
    # The thread takes nothing before all have come.
    with engine._changed:
        made = [engine.encode_async(processor.prepare(picture(60, 44, n))) for n in range(5)]
        tasks = [asyncio.ensure_future(each) for each in made]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    engine.shutdown()
    layers = len(engine._encoder.tower.blocks)
    assert waits == [4, 3, *[2] * layers, *[1] * layers, *[0] * layers]


async def test_a_crowd_is_encoded_in_several_launches_between_two_steps(monkeypatch):
    waits: list[int] = []
    turns, told = Turns(), []

    class Event:
        def synchronize(self) -> None:
            waits.append(len(encoder.batches))
            told.append(turns.crowded)

    monkeypatch.setattr("engine.encoder.record_event", lambda *_, **__: Event())
    monkeypatch.setattr("engine.encoder._TOGETHER", 16)
    encoder = GatedEncoder()
    encoder.release()
    engine = EncoderEngine(encoder, CPU, max_batch_cost=4, cache_bytes=0, turns=turns)
    with engine._changed:
        tasks = [asyncio.ensure_future(engine.encode_async(item(name))) for name in "abcdefghi"]
        await asyncio.sleep(0)
    rows = await asyncio.gather(*tasks)
    engine.shutdown()
    assert [each.hash for each in rows] == list("abcdefghi") and waits == [4, 8, 9]
    assert told == [True, True, False]
    assert encoder.batches == [[name] for name in "abcdefghi"]


async def test_items_that_can_still_be_in_time_go_first():
    encoder, now = GatedEncoder(), time.time()
    engine = EncoderEngine(encoder, CPU, max_batch_cost=8, cache_bytes=0, first_token_goal_s=3600.0)
    tasks = [asyncio.ensure_future(engine.encode_async(item("running"), asked=now))]
    await encoder.wait_until_running()
    # A goal of an hour, of which some must be left for the prompt: two hours ago is late, now is not.
    asked = {"late": now - 7200, "later": now - 7100, "old": now - 60, "new": now, "unknown": None}
    tasks += [asyncio.ensure_future(engine.encode_async(item(name), asked=at)) for name, at in asked.items()]
    await asyncio.sleep(0)
    encoder.release()
    await asyncio.gather(*tasks)
    assert encoder.batches == [["running"], ["old", "new"], ["unknown", "late"], ["later"]]
    assert engine.metrics()["late"] == 2 and engine.metrics()["waiting"] == 0
    engine.shutdown()


async def test_a_shutdown_ends_a_rest():
    encoder = GatedEncoder()
    encoder.release()
    engine = EncoderEngine(encoder, CPU, duty_cycle=1e-12)
    await engine.encode_async(item("a"))
    await asyncio.to_thread(engine.shutdown)
    with pytest.raises(Unavailable):
        await engine.encode_async(item("b"))


def test_dummy_weights_need_no_weight_file(path, processor, tmp_path):
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    config = EngineConfig(model=str(tmp_path), device="cpu", load_format="dummy", seed=3)
    media = processor.prepare(picture(60, 44))
    one, two = (EncoderEngine.load(config).encode([media])[0] for _ in range(2))
    assert torch.equal(one, two) and one.isfinite().all() and one.std() > 0
    other = EncoderEngine.load(config.model_copy(update={"seed": 4})).encode([media])[0]
    assert not torch.equal(one, other)


def test_text_models_have_no_encoder(tmp_path):
    make_text(tmp_path, "llama")
    with pytest.raises(CheckpointError, match="no vision part"):
        EncoderEngine.load(EngineConfig(model=str(tmp_path), device="cpu"))


async def test_an_idle_engine_holds_no_pixels(gated):
    """Neither those that it has encoded nor those that it could not."""
    encoder, engine = gated
    for name in ("good", "bad"):
        media = item(name)
        pixels = weakref.ref(media.pixels)
        encoder.release()
        try:
            await engine.encode_async(media)
        except InvalidRequest:
            assert name == "bad"
        del media
        await wait_until(lambda pixels=pixels: pixels() is None)
