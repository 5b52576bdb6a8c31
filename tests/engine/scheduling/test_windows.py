"""Groups of layers with sliding windows: they give blocks back, and tokens stay those of a request alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.windows import decoder_of, tokens_held
from engine.layers.layer_groups import LayerGroups
from tests.engine.scheduling.simulated import SimulatedEngine, tokens_alone
from tests.engine.scheduling.test_scheduler import LIMITS, REQUESTS, check_schedule
from tests.wide import examples

WINDOWS = st.sampled_from([(None, 5), (None, 1), (6,), (None, 3, 9, 3), (7, None, 7), (None, 60)])


def test_whatever_happens_tokens_are_those_of_the_request_alone(wide):
    """Also with so few blocks that prompts wait for each other's, and with images that attend both ways."""

    @examples(300, wide)
    @given(requests=REQUESTS, limits=LIMITS, windows=WINDOWS, few=st.booleans(), both_ways=st.booleans())
    def run(requests, limits, windows, few, both_ways):
        if few:
            limits = {**limits, "num_blocks": limits["num_blocks"] // 3}
        engine = SimulatedEngine(max_model_len=90, windows=windows, **limits)
        rules = {"original": limits["original"], "windows": windows}
        check_schedule(engine, requests, both_ways=both_ways, **rules)

    run()


def test_an_answer_keeps_the_blocks_of_its_window_only():
    windows = (None, 6)
    engine = SimulatedEngine(windows=windows, num_blocks=100, prefix_caching=False, run_ahead=0)
    prompt = long_prompt(40, 60, windows)
    request = engine.add("a", prompt, max_tokens=60)
    held = []
    for _ in range(70):
        engine.step()
        if request.blocks:
            # Blocks that were given back have left the device's table too: others write there.
            table = engine.runner.tables[request.slot]
            for group, blocks in enumerate(request.blocks):
                given_back = [place for place, block in enumerate(blocks) if not block]
                assert all(table.get((group, place), 0) == 0 for place in given_back)
            held.append([sum(map(bool, blocks)) for blocks in request.blocks])
    # A step's tokens and a window are 5 and 2 blocks, which may begin and end within one. An answer may have
    # 16 blocks in reserve.
    assert max(windowed for _, windowed in held[:3]) <= 8
    assert held[-1][0] >= 25 and max(windowed for _, windowed in held) <= 16 + 3
    assert request.finished and engine.scheduler.kv.pool.num_free == 199


def test_a_prompt_is_found_where_the_last_blocks_of_the_window_still_are():
    engine = SimulatedEngine(windows=(None, 6), num_blocks=30, budget=100)
    pool, prompt = engine.scheduler.kv.pool, list(range(40))
    engine.add("first", prompt, max_tokens=1)
    engine.run()
    # Ten blocks of each group. The next token, at 36, sees keys from 31 on: blocks 7 and 8.
    (full, windowed) = engine.scheduler.kv.cached_prefix(engine.add("second", prompt, max_tokens=1))
    assert all(full) and [bool(block) for block in windowed] == [False] * 7 + [True] * 2
    engine.run()
    assert engine.scheduler.stats.cached_tokens == 36
    pool.withdraw(windowed[7])
    engine.add("third", prompt, max_tokens=1)
    engine.run()
    # 28 is the last place before block 7; the token there sees blocks 5 and 6.
    assert engine.scheduler.stats.cached_tokens == 36 + 28


def test_prompts_that_wait_for_each_others_blocks_go_on():
    """Each has its blocks of the group without a window, and none for its next chunk in the others."""
    engine = SimulatedEngine(windows=(None, 8, 8), num_blocks=30, budget=12, max_num_seqs=2, run_ahead=0)
    pool = engine.scheduler.kv.pool
    prompts = {key: [start + i % 9 for i in range(45)] for key, start in (("a", 0), ("b", 20))}
    # The first leaves a part of each step to the second.
    rules = {"a": {"both_ways": [(8, 18), (18, 28)]}, "b": {}}
    for key, prompt in prompts.items():
        engine.add(key, prompt, max_tokens=3, **rules[key])
    engine.step()
    assert engine.scheduler.num_running == 2
    # As if answers had grown into all free blocks.
    taken = pool.allocate(pool.num_free)
    for _ in range(20):
        engine.step()
        if engine.scheduler.num_running == 1:
            break
    assert engine.scheduler.stats.preempted == 1 and not engine.outputs["a"]
    pool.release(taken)
    engine.run()
    for key, prompt in prompts.items():
        assert engine.outputs[key] == tokens_alone(prompt, [], 3, windows=(None, 8, 8), **rules[key])


@pytest.mark.parametrize("windows", [(None,), (None, 6), (6,), (None, 6, 6, 6, 6, 6)])
def test_the_longest_sequence_runs_alone(windows):
    engine = SimulatedEngine(windows=windows, num_blocks=13, budget=8, max_model_len=10_000)
    length = engine.scheduler.max_model_len - 20
    prompt = long_prompt(length, 20, windows)
    engine.add("a", prompt, max_tokens=20)
    engine.run()
    assert engine.outputs["a"] == tokens_alone(prompt, [], 20, windows=windows)
    assert not engine.scheduler.stats.preempted


def long_prompt(length: int, answer: int, windows: tuple[int | None, ...]) -> list[int]:
    """A prompt whose answer does not end before ``answer`` tokens."""
    prompts = ([number, *range(1, length)] for number in range(50))
    return next(p for p in prompts if len(tokens_alone(p, [], answer, windows=windows)) == answer)


@pytest.mark.parametrize("shape", ["4B", "12B", "27B"])
def test_five_layers_with_windows_of_six_hold_three_times_the_tokens(shape):
    decoder, context, memory = decoder_of(shape), 32768, 20 << 30
    kept, given_back = (
        tokens_held(decoder, groups, context, memory)
        for groups in (LayerGroups.single(decoder), LayerGroups.of(decoder, decoder.max_position))
    )
    assert given_back >= 3 * kept > 0
