"""No exception of one request's work ends the engine or changes another request's answer."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engine import LLM
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.errors import RequestFailed, SightlineError
from engine.frontend import Frontend, PreparedPrompt
from engine.loading import LoadedEngine, load_engine
from engine.outputs import StreamUpdate, merge_updates
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams, StructuredSpec
from tests.engine import tiny
from tests.engine.faults import ATTRIBUTED, SHARED, Faults, PlannedFault
from tests.engine.same import assert_same_logprobs

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = ["hello world", "describe this image in detail please", "a red square on a blue background 0 1 2 3 4"]
SIZES = [(24, 24), (40, 16)]
#: What requests ask for; each with texts and images of its own.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "logprobs": 1},
    "random": {"temperature": 1.0, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5},
    "scored": {"temperature": 0.0, "prompt_logprobs": 1},
    "constrained": {
        "temperature": 0.0,
        "structured": StructuredSpec(kind="regex", text="(the|quick|brown| |a)*"),
    },
    "two": {"temperature": 1.0, "seed": 3, "n": 2},
    # Runs of tokens that the grammar alone decides, with a choice between each and the next.
    "forced": {
        "temperature": 0.0,
        "structured": StructuredSpec(kind="regex", text="((the|a) quick brown fox jumps over )+"),
    },
}
#: Settings that change how a schedule runs: blocks are few, so that requests are preempted.
ENGINES = [
    {"block_size": 4, "num_kv_blocks": 44, "max_num_batched_tokens": 23, "max_num_seqs": 5, "run_ahead": 1},
    {"block_size": 4, "num_kv_blocks": 60, "max_num_batched_tokens": 70, "max_num_seqs": 6, "run_ahead": 3},
    {"block_size": 8, "num_kv_blocks": 24, "max_num_batched_tokens": 40, "max_num_seqs": 4, "run_ahead": 0},
]
ROOM = 80


@dataclass(frozen=True)
class Ask:
    """One request: what it shows and what it asks for."""

    kind: str
    text: int = 0
    images: tuple[int, ...] = ()
    tokens: int = 8

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(**{"max_tokens": self.tokens, **KINDS[self.kind]})


@dataclass
class Bench:
    """Engines over one tiny model, and what each request gives alone."""

    path: str
    front: Frontend
    encoder: LLM
    engines: list[LoadedEngine]
    _prepared: dict[tuple[int, tuple[int, ...]], tuple[PreparedPrompt, list]] = field(default_factory=dict)
    _alone: dict[Ask, StreamUpdate] = field(default_factory=dict)

    def group(self, engine: LoadedEngine, key: str, ask: Ask) -> RequestGroup:
        prompt, rows = self._prepare(ask.text, ask.images)
        return engine.requests.generation(key, prompt.inputs, ask.params, rows)

    def alone(self, ask: Ask) -> StreamUpdate:
        if ask not in self._alone:
            (result,) = drive(self, self.engines[-1], {"alone": ask}).values()
            assert isinstance(result, StreamUpdate)
            self._alone[ask] = result
        return self._alone[ask]

    def _prepare(self, text: int, images: tuple[int, ...]) -> tuple[PreparedPrompt, list]:
        if (text, images) not in self._prepared:
            shown = [tiny.picture(*SIZES[i], seed=i) for i in images]
            entry = {"prompt": TEXTS[text] + IMAGE * len(shown), "multi_modal_data": {"image": shown}}
            prompt = self.front.from_prompt(entry)
            rows = list(self.encoder._encoder.encode(prompt.media)) if prompt.media else []
            self._prepared[text, images] = prompt, rows
        return self._prepared[text, images]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    path = str(tiny.make_qwen2_vl(tmp_path_factory.mktemp("faults"), seed=9))
    # The last engine is kept free of faults.
    settings = [*ENGINES, {"max_num_seqs": 2, "enable_prefix_caching": False}]
    engines = [load_engine(EngineConfig(model=path, max_model_len=ROOM, **kind)) for kind in settings]
    front = Frontend.load(EngineConfig(model=path, max_model_len=ROOM))
    return Bench(path, front, LLM(path, max_model_len=ROOM, kv_cache_bytes=1 << 20), engines)


def drive(
    bench: Bench,
    engine: LoadedEngine,
    asks: dict[str, Ask],
    arrivals: dict[str, int] | None = None,
    aborts: dict[str, int] | None = None,
) -> dict[str, StreamUpdate | SightlineError]:
    """Run requests to their ends, as the engine's threads do; what each gave in all, or its error.

    Args:
        arrivals: step at which a request comes; 0 if it isn't named.
        aborts: step at which a request is aborted.
    """
    results: dict[str, StreamUpdate | SightlineError] = {}
    groups: dict[str, RequestGroup] = {}
    core, outputs = engine.core, engine.outputs
    for step in range(5000):
        for key in [key for key in asks if (arrivals or {}).get(key, 0) == step]:
            groups[key] = bench.group(engine, key, asks[key])
            outputs.add(groups[key])
            for request in groups[key].requests:
                core.add(request)
        for key in [key for key, when in (aborts or {}).items() if when == step and key in groups]:
            outputs.remove(groups[key])
            for request in groups[key].requests:
                core.abort(request)
        updates, stopped = outputs.process(core.step())
        for request in stopped:
            core.abort(request)
        for group, result in updates:
            earlier = results.get(group.id)
            assert not isinstance(earlier, SightlineError), "nothing comes after an error"
            if isinstance(earlier, StreamUpdate) and isinstance(result, StreamUpdate):
                result = merge_updates(earlier, result)
            assert isinstance(result, StreamUpdate | SightlineError)
            results[group.id] = result
        if len(groups) == len(asks) and not core.has_work and not outputs.num_groups:
            break
    core.check_integrity()
    return results


def assert_equal(found: StreamUpdate | SightlineError, wanted: StreamUpdate) -> None:
    """Everything an output carries, log-probabilities within a tolerance."""
    assert isinstance(found, StreamUpdate), found
    assert found.finished and len(found.deltas) == len(wanted.deltas)
    for ours, theirs in zip(sorted(found.deltas, key=_index), sorted(wanted.deltas, key=_index), strict=True):
        assert replace(ours, logprobs=None) == replace(theirs, logprobs=None)
        assert_same_logprobs(ours.logprobs, theirs.logprobs)
    assert_same_logprobs(found.prompt_logprobs, wanted.prompt_logprobs)
    assert replace(found.usage, cached_tokens=0) == replace(wanted.usage, cached_tokens=0)


def _index(delta: Any) -> int:
    return delta.index


ASKS = {
    "a": Ask("greedy", 2, (0,), tokens=16),
    "bad": Ask("scored", 1, (1,)),
    "b": Ask("constrained", 0, (0, 1)),
    "c": Ask("two", 2, (), tokens=20),
    "d": Ask("scored", 1, (1,), tokens=12),
    "e": Ask("random", 0, (0,)),
}


@pytest.mark.parametrize("kind", range(len(ENGINES)))
@pytest.mark.parametrize("stage", ATTRIBUTED)
def test_a_request_that_raises_fails_alone(bench, monkeypatch, stage, kind):
    engine = bench.engines[kind]
    asks = dict(ASKS)
    if "grammar" in stage:
        asks["bad"] = asks["b"]
    wanted = {key: bench.alone(ask) for key, ask in asks.items()}
    with monkeypatch.context() as patch:
        faults = Faults(engine, patch)
        faults.planned["bad"] = fault = PlannedFault(stage)
        found = drive(bench, engine, asks)
    assert fault.fired
    error = found.pop("bad")
    assert isinstance(error, RequestFailed) and "Planted" in error.message
    for key, result in found.items():
        assert_equal(result, wanted[key])
    # The same request is served once it doesn't raise any more.
    assert_equal(drive(bench, engine, {"bad": asks["bad"]})["bad"], wanted["bad"])


def test_forced_tokens_of_an_answer_are_no_prompt(bench, monkeypatch):
    """A prompt that raises beside them, and again when it is computed apart, ends alone."""
    asks = {"bad": Ask("greedy", 1), "forced": Ask("forced", 0, tokens=60)}
    for step in (2, 3, 4):
        with monkeypatch.context() as patch:
            faults = Faults(bench.engines[2], patch)
            faults.planned["bad"] = PlannedFault("forward pass")
            found = drive(bench, bench.engines[2], asks, {"bad": step})
        assert isinstance(found["bad"], RequestFailed)
        assert_equal(found["forced"], bench.alone(asks["forced"]))


@pytest.mark.parametrize("kind", range(len(ENGINES)))
@pytest.mark.parametrize("stage", SHARED)
def test_what_cannot_be_attributed_ends_the_requests_of_that_step(bench, monkeypatch, stage, kind):
    engine = bench.engines[kind]
    wanted = {key: bench.alone(ask) for key, ask in ASKS.items()}
    with monkeypatch.context() as patch:
        faults = Faults(engine, patch)
        faults.planned["bad"] = fault = PlannedFault(stage, after=3, once=True)
        found = drive(bench, engine, ASKS, arrivals={"d": 30, "e": 40})
    assert fault.fired and "bad" in faults.shared
    for key, result in found.items():
        if key in faults.shared and isinstance(result, SightlineError):
            assert isinstance(result, RequestFailed)
        else:
            assert_equal(result, wanted[key])
    assert {"d", "e"}.isdisjoint(faults.shared)


@pytest.mark.parametrize("stage", ["forward pass", "sampling", "sampling plan"])
def test_a_step_that_fails_once_is_computed_again(bench, monkeypatch, stage):
    wanted = {key: bench.alone(ask) for key, ask in ASKS.items()}
    with monkeypatch.context() as patch:
        faults = Faults(bench.engines[1], patch)
        faults.planned["bad"] = fault = PlannedFault(stage, after=2 if stage == "sampling" else 0, once=True)
        found = drive(bench, bench.engines[1], ASKS)
    assert fault.fired
    for key, result in found.items():
        assert_equal(result, wanted[key])


@pytest.mark.parametrize(
    "kind", [0, *(pytest.param(kind, marks=pytest.mark.wide) for kind in range(1, len(ENGINES)))]
)
def test_one_request_in_fifty_raises_somewhere(bench, monkeypatch, kind):
    engine, rng = bench.engines[kind], random.Random(kind)
    asks, arrivals, aborts, step = {}, {}, {}, 0
    with monkeypatch.context() as patch:
        faults = Faults(engine, patch)
        raising = [rng.randrange(first, first + 50) for first in (0, 50, 100)]
        for index in range(150):
            key, images = str(index), rng.choice([(), (0,), (1,), (0, 1)])
            asks[key] = Ask(rng.choice(list(KINDS)), rng.randrange(3), images, rng.choice([4, 12]))
            step += rng.randrange(3)
            arrivals[key] = step
            if index in raising:
                stage = rng.choice([*ATTRIBUTED, *SHARED])
                late = stage in ("sampling", "text", "grammar", *SHARED) and rng.randrange(2)
                faults.planned[key] = PlannedFault(stage, int(late), rng.random() < 0.3)
                kind_of = {"grammar": "constrained", "prompt": "scored"}
                asks[key] = replace(asks[key], kind=kind_of.get(stage.split()[0], asks[key].kind))
            elif rng.random() < 0.05:
                aborts[key] = step + rng.randrange(10)
        found = drive(bench, engine, asks, arrivals, aborts)
    # A fault that ends all requests of a step can end another marked one before its own.
    assert sum(fault.fired > 0 for fault in faults.planned.values()) >= 2
    ended = {key for key, result in found.items() if isinstance(result, SightlineError)}
    assert ended and ended <= faults.planned.keys() | faults.shared
    for key, result in found.items():
        if key not in ended and key not in aborts:
            assert_equal(result, bench.alone(asks[key]))


def test_a_pooling_request_that_raises_fails_alone(tmp_path, monkeypatch):
    path = tiny.make_text(tmp_path, "qwen2")
    options = {"max_model_len": 64, "task": "embed", "max_num_batched_tokens": 16}
    llm = LLM(str(path), **options)
    texts = ["hello world " * 4, "a red square on a blue background", "0 1 2 3"]
    wanted = [output.embedding for output in llm.embed(texts, pooling="mean", use_tqdm=False)]
    runner = llm._engine.core.runner
    add = runner._pooler.add

    def planted(chunk, hidden):
        if chunk.request.id == raises:
            raise ValueError("planted")
        return add(chunk, hidden)

    monkeypatch.setattr(runner._pooler, "add", planted)
    # The second call's requests follow those of the first.
    raises = "5"
    with pytest.raises(RequestFailed, match="ValueError") as caught:
        llm.embed(texts, pooling="mean", use_tqdm=False)
    assert isinstance(caught.value.__cause__, ValueError)
    llm.check_integrity()
    again = [output.embedding for output in llm.embed(texts, pooling="mean", use_tqdm=False)]
    assert again == [pytest.approx(vector, abs=1e-6) for vector in wanted]


def wait_until_idle(engine: AsyncEngine) -> None:
    deadline = time.monotonic() + 120
    while not engine.idle:
        assert time.monotonic() < deadline, "the engine does not become idle"
        time.sleep(0.01)


async def test_a_stream_ends_with_its_error_and_the_others_go_on(bench, monkeypatch):
    engine = AsyncEngine(EngineConfig(model=bench.path, max_model_len=ROOM, **ENGINES[0]))
    asks = {key: ask for key, ask in ASKS.items() if not ask.images}
    asks |= {"bad": Ask("greedy", 2, tokens=20), "worse": Ask("scored", 1), "f": Ask("constrained", 1)}
    wanted = {key: bench.alone(ask) for key, ask in asks.items()}
    try:
        with monkeypatch.context() as patch:
            faults = Faults(engine._engine, patch)
            faults.planned = {"bad": PlannedFault("text", after=5), "worse": PlannedFault("forward pass")}

            async def collect(key: str) -> StreamUpdate | SightlineError:
                prompt, _ = bench._prepare(asks[key].text, ())
                result = None
                try:
                    async for update in engine.generate(key, prompt.inputs, asks[key].params):
                        result = update if result is None else merge_updates(result, update)
                except SightlineError as error:
                    assert key != "bad" or result is not None, "what came before the error is delivered"
                    return error
                assert result is not None
                return result

            found = dict(zip(asks, await asyncio.gather(*map(collect, asks)), strict=True))
        for key, result in found.items():
            if key in faults.planned:
                assert isinstance(result, RequestFailed)
            else:
                assert_equal(result, wanted[key])
        engine.check_health()
        await asyncio.to_thread(wait_until_idle, engine)
        engine.check_integrity()
    finally:
        await asyncio.to_thread(engine.shutdown)


async def test_a_reader_that_leaves_when_one_choice_has_ended_stops_the_other(bench):
    engine = AsyncEngine(EngineConfig(model=bench.path, max_model_len=900))
    prompt, _ = bench._prepare(0, ())
    # The first choice ends after a few tokens. The other would go on to its limit, for a second or more.
    params = SamplingParams(
        n=2, temperature=1000.0, seed=0, ignore_eos=True, stop_token_ids=[30, 31], max_tokens=500
    )
    try:
        async with aclosing(engine.generate("one", prompt.inputs, params)) as updates:
            async for update in updates:
                if any(delta.finish_reason for delta in update.deltas):
                    break
        await asyncio.to_thread(wait_until_idle, engine)
        assert 10 < engine.metrics()["output_tokens"] < 500
        engine.check_integrity()
    finally:
        await asyncio.to_thread(engine.shutdown)
