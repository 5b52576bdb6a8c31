import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.wide import examples

from .simulated import IMAGE, SimulatedEngine, picture, tokens_alone


@pytest.fixture
def short_steps(monkeypatch):
    monkeypatch.setattr("engine.scheduling.scheduler._SHORT_STEP", 4)


def prompt_with(rows: int, offset: int, length: int, start: int = 0) -> list[int]:
    ids = [(start + i) % 40 for i in range(length)]
    return ids[:offset] + [IMAGE] * rows + ids[offset:]


def test_one_request_gives_its_own_tokens():
    engine = SimulatedEngine()
    engine.add("a", [1, 2, 3, 4, 5], max_tokens=20)
    engine.run()
    assert engine.outputs["a"] == tokens_alone([1, 2, 3, 4, 5], [], 20)


def test_end_of_sequence_and_length_are_told_apart():
    engine = SimulatedEngine()
    reasons = set()
    for start in range(30):
        prompt = [start, 1, 2]
        engine.add(str(start), prompt, max_tokens=30)
        reasons.add("stop" if len(tokens_alone(prompt, [], 30)) < 30 else "length")
    engine.run()
    assert reasons == {"stop", "length"}, "the example must show both"
    for start in range(30):
        alone = tokens_alone([start, 1, 2], [], 30)
        assert engine.outputs[str(start)] == alone
        assert engine.reasons[str(start)] == ("length" if alone[-1] != 7 else "stop")


def test_pictures_of_equal_size_never_share_blocks():
    engine = SimulatedEngine()
    prompt = prompt_with(8, 4, 12)
    for key in ("cat", "dog"):
        engine.add(key, prompt, [picture(key, 8, 4)])
        engine.run()
    assert engine.scheduler.stats.cached_tokens == 4, "only the text before the picture is shared"
    for key in ("cat", "dog"):
        assert engine.outputs[key] == tokens_alone(prompt, [picture(key, 8, 4)], 12)
    engine.add("again", prompt, [picture("cat", 8, 4)])
    engine.run()
    assert engine.scheduler.stats.cached_tokens == 4 + 16
    assert engine.outputs["again"] == engine.outputs["cat"]


def test_a_picture_elsewhere_in_the_prompt_shares_nothing_from_there_on():
    engine = SimulatedEngine()
    # Placeholder tokens fill both blocks in either prompt; only the picture's place differs.
    first, second = [picture("cat", 6, 0), picture("dog", 6, 6)], [picture("dog", 6, 0), picture("cat", 6, 6)]
    for key, spans in (("1", first), ("2", second)):
        engine.add(key, [IMAGE] * 12 + [1, 2], spans)
        engine.run()
        assert engine.outputs[key] == tokens_alone([IMAGE] * 12 + [1, 2], spans, 12)
    assert engine.scheduler.stats.cached_tokens == 0


def test_tenants_share_nothing():
    engine = SimulatedEngine()
    for salt in ("a", "b", "a"):
        engine.add(f"{salt}{engine.arrivals}", list(range(12)), cache_salt=salt)
        engine.run()
    assert engine.scheduler.stats.cached_tokens == 8


def test_a_second_turn_computes_only_what_is_new():
    engine = SimulatedEngine()
    prompt = prompt_with(9, 3, 14)
    spans = [picture("cat", 9, 3)]
    engine.add("turn1", prompt, spans, max_tokens=9)
    engine.run()
    before = engine.runner.computed
    follow_up = prompt + engine.outputs["turn1"] + [3, 1, 4, 1, 5]
    request = engine.add("turn2", follow_up, spans, max_tokens=1)
    engine.run()
    # All full blocks but the one that the last answer token belongs to were computed before.
    shared = (len(prompt) + len(engine.outputs["turn1"]) - 1) // 4 * 4
    assert request.num_cached == shared
    assert engine.runner.computed - before == len(follow_up) - shared


def test_requests_of_one_step_share_their_prefix():
    engine = SimulatedEngine(budget=64)
    for key in "abc":
        engine.add(key, list(range(20)), max_tokens=5)
    engine.run()
    assert engine.scheduler.stats.cached_tokens == 2 * 16
    assert len({tuple(engine.outputs[key]) for key in "abc"}) == 1
    assert engine.outputs["a"] == tokens_alone(list(range(20)), [], 5)


def test_long_cached_prompts_enter_over_several_steps(monkeypatch):
    """Nothing of them is computed but their last block, and yet the host has to look up all others."""
    monkeypatch.setattr("engine.scheduling.scheduler._MOST_ENTERING", 30)
    engine = SimulatedEngine(budget=64, max_num_seqs=8)
    execute, entered = engine.core.runner.execute, []
    engine.core.runner.execute = lambda batch, *more: (
        entered.append(len(batch.admitted)) or execute(batch, *more)
    )
    for key in "abcdef":
        engine.add(key, list(range(20)), max_tokens=9)
    engine.run()
    assert [count for count in entered if count] == [2, 2, 2]
    assert {tuple(engine.outputs[key]) for key in "abcdef"} == {tuple(tokens_alone([*range(20)], [], 9))}


def test_the_youngest_makes_room_and_its_tokens_stay():
    engine = SimulatedEngine(num_blocks=12, max_num_seqs=4, prefix_caching=False)
    prompts = {key: [index, 11, 12] for index, key in enumerate("abcd", 20)}
    requests = {key: engine.add(key, prompt, max_tokens=25) for key, prompt in prompts.items()}
    engine.run()
    assert engine.scheduler.stats.preempted > 0
    assert requests["a"].num_preemptions == 0, "the oldest is never interrupted"
    for key, prompt in prompts.items():
        assert engine.outputs[key] == tokens_alone(prompt, [], 25)


def long_answer(start: int = 0) -> list[int]:
    """A prompt of three tokens whose answer has 60 tokens at least."""
    return next([i, 11, 12] for i in range(start, 50) if len(tokens_alone([i, 11, 12], [], 60)) == 60)


@pytest.mark.parametrize(
    ("answers", "length", "spread", "chunks"),
    [
        (1, 20, True, [7, 3, 3, 3, 3, 1]),
        (2, 20, True, [6, 6, 2, 2, 2, 2]),
        (3, 40, True, [13, 9, 5, 5, 5, 3]),
        (0, 20, True, [20]),
        (1, 20, False, [20]),
    ],
)
def test_prompts_are_spread_over_steps_beside_answers(short_steps, answers, length, spread, chunks):
    engine = SimulatedEngine(budget=64, prefix_caching=False, spreads_prompts=spread)
    for index in range(answers):
        engine.add(str(index), long_answer(10 * index), max_tokens=40)
    engine.step()
    request = engine.add("new", list(range(length)), max_tokens=1)
    found = []
    while sum(found) < length:
        batch = engine.scheduler.schedule()
        assert len(batch.decode_slots) == answers
        found += [chunk.count for chunk in batch.prefills if chunk.request is request]
    assert found == chunks


def test_a_picture_that_attends_both_ways_is_not_kept_waiting_by_short_steps(short_steps):
    engine = SimulatedEngine(budget=64, prefix_caching=False, spreads_prompts=True)
    engine.add("running", long_answer(), max_tokens=40)
    engine.step()
    prompt, spans = prompt_with(12, 0, 1), [picture("cat", 12, 0)]
    shown = engine.add("shown", prompt, spans, max_tokens=2, both_ways=[(0, 12)])
    for step in range(30):
        engine.add(f"small {step}", [step], max_tokens=1)
        engine.step()
    assert shown.finished


@pytest.mark.parametrize(
    ("beside", "length", "enters"), [(True, 20, True), (True, 23, False), (False, 23, True)]
)
def test_a_request_beside_others_leaves_them_a_block_to_grow(beside, length, enters):
    """A running answer has one of seven blocks; 23 tokens would take all the others."""
    engine = SimulatedEngine(num_blocks=8 if beside else 7, prefix_caching=False, budget=40)
    if beside:
        engine.add("running", long_answer(), max_tokens=20)
        engine.step()
        assert engine.scheduler.kv.pool.num_free == 6
    request = engine.add("new", list(range(length)), max_tokens=1)
    batch = engine.scheduler.schedule()
    assert (request in [admission.request for admission in batch.admitted]) == enters


@pytest.mark.parametrize(("length", "enters"), [(784, True), (785, False)])
def test_a_large_pool_keeps_a_hundredth_free(length, enters):
    """Of 200 blocks of four tokens a running answer has one. Three are kept, so a prompt may take 196."""
    engine = SimulatedEngine(num_blocks=201, prefix_caching=False, budget=1024, max_model_len=1024)
    engine.add("running", long_answer(), max_tokens=20)
    engine.step()
    request = engine.add("new", [*range(length)], max_tokens=1)
    batch = engine.scheduler.schedule()
    assert (request in [admission.request for admission in batch.admitted]) == enters


def test_what_a_victim_was_given_in_its_last_step_does_not_reach_the_device():
    engine = SimulatedEngine(num_blocks=4, max_num_seqs=3, prefix_caching=False, run_ahead=0)
    # Both want the last free block in the same step. The first slot is asked first, but its request matters
    # less and has to give way.
    low = engine.add("low", long_answer(), max_tokens=5, priority=1)
    engine.step()
    high = engine.add("high", [9, *long_answer(20)], max_tokens=6)
    engine.step()
    assert (low.slot, high.slot) == (0, 1)
    given = list(low.blocks)
    grow, grown = engine.scheduler.kv.grow, []
    engine.scheduler.kv.grow = lambda request: grown.append(request.id) or grow(request)
    engine.step()
    assert grown == ["low", "high", "high"] and low.blocks == [] != given and low.num_preemptions == 1
    assert [update.slot for update in engine.runner.steps[-1].table_updates] == [1]
    engine.run()
    assert engine.outputs["low"] == tokens_alone(long_answer(), [], 5)
    assert engine.outputs["high"] == tokens_alone([9, *long_answer(20)], [], 6)


def test_priority_goes_first_and_is_interrupted_last():
    engine = SimulatedEngine(max_num_seqs=1)
    engine.add("first", [1, 2], max_tokens=3)
    engine.step()
    engine.add("low", [1, 3], priority=5)
    engine.add("high", [1, 4], priority=-5)
    order = []
    while engine.core.has_work:
        engine.step()
        order += [key for key in engine.reasons if key not in order]
    assert order == ["first", "high", "low"]


def ends_of(engine: SimulatedEngine) -> list[str]:
    """Run to the end; the requests in the order of their ends."""
    order: list[str] = []
    while engine.core.has_work:
        engine.step()
        order += [key for key in engine.reasons if key not in order]
    engine.core.check_integrity()
    return order


def test_late_requests_make_way_for_those_that_can_be_in_time():
    engine, now = SimulatedEngine(max_num_seqs=1), time.monotonic()
    engine.add("first", [1, 2], max_tokens=3, deadline=now + 1e6)
    engine.step()
    late = [engine.add(key, [1, 3], deadline=now - 5.0) for key in ("late", "aborted")]
    engine.add("in time", [1, 4], deadline=now + 1e6)
    engine.add("urgent", [1, 5], deadline=now + 1e7, priority=-1)
    engine.core.abort(late[1])
    assert [request.id for request in engine.scheduler.waiting if request.deadline < now] == ["late"]
    assert ends_of(engine) == ["first", "urgent", "in time", "late"]
    assert engine.scheduler.num_late == 1
    assert engine.outputs["late"] == tokens_alone([1, 3], [], 12)


def test_an_answer_that_has_begun_is_never_late():
    """A preempted one, and one that another engine has begun, go on first whatever their deadlines were."""
    engine, now = SimulatedEngine(max_num_seqs=1), time.monotonic()
    begun = engine.add("begun", [1, 2], deadline=now - 5.0)
    engine.step()
    engine.step()
    engine.add("in time", [1, 4], deadline=now + 1e6)
    engine.scheduler.preempt(begun)
    resumed = Request(
        "resumed",
        [1, 6, *tokens_alone([1, 6], [], 2)],
        2,
        SamplingParams(temperature=0.0),
        max_total=14,
        stop_ids=begun.stop_ids,
        arrival=1.5,
        deadline=now - 5.0,
    )
    engine.outputs["resumed"] = []
    engine.core.add(resumed)
    assert ends_of(engine) == ["begun", "resumed", "in time"]
    assert engine.outputs["begun"] == tokens_alone([1, 2], [], 12)
    assert engine.outputs["resumed"] == tokens_alone([1, 6], [], 12)[2:]


def test_long_prompts_never_hold_up_running_answers():
    engine = SimulatedEngine(budget=8, max_num_seqs=7, num_blocks=400, run_ahead=0)
    runner = next(
        engine.add(str(start), [start, 9], max_tokens=60)
        for start in range(40)
        if len(tokens_alone([start, 9], [], 60)) == 60
    )
    engine.step()
    for index in range(5):
        engine.add(f"long{index}", [(index + i) % 40 for i in range(90)], max_tokens=2)
    while not runner.finished:
        before = len(engine.outputs[runner.id])
        engine.step()
        assert len(engine.outputs[runner.id]) == before + 1, "a token in every step"
    engine.run()


def test_aborted_anywhere_leaves_nothing_behind():
    for when in range(12):
        engine = SimulatedEngine(max_num_seqs=2, budget=8)
        requests = [
            engine.add(key, prompt_with(6, 2, 20), [picture("p", 6, 2)], max_tokens=9) for key in "abc"
        ]
        for _ in range(when):
            engine.step()
        for request in requests:
            engine.core.abort(request)
        engine.run()


def test_what_can_never_run_is_refused():
    engine = SimulatedEngine(num_blocks=5, block_size=4, encoder_rows=10)
    assert engine.scheduler.max_model_len == 16
    with pytest.raises(ContextLengthExceeded, match=r"16 tokens.*17 in the prompt"):
        engine.add("long", list(range(17)))
    with pytest.raises(InvalidRequest, match=r"12 visual tokens.*max_encoder_tokens is 10"):
        engine.add("rows", prompt_with(12, 1, 2), [picture("p", 12, 1)])
    engine.add("fits", list(range(15)), max_tokens=50)
    engine.run()
    assert len(engine.outputs["fits"]) == 1


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_an_answer_beyond_the_original_context_is_computed_again_once(run_ahead, prefix_caching):
    """All keys of a sequence have the same rotary frequencies; cached keys with others aren't used."""
    engine = SimulatedEngine(original=20, run_ahead=run_ahead, budget=64, prefix_caching=prefix_caching)
    lengths = {"within": 5, "crosses": 15, "at the end": 20, "beyond": 21}

    def answers(first: int) -> dict[str, list[int]]:
        prompts = {key: list(range(first, first + length)) for key, length in lengths.items()}
        return {key: tokens_alone(prompt, [], 12, original=20) for key, prompt in prompts.items()}

    # Prompts whose answers have their full length.
    first = next(n for n in range(50) if all(len(tokens) == 12 for tokens in answers(n).values()))
    for key, length in lengths.items():
        engine.add(key, list(range(first, first + length)), max_tokens=12)
    engine.run()
    assert engine.outputs == answers(first)
    admitted = [admission.request for step in engine.runner.steps for admission in step.admitted]
    again = Counter(request.id for request in admitted)
    assert again == {"within": 1, "crosses": 2, "at the end": 2, "beyond": 1}
    if not prefix_caching:
        # Every token but the last of each answer, and the 20 that two requests compute twice: no more, though
        # steps are enqueued ahead.
        assert engine.runner.computed == sum(length + 11 for length in lengths.values()) + 2 * 20
    assert engine.scheduler.stats.preempted == 0


def test_embedding_rows_are_held_from_arrival_until_they_are_computed():
    engine = SimulatedEngine(encoder_rows=26, budget=4, max_num_seqs=3)
    requests = [engine.add(key, prompt_with(8, 3, 6), [picture(key, 8, 3)], max_tokens=3) for key in "abc"]
    ledger = engine.scheduler.ledger
    assert ledger.num_held == 24 and ledger.fits(2) and not ledger.fits(3)
    while engine.core.has_work:
        engine.step()
        computed = [engine.scheduler.slots.computed[r.slot] for r in requests if r.slot is not None]
        waiting = sum(r.slot is None and not r.finished for r in requests)
        assert ledger.num_held == 8 * waiting + sum(8 - min(max(0, end - 3), 8) for end in computed)
    for key in "abc":
        assert engine.outputs[key] == tokens_alone(prompt_with(8, 3, 6), [picture(key, 8, 3)], 3)


REQUESTS = st.lists(
    st.fixed_dictionaries(
        {
            "family": st.integers(0, 2),
            "length": st.integers(1, 30),
            "max_tokens": st.integers(1, 25),
            "pictures": st.lists(st.tuples(st.sampled_from("xyz"), st.integers(1, 9)), max_size=2),
            "arrives": st.integers(0, 25),
            "aborted": st.one_of(st.none(), st.integers(0, 30)),
            "priority": st.integers(-1, 1),
        }
    ),
    min_size=1,
    max_size=7,
)
LIMITS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(18, 40),
        "block_size": st.sampled_from([2, 4, 8]),
        "max_num_seqs": st.integers(1, 5),
        "budget": st.integers(2, 24),
        "run_ahead": st.integers(0, 3),
        "encoder_rows": st.integers(18, 40),
        "prefix_caching": st.booleans(),
        "original": st.one_of(st.none(), st.integers(5, 50)),
        "spreads_prompts": st.booleans(),
    }
)


def check_schedule(
    engine: SimulatedEngine,
    requests: Sequence[dict[str, Any]],
    *,
    both_ways: bool = False,
    after_step: Callable[[], object] = lambda: None,
    **rules: Any,
) -> None:
    """Run drawn ``requests``; each gets the tokens that it has alone, or the first of them if it is aborted.

    Args:
        both_ways: images attend both ways; those that no step holds are left out.
        rules: of :func:`tokens_alone`.
    """
    room = engine.scheduler.max_model_len
    wanted, running = {}, {}
    for step in range(600):
        for index, spec in enumerate(requests):
            if spec["arrives"] == step:
                ids, spans = build(spec)
                ranges = [run for span in spans for run in span.runs()] if both_ways else []
                longest = max((end - start for start, end in ranges), default=0)
                if len(ids) + 1 <= room and longest <= engine.scheduler.budget:
                    asked = {"priority": spec["priority"], "both_ways": ranges}
                    running[index] = engine.add(str(index), ids, spans, spec["max_tokens"], **asked)
                    most = min(spec["max_tokens"], room - len(ids))
                    wanted[index] = tokens_alone(ids, spans, most, both_ways=ranges, **rules)
            if spec["aborted"] == step and index in running:
                engine.core.abort(running[index])
        engine.step()
        after_step()
        if step > 31 and not engine.core.has_work:
            break
    engine.run()
    for index, tokens in wanted.items():
        got = engine.outputs[str(index)]
        assert got == (tokens if requests[index]["aborted"] is None else tokens[: len(got)])


def test_whatever_happens_tokens_are_those_of_the_request_alone(wide, short_steps):
    @examples(300, wide)
    @given(requests=REQUESTS, limits=LIMITS)
    def run(requests, limits):
        engine = SimulatedEngine(max_model_len=90, **limits)
        check_schedule(engine, requests, original=limits["original"])

    run()


BOTH_WAYS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(18, 40),
        "block_size": st.sampled_from([2, 4, 8]),
        "max_num_seqs": st.integers(1, 4),
        "budget": st.integers(9, 60),
        "run_ahead": st.integers(0, 3),
        "spreads_prompts": st.booleans(),
    }
)


def test_what_attends_both_ways_is_computed_in_one_step(wide, short_steps):
    """Pictures, or whole prompts: split over steps, resumed inside, or taken from another prompt's blocks,
    their tokens would be others."""

    @examples(150, wide)
    @given(requests=REQUESTS, limits=BOTH_WAYS, whole=st.booleans())
    def run(requests, limits, whole):
        engine = SimulatedEngine(max_model_len=90, **limits)
        room = engine.scheduler.max_model_len
        wanted = {}
        # Every prompt twice, so that the prefix cache has all of it; and as a part of a longer one.
        for index, spec in enumerate([*requests, *requests, *requests]):
            ids, spans = build(spec)
            ids = ids + ids[:3] if index >= 2 * len(requests) else ids
            ranges = [(0, len(ids))] if whole else [run for span in spans for run in span.runs()]
            if len(ids) + 1 > room:
                continue
            if max((end - start for start, end in ranges), default=0) > engine.scheduler.budget:
                with pytest.raises(InvalidRequest, match="max_num_batched_tokens"):
                    engine.add(str(index), ids, spans, spec["max_tokens"], both_ways=ranges)
                continue
            engine.add(str(index), ids, spans, spec["max_tokens"], both_ways=ranges)
            most = min(spec["max_tokens"], room - len(ids))
            wanted[index] = tokens_alone(ids, spans, most, both_ways=ranges)
            engine.step()
        engine.run()
        assert {index: engine.outputs[str(index)] for index in wanted} == wanted

    run()


def test_a_cached_picture_that_attends_both_ways_is_taken_as_a_whole():
    engine = SimulatedEngine()
    prompt, spans = prompt_with(6, 5, 16), [picture("cat", 6, 5)]
    for _ in range(2):
        engine.add(str(engine.arrivals), prompt, spans, both_ways=[(5, 11)])
        engine.run()
    assert engine.scheduler.stats.cached_tokens == 20
    # With another text behind it, the blocks end inside the picture.
    engine.add("other", [*prompt[:11], 39, *prompt[12:]], spans, both_ways=[(5, 11)])
    engine.run()
    assert engine.scheduler.stats.cached_tokens == 20 + 4


def test_a_picture_that_attends_both_ways_does_not_wait_for_all_answers():
    engine = SimulatedEngine(budget=8, max_num_seqs=7, num_blocks=400, run_ahead=0)
    long = [start for start in range(50) if len(tokens_alone([start, 9], [], 40)) == 40][:4]
    for start in long:
        engine.add(str(start), [start, 9], max_tokens=40)
    while len(engine.outputs[str(long[-1])]) < 2:
        engine.step()
    prompt, spans = prompt_with(8, 3, 6), [picture("cat", 8, 3)]
    shown = engine.add("shown", prompt, spans, max_tokens=2, both_ways=[(3, 11)])
    while not shown.finished:
        engine.step()
    assert all(len(engine.outputs[str(start)]) < 20 for start in long)
    engine.run()
    assert engine.outputs["shown"] == tokens_alone(prompt, spans, 2, both_ways=[(3, 11)])
    for start in long:
        assert engine.outputs[str(start)] == tokens_alone([start, 9], [], 40)


def build(spec: dict) -> tuple[list[int], list]:
    """A prompt whose beginning is shared by its family, with pictures in its middle."""
    ids = [(spec["family"] * 3 + i) % 40 for i in range(spec["length"])]
    spans, at = [], spec["length"] // 2
    for key, rows in spec["pictures"]:
        spans.append(picture(f"{key}{rows}", rows, at))
        ids[at:at] = [IMAGE] * rows
        at += rows
    return ids, spans
