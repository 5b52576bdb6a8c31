"""Answers are the same whether tokens that a grammar alone decides are sampled or appended."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.executor import rank
from engine.request import Request
from engine.sampling_params import StructuredSpec
from engine.scheduling import forced
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.forced import ForcedTokens
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.slots import SequenceSlots
from engine.scheduling.waiting import WaitingQueue
from engine.structured import run_odds
from tests.engine import tiny
from tests.engine.executor.threads import ThreadLauncher
from tests.engine.rerun import rerun
from tests.engine.same import assert_same_output

SCHEMA = {
    "type": "object",
    "properties": {
        "shape of the picture": {"enum": ["a red square", "a red circle", "a blue star"]},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        "is it plain?": {"type": "boolean"},
    },
    "required": ["shape of the picture", "words", "is it plain?"],
    "additionalProperties": False,
}
JSON = StructuredSpec(kind="json_schema", text=json.dumps(SCHEMA))
REGEX = StructuredSpec(kind="regex", text="(the quick|brown fox|é|你好)( jumps over the lazy dog){1,2} é?!")
PENALTIES = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}

#: What constrained requests ask for, each beside free ones.
ASKED: list[dict[str, Any]] = [
    {"structured": JSON, "temperature": 0.0},
    {"structured": JSON, "temperature": 1.5, "seed": 1, "n": 3},
    {"structured": JSON, "temperature": 1.5, "seed": 2, "top_p": 0.9, "top_k": 50, **PENALTIES},
    {"structured": REGEX, "temperature": 1.5, "seed": 3, **PENALTIES},
    {"structured": REGEX, "temperature": 1.0, "seed": 4, "stop": ["over the"]},
    {"structured": REGEX, "temperature": 1.0, "seed": 5, "stop": ["la"], "include_stop_str_in_output": True},
    # Their lengths end within forced text.
    {"structured": JSON, "temperature": 1.0, "seed": 6, "max_tokens": 9},
    {"structured": JSON, "temperature": 1.0, "seed": 6, "max_tokens": 1},
    # Tokens must be sampled one by one.
    {"structured": JSON, "temperature": 1.0, "seed": 8, "logprobs": 2, "prompt_logprobs": 1},
    {"structured": JSON, "temperature": 0.0, "prompt_logprobs": 1},
    {"structured": REGEX, "temperature": 1.0, "seed": 9, "bad_words": ["lazy"]},
    {"structured": REGEX, "temperature": 1.0, "seed": 10, "no_repeat_ngram_size": 3},
    {"temperature": 0.0, "max_tokens": 30},
    {"temperature": 1.0, "seed": 11, "max_tokens": 40, **PENALTIES},
]
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunked, far ahead": {"max_num_batched_tokens": 17, "max_num_seqs": 6, "block_size": 4, "run_ahead": 3},
    "preempted": {"num_kv_blocks": 90, "block_size": 4, "max_num_seqs": 12, "run_ahead": 0},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("forced"), seed=5)


def answers(llm: LLM, asked: Sequence[dict[str, Any]]) -> list:
    params = [SamplingParams(**{"max_tokens": 90, **given}) for given in asked]
    prompts = [f"{number}: describe this image in detail" for number in range(len(params))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.check_integrity()
    return outputs


def steps(llm: LLM) -> int:
    return llm._engine.core.scheduler.stats.batches.snapshot()["count"]


@pytest.fixture(scope="module")
def sampled(path) -> list:
    """The answers of an engine that samples every token."""
    return answers(LLM(str(path), max_model_len=190, append_forced_tokens=False), ASKED)


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_of_an_engine_that_samples_every_token(path, sampled, way):
    llm = LLM(str(path), max_model_len=190, **WAYS[way])
    for _ in range(2 if way == "batch" else 1):
        # The second time prompts are cached, and blocks of the first answers.
        for found, wanted in zip(answers(llm, ASKED), sampled, strict=True):
            assert_same_output(found, wanted)
    if way == "preempted":
        assert llm.metrics()["preempted"] > 0
    reasons = [completion.finish_reason for output in sampled for completion in output.outputs]
    assert {"stop", "length"} <= set(reasons)


def expect_runs(monkeypatch, expected=lambda count: count.runs) -> Counter[str]:
    """Have steps compute forced tokens before they are certain wherever they can; return what comes of it.

    Args:
        expected: of the count of a grammar's state, the runs by the token before them.
    """
    found: Counter[str] = Counter()
    settle = ForcedTokens.settle

    def counted(self, chunk):
        run = settle(self, chunk)
        found["in vain" if run is None else "computed" if run else "none"] += 1
        return run

    monkeypatch.setattr(run_odds._Count, "expected", property(expected))
    monkeypatch.setattr(forced, "_FEW", 0)
    # Steps that wait for the last token have none in flight.
    monkeypatch.setattr(ForcedTokens, "are_worth_waiting_for", lambda self, idle_share: False)
    monkeypatch.setattr(ForcedTokens, "settle", counted)
    return found


def whatever_comes_before(count) -> dict:
    """The likeliest run of a state whatever the token before it, so that some runs are computed in vain."""
    return {run_odds.ANY: count.run} if count.run else {}


def test_captured_steps_give_the_same_answers(path, sampled, monkeypatch):
    found = expect_runs(monkeypatch)
    if not torch.cuda.is_available():
        monkeypatch.setattr(rank, "make_capture", lambda device, enforce_eager: rerun)
    llm = LLM(str(path), max_model_len=190, max_num_seqs=20)
    for ours, theirs in zip(answers(llm, ASKED), sampled, strict=True):
        assert_same_output(ours, theirs)
    assert found["computed"]


@pytest.mark.parametrize("kind", ["qwen3_5", "mistral", "phi3_longrope"])
def test_models_whose_tokens_depend_on_more_than_keys(tmp_path, kind):
    """States advance by forced tokens as they do by sampled ones; windows are shorter than forced text, which
    may reach the length from which on rotary frequencies are others."""
    path = tiny.make_text(tmp_path, kind)
    asked = [{"structured": JSON, "temperature": 1.5, "seed": seed} for seed in range(3)]
    kinds = ({"append_forced_tokens": False}, {"block_size": 4, "num_kv_blocks": 50})
    found, wanted = (answers(LLM(str(path), max_model_len=190, **kind), asked) for kind in kinds)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_output(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU of its own")
def test_two_ranks(path, sampled, monkeypatch):
    """Forced tokens reach the other rank with the step that computes them, and expected ones, too, also in
    vain."""
    found = expect_runs(monkeypatch, whatever_comes_before)
    launcher = ThreadLauncher()
    try:
        llm = LLM(str(path), max_model_len=190, tensor_parallel_size=2, launcher=launcher)
        for ours, theirs in zip(answers(llm, ASKED), sampled, strict=True):
            assert_same_output(ours, theirs)
        assert found["computed"] and found["in vain"], found
        llm._engine.core.runner.close()
    finally:
        launcher.stop()


def test_a_stop_token_within_forced_text(path, sampled):
    text = sampled[0].outputs[0].token_ids
    asked = [{**ASKED[0], "stop_token_ids": [token]} for token in text[3:9]]
    kinds = ({"append_forced_tokens": False}, {})
    found, wanted = (answers(LLM(str(path), max_model_len=190, **kind), asked) for kind in kinds)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_output(ours, theirs)
        assert ours.outputs[0].stop_reason is not None


def test_the_last_token_before_a_limit_is_sampled():
    """Of the answer's length, or of the length at which it is computed again."""
    slots = SequenceSlots(1, 200)
    forced = ForcedTokens(slots, KVManager(BlockPool(100), None, 16), expects=False)
    request = Request("0", [1] * 20, 20, SamplingParams(), 60, frozenset())
    assert forced.room(request) == 0, "it waits"
    slot = slots.enter(request, 19, 200)
    for pause, room in ((60, 39), (30, 9), (21, 0), (20, 0)):
        slots.pause[slot] = pause
        assert forced.room(request) == room


def test_steps_wait_where_that_saves_more_than_it_costs():
    slots = SequenceSlots(4, 200)
    forced = ForcedTokens(slots, KVManager(BlockPool(100), None, 16), expects=False)
    requests = []
    for index in range(4):
        request = Request(str(index), [1] * 20, 20, SamplingParams(), 60, frozenset())
        request.grammar = SimpleNamespace(forecast=SimpleNamespace(odds=0.5))
        slot = request.slot = slots.enter(request, 19, 200)
        slots.set_decoding(slot, True)
        requests.append(request)
    assert not forced.are_worth_waiting_for(0.0), "no answer has begun to follow its grammar"
    for request in requests[:2]:
        forced.append(request, [])
    # One of four requests is expected to need a step fewer.
    assert forced.are_worth_waiting_for(0.2) and not forced.are_worth_waiting_for(0.3)
    forced.leave(requests[0].slot)
    assert not forced.are_worth_waiting_for(0.2) and forced.are_worth_waiting_for(0.1)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("batch", whatever_comes_before),
        ("chunked, far ahead", lambda count: count.runs),
        ("preempted", lambda count: count.runs),
    ],
    ids=["whatever comes before", "by the token before, far ahead", "by the token before, preempted"],
)
def test_tokens_that_are_expected_to_be_forced_change_no_answer(path, sampled, way, expected, monkeypatch):
    """They are computed behind a token in flight, and forgotten where others follow it."""
    found = expect_runs(monkeypatch, expected)
    llm = LLM(str(path), max_model_len=190, **{**WAYS[way], "run_ahead": WAYS[way].get("run_ahead") or 1})
    for _ in range(2):
        for ours, theirs in zip(answers(llm, ASKED), sampled, strict=True):
            assert_same_output(ours, theirs)
    assert found["computed"] and found["in vain" if way == "batch" else "none"], found


@pytest.mark.parametrize(("run_ahead", "count"), [(0, 1), (1, 1), (1, 12)])
def test_forced_tokens_take_no_steps_of_their_own(path, run_ahead, count):
    """An answer takes a step for each token that the model chooses, and a few more."""
    on, off = (
        LLM(str(path), max_model_len=190, run_ahead=run_ahead, append_forced_tokens=appends)
        for appends in (True, False)
    )
    for llm in (on, off):
        assert answers(llm, ASKED[:1] * count)[0].outputs[0].finish_reason == "stop"
    assert steps(on) < 0.5 * steps(off)


def test_what_comes_before_and_after_the_only_choice_takes_no_step(tmp_path):
    """The prompt's step samples the choice: the tokens before it are computed with the prompt, and the answer
    ends when it is known."""
    path = tiny.make_text(tmp_path, "mistral")
    choice = StructuredSpec(kind="regex", text="a picture of:[0-9] blue stars")
    asked = [{"structured": choice, "temperature": 1.5, "seed": 1}]
    on, off = (
        LLM(str(path), max_model_len=190, block_size=4, run_ahead=0, append_forced_tokens=appends)
        for appends in (True, False)
    )
    [wanted] = answers(off, asked)
    for _ in range(2):
        [found] = answers(on, asked)
        assert_same_output(found, wanted)
    # The second time, the blocks of the answer's beginning were cached, too. They are no part of the prompt.
    counts = on.metrics()
    assert steps(on) == 2 and counts["cached_tokens"] == len(wanted.prompt_token_ids)
    assert counts["output_tokens"] == 2 * len(wanted.outputs[0].token_ids)


def test_one_of_several_ends_is_taken_where_any_will_do(path):
    """The texts are the same, and an end that the caller would be told of is sampled."""
    asked = [given for given in ASKED if given.get("structured") is JSON][:3]
    llm = LLM(str(path), max_model_len=190, run_ahead=0)
    one, other = llm._engine.model.eos_token_ids
    found, taken = [], []
    for more in ({}, {"any_end": True}, {"any_end": True, "stop_token_ids": [one]}):
        before = steps(llm)
        outputs = answers(llm, [{**given, **more} for given in asked])
        found.append([completion for output in outputs for completion in output.outputs])
        taken.append(steps(llm) - before)
    assert taken[1] < taken[0] == taken[2]
    seen = [[(each.text, each.finish_reason, len(each.token_ids)) for each in kind] for kind in found]
    assert seen[0] == seen[1] == seen[2]
    last = [each.token_ids[-1] for each in found[0] if each.finish_reason == "stop"]
    assert last and set(last) <= {one, other}
    for each in found[2]:
        assert each.stop_reason == (one if each.token_ids[-1] == one else None)


def test_a_request_can_be_late_though_its_first_tokens_are_known():
    for given, late in (([], 0), ([1, 1], 1)):
        queue = WaitingQueue()
        request = Request("0", [1] * 20, 18, SamplingParams(), 60, frozenset(), deadline=0.0, opening=given)
        queue.push(request)
        queue.push(Request("1", [1] * 20, 20, SamplingParams(), 60, frozenset(), arrival=1.0))
        assert queue.first() is not None and queue.num_late == late
