"""Requests that can't be computed are refused before they reach the engine's loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.progress import ChoiceProgress, Progress
from engine.prompt import EngineInput, MediaItem, MediaSpan, PlaceholderRun
from tests.engine import tiny
from tests.engine.families.qwen import frames, make_qwen2_5_vl

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)


def video(count: int) -> dict:
    return {"prompt": VIDEO + "what?", "multi_modal_data": {"video": frames(count)}}


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> LLM:
    """A step in time is two frames, which last 50 seconds of two positions each."""
    path = make_qwen2_5_vl(tmp_path_factory.mktemp("slow"))
    return LLM(str(path), max_model_len=330, mm_processor_kwargs={"fps": 0.04}, kv_cache_bytes=1 << 22)


def test_a_video_whose_positions_pass_the_context_is_refused(slow):
    """Its tokens are few. The positions of its steps are 0, 100, 200, 300, 400."""
    for count in (10, 9):
        with pytest.raises(InvalidRequest, match=r"positions reach 40\d, .*ends at 329.*fps") as caught:
            slow.generate(video(count), GREEDY, use_tqdm=False)
        assert caught.value.param == "prompt"
    slow.check_integrity()
    outputs = slow.generate([video(7), "hello"], replace(GREEDY, max_tokens=4), use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [4, 4]
    slow.check_integrity()


def test_an_answer_ends_where_the_positions_end(slow):
    engine = slow._engine
    prompt = slow._frontend.from_prompt(video(7))
    rows = slow._encoder.encode(prompt.media)
    (request,) = engine.requests.generation("a", prompt.inputs, GREEDY, rows).requests
    room = 330 - request.num_prompt - max(0, request.position_delta)
    assert request.max_total == request.num_prompt + room
    with pytest.raises(ContextLengthExceeded, match=f"requested 331 tokens .*{room + 1} in the completion"):
        engine.requests.generation("b", prompt.inputs, replace(GREEDY, max_tokens=room + 1), rows)
    (output,) = slow.generate(video(7), GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == room and output.outputs[0].finish_reason == "length"


def span(offset: int, length: int, rows: int, embed_index=None) -> MediaSpan:
    item = MediaItem("image", "a", rows, (1, 2, 2 * rows), (8, 8), (PlaceholderRun(6, rows, True),))
    return MediaSpan(item, offset, length, None if embed_index is None else np.array(embed_index, np.int32))


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    path = tiny.make_qwen2_vl(tmp_path_factory.mktemp("factory"))
    return LLM(str(path), max_model_len=64, kv_cache_bytes=1 << 20)._engine.requests


@pytest.mark.parametrize(
    "spans",
    [
        [span(18, 4, 4)],
        [span(3, 4, 5)],
        [span(2, 4, 4), span(5, 4, 4)],
        [span(-1, 4, 4)],
        [span(2, 5, 2, [1, 5])],
        [span(2, 5, 2, [-1, 3])],
        [span(2, 5, 2, [3, 1])],
        [span(2, 5, 3, [1, 3])],
    ],
    ids=["beyond the end", "too short", "overlap", "before the start", "after", "before", "order", "missing"],
)
def test_media_that_do_not_lie_in_the_prompt_are_refused(factory, spans):
    rows = [np.zeros((s.item.num_tokens, 64), np.float32) for s in spans]
    with pytest.raises(InvalidRequest, match=r"Image \d of the prompt takes tokens"):
        factory.generation("a", EngineInput(list(range(20)), spans), GREEDY, rows)


def test_a_priority_is_a_number(factory):
    with pytest.raises(InvalidRequest, match="priority must be an integer") as caught:
        factory.generation("a", EngineInput([1, 2]), GREEDY, priority="high")
    assert caught.value.param == "priority"


def test_all_sequences_share_the_prompt(factory):
    """A hundred lists of a long prompt would take the host's memory."""
    inputs = EngineInput([7] * 20)
    group = factory.generation("a", inputs, SamplingParams(n=3, max_tokens=4))
    first, *others = group.requests
    assert first.token_ids == inputs.token_ids and first.token_ids is not inputs.token_ids
    assert all(request.token_ids is first.token_ids for request in others)
    progress = Progress({1: ChoiceProgress([8, 9])})
    group = factory.generation("b", inputs, SamplingParams(n=3, max_tokens=4, seed=1), progress=progress)
    assert [request.token_ids[20:] for request in group.requests] == [[], [8, 9], []]
