"""An engine that can compute nothing more says so at once, whatever its threads wait for."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.errors import Unavailable
from engine.prompt import EngineInput
from engine.sampling_params import SamplingParams, StructuredSpec
from engine.watchdog import Watchdog
from tests.engine import tiny

LONG = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    return str(tiny.make_text(tmp_path_factory.mktemp("text"), "qwen2", max_position_embeddings=1024))


class Deaths:
    """Counts deaths, and waits for the first."""

    def __init__(self) -> None:
        self.count = 0
        self._came = threading.Event()

    def __call__(self, *_: object) -> None:
        self.count += 1
        self._came.set()

    def wait(self) -> None:
        assert self._came.wait(60), "the death was not noticed"


def engine_of(path: str, step_timeout_s: float) -> AsyncEngine:
    return AsyncEngine(
        EngineConfig(model=path, max_model_len=1000, kv_cache_bytes=4 << 20, step_timeout_s=step_timeout_s)
    )


def test_steps_in_time_are_let_be(monkeypatch):
    """Together they take longer than one step may."""
    clock, looks, deaths = SimpleNamespace(now=0.0), threading.Semaphore(0), Deaths()
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("engine.watchdog.time", clock)
    watchdog = Watchdog(looks.release, 0.2, deaths)
    for _ in range(8):
        with watchdog.step():
            clock.now += 0.15
            while looks.acquire(blocking=False):
                pass
            # The first look may have begun before; the second begins after it has ended.
            assert looks.acquire(timeout=60) and looks.acquire(timeout=60)
    watchdog.close()
    assert deaths.count == 0


def test_a_step_that_does_not_return_and_a_lost_process_are_noticed_once():
    hung, lost = Deaths(), Deaths()
    watchdog = Watchdog(lambda: None, 0.05, hung)
    with watchdog.step():
        hung.wait()

    def check() -> None:
        raise Unavailable("gone")

    other = Watchdog(check, 0.05, lost)
    lost.wait()
    for each in (watchdog, other):
        each.close()
    assert hung.count == lost.count == 1


async def test_a_hung_step_ends_what_runs_and_what_comes(path, monkeypatch):
    engine, deaths, release = engine_of(path, 60), Deaths(), threading.Event()
    engine.when_dead(deaths)
    updates = engine.generate("one", EngineInput([5, 6, 7]), LONG)
    await anext(updates)
    monkeypatch.setattr(engine._engine.core, "_schedule", lambda: release.wait(60) and None)
    # Only now, so that no step before is too slow.
    engine._watchdog._limit_s = 0.5
    with pytest.raises(Unavailable, match="not returned"):
        async for _ in updates:
            pass
    deaths.wait()
    with pytest.raises(Unavailable, match="not returned"):
        engine.check_health()
    with pytest.raises(Unavailable):
        await anext(engine.generate("two", EngineInput([5]), LONG))
    release.set()
    engine.shutdown()
    assert deaths.count == 1
    late = Deaths()
    engine.when_dead(late)
    assert late.count == 1


async def test_a_thread_that_raises_is_a_death_and_a_shutdown_is_none(path, monkeypatch):
    engine, deaths = engine_of(path, 60), Deaths()
    engine.when_dead(deaths)

    def broken() -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(engine._engine.core, "step", broken)
    with pytest.raises(Unavailable, match="planted"):
        await anext(engine.generate("one", EngineInput([5]), LONG))
    deaths.wait()
    engine.shutdown()
    other, none = engine_of(path, 60), Deaths()
    other.when_dead(none)
    other.shutdown()
    assert (deaths.count, none.count) == (1, 0)


@pytest.mark.parametrize("end", ["dies", "is shut down"])
async def test_an_engine_that_stops_while_a_grammar_is_compiled_answers(path, monkeypatch, end):
    engine = engine_of(path, 60)

    async def compile_async(spec) -> None:
        if end == "dies":
            engine._die(RuntimeError("planted"))
        else:
            await asyncio.to_thread(engine.shutdown)

    monkeypatch.setattr(engine._engine.grammars, "compile_async", compile_async)
    monkeypatch.setattr(engine._engine.requests, "_grammar", lambda request: None)
    params = SamplingParams(structured=StructuredSpec(kind="regex", text="a"), max_tokens=5)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(anext(engine.generate("one", EngineInput([5]), params)), 60)
    engine.shutdown()


async def test_an_encoder_that_hangs_dies(tmp_path, monkeypatch):
    config = EngineConfig(model=str(tiny.make_qwen2_vl(tmp_path)), step_timeout_s=0.2)
    engine, deaths, release = EncoderEngine.load(config), Deaths(), threading.Event()
    engine.when_dead(deaths)
    from engine.model_parts import load_media_processor

    processor = load_media_processor(config)
    assert processor is not None
    monkeypatch.setattr(engine._encoder, "encode", lambda media: release.wait(60) and [])
    with pytest.raises(Unavailable, match="not returned"):
        await engine.encode_async(processor.prepare(tiny.picture(24, 24)))
    deaths.wait()
    with pytest.raises(Unavailable):
        engine.check_health()
    release.set()
    engine.shutdown()
    assert deaths.count == 1
