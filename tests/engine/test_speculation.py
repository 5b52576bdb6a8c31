"""Answers are the same whether their next tokens are guessed or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.executor import rank
from engine.request import Request
from engine.sampling_params import StructuredSpec
from engine.scheduling import drafts
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.slots import SequenceSlots
from tests.engine import tiny
from tests.engine.executor.threads import ThreadLauncher
from tests.engine.rerun import rerun
from tests.engine.same import assert_same_output

PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1}
#: Answers of so few different tokens that they repeat themselves, and some others. They run in pairs.
FEW = {"allowed_token_ids": [30, 31, 40]}
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, **FEW},
    {"temperature": 0.0, **FEW, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 2.0, **FEW, "seed": 1, "n": 2},
    {"temperature": 3.0, **FEW, "seed": 2, "top_p": 0.8, "top_k": 2, "logprobs": 0},
    {"temperature": 2.0, **FEW, "seed": 3, **PENALTIES},
    {"temperature": 0.0, **FEW, **PENALTIES, "logprobs": 1},
    {"temperature": 1.0, "seed": 4, "logit_bias": {30: 9, 31: 9}, "min_tokens": 30, "stop_token_ids": [31]},
    {"temperature": 2.0, **FEW, "seed": 5, "stop_token_ids": [40]},
    # These are not guessed.
    {"temperature": 0.0, **FEW, "no_repeat_ngram_size": 20},
    {"temperature": 0.0, "ignore_eos": False, "structured": StructuredSpec(kind="regex", text="(ab|cd)+")},
    {"temperature": 0.0, "max_tokens": 2},
    {"temperature": 0.0, "max_tokens": 33},
]
WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "chunked, far ahead": {"max_num_batched_tokens": 17, "max_num_seqs": 6, "block_size": 4, "run_ahead": 3},
    "preempted": {"num_kv_blocks": 24, "block_size": 4, "max_num_seqs": 12, "run_ahead": 0},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("speculation"), seed=5)


def answers(llm: LLM, asked: Sequence[dict[str, Any]] = ASKED) -> list:
    params = [SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **given}) for given in asked]
    outputs = []
    for first in range(0, len(params), 2):
        pair = params[first : first + 2]
        prompts = [f"{first + number}: hello hello world" for number in range(len(pair))]
        outputs += llm.generate(prompts, pair, use_tqdm=False)
    llm.check_integrity()
    return outputs


@pytest.fixture(scope="module")
def plain(path) -> list:
    return answers(LLM(str(path), max_model_len=120))


def speculating(path: Path, most: int = 5, **options: Any) -> LLM:
    return LLM(str(path), max_model_len=120, speculation={"prompt_lookup": most}, **options)


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_those_without_guesses(path, plain, way):
    llm = speculating(path, **WAYS[way])
    for _ in range(2 if way == "batch" else 1):
        # The second time prompts are cached, and blocks of the first answers.
        for ours, theirs in zip(answers(llm), plain, strict=True):
            assert_same_output(ours, theirs)
    guesses = llm._engine.core.scheduler.drafts
    assert 0 < guesses.accepted < guesses.drafted
    if way == "preempted":
        assert llm.metrics()["preempted"] > 0


def test_captured_steps_give_the_same_answers(path, plain, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(rank, "make_capture", lambda device, enforce_eager: rerun)
    llm = speculating(path, max_num_seqs=9)
    for ours, theirs in zip(answers(llm), plain, strict=True):
        assert_same_output(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="each rank needs a GPU of its own")
def test_two_ranks(path, plain):
    """Each rank verifies the same guesses."""
    launcher = ThreadLauncher()
    try:
        llm = speculating(path, tensor_parallel_size=2, launcher=launcher)
        for ours, theirs in zip(answers(llm), plain, strict=True):
            assert_same_output(ours, theirs)
        llm._engine.core.runner.close()
    finally:
        launcher.stop()


def test_windows_lengths_and_recurrent_states(tmp_path):
    """Windows are shorter than guesses, which may reach the length from which on rotary frequencies are
    others; states can't go back, so nothing is guessed."""
    for kind in ("mistral", "phi3_longrope", "qwen3_5"):
        path = tiny.make_text(tmp_path / kind, kind)
        asked = [{"temperature": 0.0, **FEW}, {"temperature": 2.0, "seed": 1, **FEW}]
        asked = [{"max_tokens": 80, **given} for given in asked]
        llm = speculating(path, most=9, block_size=4, num_kv_blocks=60)
        for ours, theirs in zip(
            answers(llm, asked), answers(LLM(str(path), max_model_len=120), asked), strict=True
        ):
            assert_same_output(ours, theirs)
        assert (llm._engine.core.scheduler.drafts.drafted > 0) == (kind != "qwen3_5")


def test_a_guess_takes_one_step(path, plain):
    llm = speculating(path)
    (answer,) = answers(llm, ASKED[:1])
    scheduler = llm._engine.core.scheduler
    count = len(answer.outputs[0].token_ids)
    assert scheduler.stats.batches.snapshot()["count"] < 0.5 * count


def test_a_stop_string_within_a_guess(path, plain):
    text = plain[0].outputs[0].text
    asked = [{"temperature": 0.0, **FEW, "stop": [text[at : at + 5]]} for at in (10, 20)]
    llm = speculating(path)
    plainly = answers(LLM(str(path), max_model_len=120), asked)
    for ours, theirs in zip(answers(llm, asked), plainly, strict=True):
        assert_same_output(ours, theirs)
        assert ours.outputs[0].finish_reason == "stop"


def test_what_followed_the_last_tokens_before():
    history = drafts._History()
    tokens = np.array([1, 2, 3, 4, 5, 6, 1, 2, 3], np.int32)
    assert history.draft(tokens[:2], 4) == history.draft(tokens[:6], 4) == []
    assert history.draft(tokens, 4) == [4, 5, 6, 1]
    # Known tokens end before the draft does: it goes on repeating.
    assert history.draft(np.array([*tokens, 4, 9, 9, 9, 9], np.int32), 3) == [9, 9, 9]
    repeated = np.array([*tokens, 4, 9, 9, 9, 9, 1, 2, 3, 4, 9, 9], np.int32)
    assert history.draft(repeated, 8) == [9, 9, 1, 2, 3, 4, 9, 9]


def guessing(most: int) -> tuple[SequenceSlots, drafts.Drafts, int]:
    """The slots, the guesses and the slot of a request that repeats itself and may have ``most`` guesses."""
    slots = SequenceSlots(16, 200)
    guesses = drafts.Drafts(slots, KVManager(BlockPool(100), None, 16), most)
    request = Request("0", [1, 2, 3, 4] * 5, 20, SamplingParams(), 200, frozenset(), takes_drafts=True)
    slot = slots.enter(request, 19, 200)
    slots.set_decoding(slot, True)
    return slots, guesses, slot


def test_after_guesses_that_failed_there_are_none_for_a_while():
    """Otherwise each token of such an answer would take the longer step of a guess."""
    slots, guesses, slot = guessing(most=4)
    pauses = []
    for _ in range(7):
        assert guesses.are_imminent(False)
        [chunk] = guesses.chunks(slots.decode_slots(), 100, [])
        guesses.settle(chunk, 0)
        known = slots.known[slot]
        while not guesses.are_imminent(False):
            slots.known[slot] += 1
            slots.tokens[slot, : slots.known[slot]] = ([1, 2, 3, 4] * 50)[: slots.known[slot]]
            slots.computed[slot] = slots.known[slot] - 1
        pauses.append(int(slots.known[slot] - known))
    assert pauses == [2, 4, 8, 16, 32, 32, 32]


def test_a_guess_ends_before_the_length_at_which_a_request_is_computed_again():
    """All of it may hold, and another token with it; the last token before that length is never guessed."""
    slots, guesses, slot = guessing(most=9)
    for pause, length in ((200, 9), (26, 4), (23, 1)):
        slots.pause[slot] = pause
        [chunk] = guesses.chunks(slots.decode_slots(), 100, [])
        assert chunk.num_drafted == length
        guesses.settle(chunk, length)
    slots.pause[slot] = 22
    assert guesses.chunks(slots.decode_slots(), 100, []) == []


@pytest.mark.parametrize("value", [{"prompt_lookup": -1}, {"prompt_lookup": 99}, {"lookup": 3}, 4])
def test_settings_that_are_refused(value):
    with pytest.raises(ValidationError, match="speculation"):
        EngineConfig(model="m", speculation=value)
