"""A request's way through its stages, with stages that a test plays."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from benchmarks.shapes import SHAPES, write_configuration
from deployments.access import Caller, KeyConfig, visit
from deployments.config import AppConfig, ModelSpec, ReplayConfig
from deployments.conversations import Conversation, start
from deployments.metrics.ingress import STAGES, arrival
from deployments.pipeline import Pipeline, SharedMedia
from deployments.ray_serve.handoff import Brought, RowsRef, taken
from deployments.ray_serve.packing import RowsInfo
from deployments.references import ReferenceConfig, References, UnknownReference
from deployments.stages import RowsLost, StageLost, Stages
from deployments.tools import ToolUse
from engine.config import EngineConfig
from engine.errors import InvalidRequest, MediaError, Unavailable
from engine.media.keys import kept_files
from engine.media.ledger import Ledger
from engine.media.source import MediaSource
from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.parsers.formats import REASONING_TAGS
from engine.prompt import EmbeddedMedia, EngineInput, MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from engine.sampling_params import SamplingParams
from tests.engine.tokenizers import KINDS
from tests.serving import app_args

_GLM = SHAPES["glm-4.1v-9b"]
SOURCES = [MediaSource(index, f"messages[0].content[{index}]", url=f"data:,{index}") for index in range(3)]


@dataclass
class Preprocessor:
    """Prepares an item for each source: equal items for equal URLs. Raises ``errors`` first, one a call."""

    errors: list[Exception] = field(default_factory=list)
    calls: int = 0
    salts: set[str] = field(default_factory=set)

    async def prepare(self, sources, files, caller, images=None, salt=""):
        self.calls += 1
        self.salts.add(salt)
        if self.errors:
            raise self.errors.pop(0)
        kept = [None if source.index in files else kept_files([b"."]) for source in sources]
        names = [source.url or source.uuid for source in sources]
        return [
            PreparedMedia(item(name), np.zeros(1), kept=each) for name, each in zip(names, kept, strict=True)
        ]


@dataclass
class Encoder:
    """Notes what it encodes. Raises ``errors`` first, one a call."""

    errors: list[Exception] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    running: int = 0
    most: int = 0
    cancelled: int = 0

    async def encode(self, pixels, salt, asked):
        self.seen.append((pixels.item.hash, salt))
        self.asked.append(asked)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0)
            if self.errors:
                raise self.errors.pop(0)
            if pixels.item.hash == "data:,hangs":
                await asyncio.Future()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return EmbeddedMedia(pixels.item.hash, np.zeros((1, 1)), "float32")


class LanguageModel:
    """Notes when clients asked; its answers are empty."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.length = 16

    async def max_model_len(self):
        return self.length

    async def generate(self, request, media, relay):
        self.asked.append(request.asked)
        yield StreamUpdate(
            request.request_id, [OutputDelta(0, "", [], finish_reason="stop")], Usage(), finished=True
        )


def item(name: str) -> MediaItem:
    return MediaItem("image", name, 1, (1, 1, 1), (1, 1), (PlaceholderRun(0, 1, True),))


@pytest.fixture(scope="module")
def spec():
    return AppConfig.model_validate(app_args()).models[0]


def pipeline(spec, preprocessor=None, encoder=None) -> Pipeline:
    stages = Stages(LanguageModel(), preprocessor or Preprocessor(), encoder or Encoder())
    return Pipeline(spec, stages, ThreadPoolExecutor(1), ReplayConfig(max_losses=2, pause_s=0.001))


def build(items):
    return EngineInput([1] * 4)


IMAGE = {"type": "image_url", "image_url": {"url": "data:,0"}}


@pytest.mark.parametrize(
    ("messages", "options", "here"),
    [
        ([{"role": "user", "content": "What is this?"}], {}, True),
        ([{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is this?"}]}], {}, True),
        ([{"role": "user", "content": "word " * 128}], {}, False),
        ([{"role": "user", "content": "\u4e2d" * 130}], {}, False),
        ([{"role": "user", "content": [IMAGE] * 8}], {}, False),
        ([{"role": "user", "content": "?"}] * 5, {}, False),
        ([{"role": "assistant", "content": "?", "tool_calls": []}], {}, False),
        ([{"role": "user", "content": "?"}], {"template_options": {"long": "text"}}, False),
        ([{"role": "user", "content": "?"}], {"tools": ToolUse(({"name": "f"},))}, False),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no " * 200}]}], {}, False),
        ([{"role": "user", "content": [{"type": "text", "text": "no " * 200}]}], {}, False),
    ],
)
async def test_threads_make_all_prompts_but_short_ones(spec, monkeypatch, messages, options, here):
    made, threads = pipeline(spec), []

    def from_messages(*args, **kwargs):
        threads.append(threading.current_thread())
        return build([])

    monkeypatch.setattr(made.builder, "from_messages", from_messages)
    await start(made, "one", Conversation(messages, SamplingParams(max_tokens=1), **options))
    assert [thread is threading.current_thread() for thread in threads] == [here]


@pytest.mark.parametrize("own_cache", [None, True, False])
async def test_the_salt_reaches_every_stage(spec, own_cache):
    """With that of the key's own cache in front, if the caller has a key with one."""
    encoder, preprocessor = Encoder(), Preprocessor()
    made = pipeline(spec, preprocessor=preprocessor, encoder=encoder)
    caller = Caller() if own_cache is None else Caller(KeyConfig(name="team", key="k", own_cache=own_cache))
    token = visit.set(caller.enter(Ledger()))
    try:
        prompt = await made.prepare(
            lambda items: replace(build(items), cache_salt="tenant"), SOURCES[:1], salt="tenant"
        )
        salt = "team\ntenant" if own_cache else "tenant"
        assert preprocessor.salts == {salt} == {prompt.inputs.cache_salt}
        assert encoder.seen == [("data:,0", salt)]
        # After a loss too.
        await prompt.encode_again()
        assert encoder.seen == [("data:,0", salt)] * 2 and preprocessor.salts == {salt}
    finally:
        visit.reset(token)


async def test_the_text_of_a_prompt_stays_at_the_ingress(spec):
    """It may be long, and the engine needs none."""
    prompt = await pipeline(spec).prepare(lambda items: replace(build(items), text="the text"))
    assert prompt.text == "the text" and prompt.inputs == build([])


async def test_stages_know_when_the_client_asked(spec):
    """Not when their turn comes: what a request has waited elsewhere counts."""
    encoder, made = Encoder(), pipeline(spec)
    made._stages = replace(made._stages, encoder=encoder)
    before = time.time()
    token = arrival.set(time.perf_counter() - 30)
    try:
        prompt = await made.prepare(build, SOURCES[:1], params=SamplingParams(max_tokens=1))
        [_ async for _ in made.generate("one", prompt, SamplingParams(max_tokens=1))]
    finally:
        arrival.reset(token)
    found = encoder.asked + made._stages.language_model.asked
    assert len(found) == 2 and all(before - 30.001 < asked < time.time() - 29.999 for asked in found)
    # Offline work has no client: it asks now.
    before = time.time()
    await made.prepare(build, SOURCES[:1])
    assert before <= encoder.asked[-1] <= time.time()


async def test_distinct_items_are_encoded_once_and_together(spec):
    encoder = Encoder()
    prompt = await pipeline(spec, encoder=encoder).prepare(build, [*SOURCES, *SOURCES[:2]])
    assert [rows.hash for rows in prompt.media] == ["data:,0", "data:,1", "data:,2"]
    assert len(encoder.seen) == encoder.most == 3


@pytest.mark.parametrize("stage", ["preprocessor", "encoder"])
async def test_a_lost_stage_is_asked_again_a_few_times(spec, stage):
    def lost(times):
        return [StageLost("gone") for _ in range(times)]

    preprocessor, encoder = Preprocessor(), Encoder()
    broken = preprocessor if stage == "preprocessor" else encoder
    broken.errors = lost(2)
    prompt = await pipeline(spec, preprocessor, encoder).prepare(build, SOURCES[:1])
    assert len(prompt.media) == 1 and preprocessor.calls == 3
    broken.errors = lost(3)
    with pytest.raises(StageLost):
        await pipeline(spec, preprocessor, encoder).prepare(build, SOURCES[:1])


@pytest.mark.parametrize("error", [MediaError("bad"), Unavailable("full")])
async def test_other_errors_are_not_tried_again(spec, error):
    preprocessor = Preprocessor([error])
    with pytest.raises(type(error)):
        await pipeline(spec, preprocessor).prepare(build, SOURCES)
    assert preprocessor.calls == 1


async def test_media_whose_files_are_lost_are_unknown_from_then_on(spec):
    preprocessor, named = Preprocessor(), [MediaSource(0, "messages[0].content[0].uuid", uuid="a")]
    served = pipeline(spec, preprocessor)
    await served.prepare(build, [MediaSource(0, "", url="data:,0", uuid="a")])
    assert len((await served.prepare(build, named)).media) == 1
    for errors in ([RowsLost("the process with the files died")], []):
        preprocessor.errors = errors
        with pytest.raises(UnknownReference) as error:
            await served.prepare(build, named)
        assert error.value.param == "messages[0].content[0].uuid"
    # The second time nothing is asked for.
    assert preprocessor.calls == 3


async def test_a_request_keeps_the_media_that_it_names(spec):
    """They may be dropped while it runs, and be needed once more after a loss."""
    served = pipeline(spec)
    served.references = References(ReferenceConfig(max_items=1))
    await served.prepare(build, [MediaSource(0, "", url="data:,0", uuid="a")])
    prompt = await served.prepare(build, [MediaSource(0, "", uuid="a")])
    await served.prepare(build, [MediaSource(0, "", url="data:,1", uuid="b")])
    assert [rows.hash for rows in await prompt.encode_again()] == ["a"]


async def test_prompts_of_one_request_have_its_media_in_common(spec):
    """Also those that may be taken once. Each prompt has the rows of its own media; lost ones are made again
    once for all prompts."""

    class ByLine(Encoder):
        async def encode(self, pixels, salt, asked):
            found = await super().encode(pixels, salt, asked)
            return RowsRef(RowsInfo(found.hash, "float32"), Brought(found.rows))

    def shows(*indices):
        return lambda items: EngineInput([1] * 4, [MediaSpan(items[i], n, 1) for n, i in enumerate(indices)])

    def taken_from(media):
        assert all(taken(rows.array).shape == (1, 1) for rows in media)
        return [rows.info.hash for rows in media]

    preprocessor, encoder = Preprocessor(), ByLine()
    served, shared = pipeline(spec, preprocessor, encoder), SharedMedia(SOURCES)
    prompts = [await served.prepare(shows(*shown), shared) for shown in ((0, 1), (0, 2), (0, 2))]
    hashes = [["data:,0", "data:,1"], ["data:,0", "data:,2"], ["data:,0", "data:,2"]]
    assert [taken_from(prompt.media) for prompt in prompts] == hashes
    for losses in (1, 2):
        again = await asyncio.gather(*(prompt.encode_again() for prompt in prompts))
        assert [taken_from(media) for media in again] == hashes
        assert (preprocessor.calls, len(encoder.seen)) == (1 + losses, 3 * (1 + losses))


async def test_the_first_item_that_fails_ends_the_others(spec):
    encoder = Encoder([InvalidRequest("bad")])
    sources = [SOURCES[0], MediaSource(1, "messages[0].content[1]", url="data:,hangs")]
    with pytest.raises(InvalidRequest):
        await asyncio.wait_for(pipeline(spec, encoder=encoder).prepare(build, sources), 60)
    await asyncio.sleep(0)
    assert encoder.cancelled == 1 and encoder.running == 0


async def test_a_prompt_that_is_too_long_is_not_encoded(spec):
    encoder = Encoder()
    with pytest.raises(InvalidRequest) as caught:
        await pipeline(spec, encoder=encoder).prepare(build, SOURCES, params=SamplingParams(max_tokens=13))
    assert caught.value.param == "max_tokens" and not encoder.seen


async def test_a_prompt_that_fits_replicas_of_an_update_is_taken(spec):
    served = pipeline(spec)
    model = served._stages.language_model
    with pytest.raises(InvalidRequest, match="maximum context length is 16"):
        await served.prepare(build, params=SamplingParams(max_tokens=13))
    model.length = 17
    assert (await served.prepare(build, params=SamplingParams(max_tokens=13))).inputs.token_ids == [1] * 4
    with pytest.raises(InvalidRequest, match="maximum context length is 17"):
        await served.prepare(build, params=SamplingParams(max_tokens=14))
    # Health checks, too, learn of it.
    model.length = 18
    await served.ping()
    assert await served.max_model_len() == 18


async def test_a_lost_place_of_kept_media_is_asked_again(spec):
    class Lost(References):
        losses = 2

        async def resolve(self, owner, sources):
            if self.losses:
                self.losses -= 1
                raise StageLost("gone")
            return await super().resolve(owner, sources)

    served = pipeline(spec)
    served.references = Lost(ReferenceConfig())
    assert len((await served.prepare(build, SOURCES)).media) == 3
    served.references.losses = 3
    with pytest.raises(StageLost):
        await served.prepare(build, SOURCES)


async def test_too_many_items_are_not_prepared(spec):
    preprocessor = Preprocessor()
    with pytest.raises(InvalidRequest):
        await pipeline(spec, preprocessor).prepare(build, SOURCES * 3)
    assert preprocessor.calls == 0


async def test_health_checks_do_not_wake_a_model_that_may_sleep(spec):
    class Counted(LanguageModel):
        calls = 0

        async def max_model_len(self):
            self.calls += 1
            return 16

        async def collect(self):
            return []

    for least, calls in ((0, 1), (1, 3)):
        stage = Counted()
        changed = spec.language_model.model_copy(update={"autoscaling": {"min_replicas": least}})
        model = spec.model_copy(update={"language_model": changed})
        made = Pipeline(model, Stages(stage), ThreadPoolExecutor(1))
        await made.max_model_len()
        await made.ping()
        await made.ping()
        assert stage.calls == calls
        assert made.measured().may_sleep == ({"language_model"} if least == 0 else set())


@pytest.mark.parametrize("asleep", STAGES)
async def test_a_request_that_waits_for_a_stage_is_counted_by_the_stage(spec, asleep):
    """The stage may sleep, and never wake."""
    made, reached, woken = pipeline(spec), asyncio.Event(), asyncio.Event()
    stage = getattr(made._stages, asleep)
    method = {"preprocessor": "prepare", "encoder": "encode", "language_model": "max_model_len"}[asleep]
    work = getattr(stage, method)

    async def wakes(*args, **kwargs):
        reached.set()
        await woken.wait()
        return await work(*args, **kwargs)

    def open_calls() -> dict[str, int]:
        (family,) = (each for each in made.meter.families() if each.name == "sightline_stage_open_calls")
        return {labels["stage"]: count for labels, count in family.samples}

    setattr(stage, method, wakes)
    task = asyncio.ensure_future(made.prepare(build, SOURCES[:1], params=SamplingParams(max_tokens=4)))
    await asyncio.wait_for(reached.wait(), 60)
    assert open_calls() == dict.fromkeys(STAGES, 0) | {asleep: 1}
    woken.set()
    await task
    assert not any(open_calls().values())


@pytest.mark.parametrize(
    ("architecture", "thoughts"),
    [("Glm4vForConditionalGeneration", REASONING_TAGS["think"]), ("GlmOcrForConditionalGeneration", None)],
)
def test_a_family_names_the_tags_of_thoughts_that_its_template_lacks(tmp_path, architecture, thoughts):
    shape = replace(_GLM, config={**_GLM.config, "architectures": [architecture]})
    write_configuration(shape, tmp_path)
    make, _ = KINDS["byte_level"]
    make().save(str(tmp_path / "tokenizer.json"))
    spec = ModelSpec(name="glm", engine=EngineConfig(model=str(tmp_path)))
    with ThreadPoolExecutor(1) as threads:
        pipeline = Pipeline(spec, Stages(None, None, None), threads, ReplayConfig())
    assert pipeline.format.reasoning == thoughts
