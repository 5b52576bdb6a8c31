"""The prefix cache of models with recurrent states: it goes on where a state was kept, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.snapshots import SnapshotPool
from tests.wide import examples

from .simulated import SimulatedEngine, SimulatedRunner, picture, tokens_alone
from .test_scheduler import LIMITS, REQUESTS, check_schedule, prompt_with


def ask(engine: SimulatedEngine, prompt: list[int], spans=(), max_tokens: int = 6, **changes) -> int:
    """Run a request, compare its tokens, and return how many tokens of its prompt were cached."""
    key = str(engine.arrivals)
    request = engine.add(key, prompt, spans, max_tokens=max_tokens, **changes)
    engine.run()
    assert engine.outputs[key] == tokens_alone(prompt, list(spans), max_tokens)
    assert request.num_cached is not None
    return request.num_cached


@pytest.mark.parametrize("length", range(9, 22))
def test_a_prompt_goes_on_from_its_last_full_block(length):
    engine = SimulatedEngine(num_snapshots=8, budget=100)
    prompt = [index % 40 for index in range(length)]
    assert ask(engine, prompt) == 0
    assert ask(engine, prompt) == (length - 1) // 4 * 4


@pytest.mark.parametrize("length", range(12, 20))
def test_a_second_turn_that_changes_the_end_of_the_first_one_s_prompt_computes_little_more(length):
    """Templates open an answer with tokens that its place in a conversation lacks."""
    engine = SimulatedEngine(num_snapshots=8, budget=100)
    prompt = [index % 40 for index in range(length)]
    ask(engine, prompt)
    assert ask(engine, [*prompt[:-2], 41, 42, 43, 44, 45, 46]) == (length - 2) // 4 * 4


def test_a_growing_conversation_computes_only_what_is_new():
    engine = SimulatedEngine(num_snapshots=8, budget=100, encoder_rows=500, num_blocks=200, max_model_len=400)
    prompt, spans = [1, 2, 3], []
    for turn in range(5):
        spans.append(picture(f"photo {turn}", 33, len(prompt)))
        before = len(prompt)
        prompt = [*prompt, *[99] * 33, 4, 5, turn]
        cached = ask(engine, prompt, list(spans))
        # The last block of a prompt is computed again, and the answer.
        assert cached >= before - 6 - 4 if turn else cached == 0
        prompt += engine.outputs[str(engine.arrivals - 1)]


def test_another_question_about_a_picture_goes_on_at_its_end():
    engine = SimulatedEngine(num_snapshots=8, budget=100)
    prompt, spans = prompt_with(40, 3, 30), [picture("cat", 40, 3)]
    ask(engine, prompt, spans)
    other = [*prompt[:44], *[(token + 1) % 40 for token in prompt[44:]]]
    # The picture ends inside a block, whose begin is the end of the one before.
    assert ask(engine, other, spans) == 40
    assert ask(engine, other, [picture("dog", 40, 3)]) == 0
    assert ask(engine, other, spans, cache_salt="another tenant") == 0


def test_equal_prompts_of_one_step_wait_for_the_state_and_share_it():
    engine = SimulatedEngine(num_snapshots=8, budget=100)
    prompt = [index % 40 for index in range(30)]
    requests = [engine.add(str(index), prompt, seed=index) for index in range(3)]
    engine.run()
    assert [request.num_cached for request in requests] == [0, 28, 28]
    assert {tuple(engine.outputs[str(index)]) for index in range(3)} == {tuple(tokens_alone(prompt, [], 12))}


def test_the_snapshot_that_was_not_used_for_longest_is_given_up():
    engine = SimulatedEngine(num_snapshots=2, budget=100)
    # So long behind a block's end that a prompt has one snapshot.
    prompts = [[start + index for index in range(12)] for start in (0, 10, 20)]
    ask(engine, prompts[0])
    ask(engine, prompts[1])
    assert ask(engine, prompts[0]) == 8
    ask(engine, prompts[2])
    assert [ask(engine, prompts[index]) for index in (0, 2)] == [8, 8]
    assert ask(engine, prompts[1]) == 0


def test_a_block_takes_its_snapshot_with_it():
    engine = SimulatedEngine(num_snapshots=8, num_blocks=12, budget=100)
    prompt = [index % 40 for index in range(20)]
    ask(engine, prompt, max_tokens=2)
    # It needs nearly all blocks.
    ask(engine, [39 - index % 30 for index in range(38)], max_tokens=2)
    assert engine.scheduler.kv.pool.snapshots.keys() <= set(engine.scheduler.kv.pool._block_of)
    assert ask(engine, prompt, max_tokens=2) == 0


class FailsOnce:
    """A runner whose ``step``-th step raises before it computes anything."""

    def __init__(self, runner: SimulatedRunner, step: int) -> None:
        self.runner, self.left = runner, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def execute(self, batch: ScheduledBatch, grammar_mask=None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("planted")
        return self.runner.execute(batch, grammar_mask)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_snapshot_of_a_step_that_failed_is_not_used(step):
    """Two prompts of one start, so that the step has no known culprit and both are computed again."""
    engine = SimulatedEngine(num_snapshots=8, budget=12)
    engine.core.runner = FailsOnce(engine.runner, step)
    prompt = [index % 40 for index in range(20)]
    for index, ids in enumerate((prompt, [*prompt[:17], 30, 31])):
        engine.add(str(index), ids, max_tokens=6)
    engine.run()
    for index, ids in enumerate((prompt, [*prompt[:17], 30, 31])):
        if len(engine.outputs[str(index)]) > 0:
            assert engine.outputs[str(index)] == tokens_alone(ids, [], 6)
    assert ask(engine, prompt) == 16


def test_the_snapshot_of_a_step_that_failed_behind_another_request_s_blocks_is_not_used():
    engine = SimulatedEngine(num_snapshots=2, budget=100)
    prompts = [[start + index for index in range(12)] for start in (0, 10, 20, 28)]
    # Blocks of the first one stay findable; its snapshot is given up.
    for prompt in prompts[:3]:
        ask(engine, prompt)
    engine.core.runner = FailsOnce(engine.runner, 1)
    for index in (0, 3):
        engine.add(f"again {index}", prompts[index], max_tokens=6)
    engine.run()
    for index in (0, 3):
        assert engine.outputs[f"again {index}"] == tokens_alone(prompts[index], [], 6)


def test_without_rows_nothing_is_cached():
    engine = SimulatedEngine(num_snapshots=0)
    prompt = [index % 40 for index in range(30)]
    assert [ask(engine, prompt) for _ in range(2)] == [0, 0]


def test_whatever_happens_a_state_is_that_of_its_tokens(wide):
    """The simulated device compares each state with the cache's content."""

    @examples(200, wide)
    @given(requests=REQUESTS, limits=LIMITS, rows=st.integers(0, 6))
    def run(requests, limits, rows):
        engine = SimulatedEngine(max_model_len=90, num_snapshots=rows, **limits)
        after_step = engine.scheduler.kv.pool.check_integrity
        check_schedule(engine, requests, after_step=after_step, original=limits["original"])

    run()


def test_rows_of_a_pool_are_never_lost():
    pool = SnapshotPool(2)
    first = pool.take(b"a")
    assert pool.take(b"a") is None, "one snapshot of a prefix is enough"
    second = pool.take(b"b")
    assert {first, second} == {0, 1}
    # Both are made in this step, so neither can be used or given up yet.
    assert pool.take(b"c") is None and pool.find(b"a") is None and pool.is_coming(b"a")
    pool.begin_step()
    assert pool.find(b"a") == first and not pool.is_coming(b"a")
    pool.use(b"a")
    assert pool.take(b"c") == second
    pool.forget(b"c")
    pool.forget(b"c")
    pool.check_integrity()
    pool.forget_all()
    pool.check_integrity()
    assert pool.keys() == set()
