"""Counters and timings of an engine."""

from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.metrics import TIME_BUCKETS, EngineMetrics, Histogram, Rate
from tests.deployments.pictures import circle, square

POCKET = Path(__file__).parent.parent.parent / "models" / "pocket"


def test_histogram_counts_by_upper_bound():
    histogram = Histogram()
    for value in (0.0005, 0.001, 0.0011, 100.0):
        histogram.observe(value)
    found = histogram.snapshot()
    assert list(found["buckets"]) == list(TIME_BUCKETS)
    assert found["buckets"][0.001] == 2 and found["buckets"][0.002] == 1
    assert found["count"] == 4 and found["sum"] == pytest.approx(100.0026)


def test_rate_forgets_what_is_long_ago():
    rate = Rate(window=10)
    for second in range(20):
        rate.add(30, second + 0.25)
        rate.add(20, second + 0.75)
    assert rate.value(20.1) == 50
    assert rate.value(25.1) == 25
    assert rate.value(60.0) == 0


def test_a_rate_is_read_while_another_thread_adds():
    rate = Rate(window=10)
    rate.add(30, 7.5)
    rate.add(20, 8.5)

    class Now(float):
        """A time in whose every use the other thread gets its turn."""

        def __int__(self) -> int:
            rate.add(1, 9.5)
            return 9

    assert rate.value(Now(9.9)) == 5


def test_a_second_turn_about_two_pictures_computes_only_what_is_new():
    llm = LLM(str(POCKET), max_model_len=1024)
    params = SamplingParams(temperature=0.0, max_tokens=40)
    first = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": circle("red", (200, 200))},
                {"type": "image", "image": square("blue", (200, 200))},
                {"type": "text", "text": "Do both pictures show the same shape?"},
            ],
        }
    ]
    (answer,) = llm.chat(first, params, use_tqdm=False)
    before = llm.metrics()
    second = [
        *first,
        {"role": "assistant", "content": answer.outputs[0].text},
        {"role": "user", "content": "What does the second image show?"},
    ]
    (output,) = llm.chat(second, params, use_tqdm=False)
    after = llm.metrics()
    assert "blue square" in output.outputs[0].text
    old = len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids)
    # Whole blocks of 16 are shared, up to the last token of the first answer that was computed.
    assert output.usage.cached_tokens == (old - 1) // 16 * 16
    assert after["cached_tokens"] - before["cached_tokens"] == output.usage.cached_tokens
    new = len(output.prompt_token_ids) - output.usage.cached_tokens
    computed = after["computed_tokens"] - before["computed_tokens"]
    made = len(output.outputs[0].token_ids)
    # A step that was enqueued before the end was known may have computed one token more.
    assert new + made - 1 <= computed <= new + made + 1
    # Equal images in other places are other content.
    swapped = [{"role": "user", "content": [first[0]["content"][i] for i in (1, 0, 2)]}]
    (output,) = llm.chat(swapped, params, use_tqdm=False)
    assert output.usage.cached_tokens == 0
    llm.check_integrity()


def test_a_snapshot_has_all_that_dashboards_need():
    llm = LLM(str(POCKET), max_model_len=256)
    llm.generate(
        ["Hello"] * 3, SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), use_tqdm=False
    )
    found = llm.metrics()
    assert found["requests_finished"] == 3 and found["output_tokens"] >= 15
    assert found["completion_tokens"] == 15 and found["preempted"] == 0
    for name in ("queue_time_s", "time_to_first_token_s"):
        assert found[name]["count"] == 3
    assert found["time_between_tokens_s"]["count"] == 12
    assert EngineMetrics().snapshot().keys() <= found.keys()


def test_defaults_are_the_checkpoints():
    llm = LLM(str(POCKET), max_model_len=256)
    assert llm.get_default_sampling_params().temperature == 0.0
