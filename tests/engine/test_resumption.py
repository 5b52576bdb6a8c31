"""An answer that another engine carries on is the answer that one engine gives, wherever it was cut."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import pytest

from engine import LLM
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded
from engine.frontend import Frontend, PreparedPrompt
from engine.loading import LoadedEngine, load_engine
from engine.outputs import StreamUpdate, merge_updates
from engine.progress import ChoiceProgress, Progress
from engine.sampling_params import SamplingParams, StructuredSpec
from tests.engine import tiny
from tests.engine.same import assert_same_logprobs

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = "describe this " + IMAGE + " beside " + IMAGE + " please"
#: Its answers have at most 13 characters: they end.
SCHEMA = (
    '{"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"], '
    '"additionalProperties": false}'
)
TOKENS = 18

#: What requests ask for: everything that changes what comes out, or how.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 7},
    "truncated": {"temperature": 1.3, "seed": 8, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "several": {"temperature": 1.0, "seed": 3, "n": 3, "logprobs": 2},
    "several of different lengths": {"temperature": 1.0, "seed": 5, "n": 4, "logit_bias": {2: 4.0}},
    "log-probabilities": {"temperature": 1.0, "seed": 1, "logprobs": 3},
    "scored prompt": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "scored prompt of several": {"temperature": 1.0, "seed": 2, "n": 2, "prompt_logprobs": 1},
    "penalties": {
        "temperature": 0.7,
        "seed": 4,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
    },
    "no repeated sequences": {"temperature": 0.0, "no_repeat_ngram_size": 2},
    "bad words": {"temperature": 0.0, "bad_words": ["th", "e q", "0 1", "ri"], "begin_suppress_tokens": [70]},
    "few tokens": {"temperature": 1.0, "seed": 6, "allowed_token_ids": list(range(40, 60))},
    "least length": {"temperature": 1.0, "seed": 9, "min_tokens": 12, "stop_token_ids": list(range(8, 136))},
    "stop tokens": {"temperature": 1.0, "seed": 11, "stop_token_ids": list(range(8, 30))},
    "special tokens": {"temperature": 0.0, "skip_special_tokens": False, "logit_bias": {0: 3.0}},
    "no end": {"temperature": 1.0, "seed": 12, "ignore_eos": True, "logit_bias": {2: 4.0}},
    "schema": {"temperature": 1.0, "seed": 13, "structured": StructuredSpec(kind="json_schema", text=SCHEMA)},
    "regex": {
        "temperature": 0.0,
        "logprobs": 1,
        "structured": StructuredSpec(kind="regex", text="(the|quick|é|brown| |a)*"),
    },
    "no token left": {
        "temperature": 0.0,
        "structured": StructuredSpec(kind="regex", text="[0-9]{6}x"),
        "bad_words": ["x"],
    },
}
#: Engines that carry on; the first gives the answers.
ENGINES: list[dict[str, Any]] = [
    {"max_num_seqs": 4, "enable_prefix_caching": False},
    # Chunks of prompts, preemption, and blocks found in the prefix cache.
    {"block_size": 4, "num_kv_blocks": 90, "max_num_batched_tokens": 23, "max_num_seqs": 5, "run_ahead": 2},
]
ROOM = 140


@dataclass
class Bench:
    """Engines over one tiny model, and a prompt."""

    engines: list[LoadedEngine]
    prompt: PreparedPrompt
    rows: list[Any] = field(default_factory=list)

    def run(
        self, engine: LoadedEngine, asks: Sequence[tuple[SamplingParams, Progress | None]]
    ) -> list[list[StreamUpdate]]:
        """The updates of requests that run together, each as the engine gave them."""
        core, outputs = engine.core, engine.outputs
        for number, (params, progress) in enumerate(asks):
            group = engine.requests.generation(
                str(number), self.prompt.inputs, copy.deepcopy(params), self.rows, progress=progress
            )
            outputs.add(group)
            for request in group.requests:
                core.add(request)
        found: list[list[StreamUpdate]] = [[] for _ in asks]
        while core.has_work:
            updates, stopped = outputs.process(core.step())
            for request in stopped:
                core.abort(request)
            for group, update in updates:
                assert isinstance(update, StreamUpdate), update
                # The usage is the group's own, and changes.
                found[int(group.id)].append(replace(update, usage=copy.copy(update.usage)))
        core.check_integrity()
        assert not outputs.num_groups
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    path = str(tiny.make_qwen2_vl(tmp_path_factory.mktemp("resumed"), seed=9))
    engines = [load_engine(EngineConfig(model=path, max_model_len=ROOM, **kind)) for kind in ENGINES]
    front = Frontend.load(EngineConfig(model=path, max_model_len=ROOM))
    shown = [tiny.picture(24, 24, seed=1), tiny.picture(40, 16, seed=2)]
    prompt = front.from_prompt({"prompt": TEXT, "multi_modal_data": {"image": shown}})
    encoder = LLM(path, max_model_len=ROOM, kv_cache_bytes=1 << 20)._encoder
    return Bench(engines, prompt, list(encoder.encode(prompt.media)))


def progress_of(updates: Iterable[StreamUpdate]) -> Progress:
    progress = Progress()
    for update in updates:
        progress.take(update)
    return progress


def whole(updates: Sequence[StreamUpdate]) -> StreamUpdate:
    """All of them as one; of copies, since lists are extended when updates are merged."""
    return reduce(merge_updates, copy.deepcopy(list(updates)))


def assert_equal(found: StreamUpdate, wanted: StreamUpdate) -> None:
    """Everything that an answer carries, log-probabilities within a tolerance."""
    assert found.finished and wanted.finished
    deltas = [sorted(update.deltas, key=lambda delta: delta.index) for update in (found, wanted)]
    for ours, theirs in zip(*deltas, strict=True):
        assert replace(ours, logprobs=None) == replace(theirs, logprobs=None)
        assert_same_logprobs(ours.logprobs, theirs.logprobs)
    assert_same_logprobs(found.prompt_logprobs, wanted.prompt_logprobs)
    counts = [replace(update.usage, cached_tokens=0) for update in (found, wanted)]
    assert counts[0] == counts[1]


def check_every_cut(
    bench: Bench, params: SamplingParams, engines: Sequence[LoadedEngine] = ()
) -> StreamUpdate:
    """Cut an answer after each of its updates, and have each of ``engines``, or all, carry it on.

    Returns:
        The answer.
    """
    [updates] = bench.run(bench.engines[0], [(params, None)])
    wanted, cuts = whole(updates), range(len(updates))
    for engine in engines or bench.engines:
        # All at once: they are batched, preempted and cached like any requests.
        rests = bench.run(engine, [(params, progress_of(updates[:cut])) for cut in cuts])
        for cut, rest in zip(cuts, rests, strict=True):
            assert_equal(whole([*updates[:cut], *rest]), wanted)
            counts = [update.usage.completion_tokens for update in rest]
            assert counts == sorted(counts) and counts[0] >= progress_of(updates[:cut]).num_tokens
            if progress_of(updates[:cut]).cached_tokens is not None:
                assert rest[-1].usage.cached_tokens == wanted.usage.cached_tokens
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_an_answer_gives_its_rest(bench, kind, wide):
    """Without ``wide`` one engine carries each kind of answer on; neighbouring kinds have different ones."""
    params = SamplingParams(**{"max_tokens": TOKENS, **KINDS[kind]})
    turn = list(KINDS).index(kind) % len(bench.engines)
    wanted = check_every_cut(bench, params, () if wide else [bench.engines[turn]])
    reasons = {delta.finish_reason for delta in wanted.deltas}
    if kind == "several of different lengths":
        assert len({len(delta.token_ids) for delta in wanted.deltas}) > 2
    if kind == "no token left":
        assert reasons == {"error"}
    if kind in ("schema", "stop tokens", "least length"):
        assert reasons == {"stop"}


@pytest.mark.parametrize("logprobs", [None, 2], ids=["text", "with log-probabilities"])
@pytest.mark.parametrize("include", [False, True], ids=["cut off", "included"])
def test_a_stop_string_across_the_cut_is_found(bench, include, logprobs):
    """Its characters come from several tokens, and others that look like its beginning are held back."""
    asked = {"temperature": 1.0, "seed": 21, "max_tokens": TOKENS, "include_stop_str_in_output": include}
    [updates] = bench.run(bench.engines[0], [(SamplingParams(**asked), None)])
    text = whole(updates).deltas[0].text
    middle = len(text) // 2
    stop = text[middle : middle + 7]
    assert text.index(stop) == middle
    # The second is complete nowhere, but begins often.
    false_start = text[middle - 6 : middle - 1] + "\x00"
    params = SamplingParams(**asked, stop=[stop, false_start], logprobs=logprobs)
    wanted = check_every_cut(bench, params).deltas[0]
    assert (wanted.stop_reason, wanted.finish_reason) == (stop, "stop")
    assert wanted.text == text[: middle + (len(stop) if include else 0)]


def test_characters_of_several_tokens_are_whole(bench):
    """Tokens that hold parts of characters: what a detokenizer keeps of them is known on the other side."""
    tokenizer = bench.engines[0].tokenizer
    ids = sorted({token for text in "éè" for token in tokenizer.encode(text, add_special_tokens=False)})
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=30, allowed_token_ids=ids, logprobs=1)
    wanted = check_every_cut(bench, params).deltas[0]
    assert "é" in wanted.text and "\N{REPLACEMENT CHARACTER}" in wanted.text
    check_every_cut(bench, replace(params, stop=["é"], logprobs=None))


def test_an_answer_that_has_passed_longrope_s_original_length(tmp_path):
    """Keys beyond it have other frequencies, and earlier keys are computed again with them."""
    path = str(tiny.make_text(tmp_path, "phi3_longrope"))
    engines = [load_engine(EngineConfig(model=path, max_model_len=128, **kind)) for kind in ENGINES]
    prompt = Frontend.load(EngineConfig(model=path, max_model_len=128)).from_prompt("hello world " * 5)
    count = len(prompt.inputs.token_ids)
    assert count < 60
    params = SamplingParams(temperature=0.0, max_tokens=64 - count + 16, ignore_eos=True, logprobs=1)
    wanted = check_every_cut(Bench(engines, prompt), params)
    assert count < 64 < count + len(wanted.deltas[0].token_ids)


def test_progress_that_leaves_no_room_is_refused(bench):
    count = len(bench.prompt.inputs.token_ids)
    progress = Progress({0: ChoiceProgress([9] * (ROOM - count))})
    with pytest.raises(ContextLengthExceeded):
        bench.engines[0].requests.generation(
            "0", bench.prompt.inputs, SamplingParams(max_tokens=None), bench.rows, progress=progress
        )
