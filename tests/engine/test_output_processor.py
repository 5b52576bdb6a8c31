"""Steps turned into text one at a time, or several together: the same comes of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks.host import MODEL
from engine.errors import RequestFailed
from engine.logprobs import LogprobTensors
from engine.metrics import EngineMetrics
from engine.output_processor import OutputProcessor
from engine.outputs import OutputDelta, StreamUpdate, TokenLogprob, Usage, merge_updates
from engine.request import Request
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvents
from engine.text.tokenizer import Tokenizer

PROMPT = [20, 30, 40]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MODEL)


def groups(tokenizer: Tokenizer) -> list[RequestGroup]:
    """Two completions of one prompt; with log-probabilities; with a stop string; one that ends early; one
    that ends when it repeats itself."""
    wanted = [{"n": 2}, {"logprobs": 2}, {"stop": [tokenizer.decode([70, 71])[1:]]}, {}]
    wanted.append({"repetition_detection": {"max_pattern_size": 2, "min_count": 2}})
    found = []
    for index, fields in enumerate(wanted):
        params = SamplingParams(temperature=0.0, max_tokens=24, **fields)
        requests = [
            Request(f"{index}/{n}", list(PROMPT), len(PROMPT), params, 64, frozenset(), choice=n)
            for n in range(params.n)
        ]
        found.append(RequestGroup(str(index), requests, Usage(prompt_tokens=len(PROMPT))))
    return found


def steps_of(requests: list[Request], seed: int) -> list[StepEvents]:
    """Return possible step events for ``requests``: not all in each step, in changing rows."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    left = {request.id: 24 if request.id[0] != "3" else 9 for request in requests}
    steps = []
    while any(left.values()):
        rows: list[Request | None] = [r for r in requests if left[r.id] and rng.random() < 0.8]
        rng.shuffle(rows)
        if rng.random() < 0.3:
            rows.insert(0, None)
        count = len(rows)
        # Pieces of characters are among them, and the stop string comes up now and then.
        tokens = np.array([rng.choice([70, 71, 200, 130, 131, 400]) for _ in rows], np.int64)
        finished = {}
        for row, request in enumerate(rows):
            if request is not None:
                left[request.id] -= 1
                if not left[request.id]:
                    finished[row] = "length"
        top = -torch.rand((count, 2), generator=generator)
        ranks = torch.arange(count) + 1
        logprobs = LogprobTensors(top[:, 0], ranks, torch.tensor([[5, 6]]).expand(count, 2), top)
        steps.append(StepEvents(rows, tokens, finished=finished, logprobs=logprobs))
    return steps


def play(
    tokenizer: Tokenizer, seed: int, sizes: list[int], interval: int = 1
) -> tuple[dict[str, StreamUpdate], dict, list[str]]:
    """All updates of each group as one, by id; what was counted, and who was stopped."""
    metrics = EngineMetrics()
    outputs = OutputProcessor(tokenizer, metrics, interval)
    wanted = groups(tokenizer)
    for group in wanted:
        outputs.add(group)
    steps = steps_of([request for group in wanted for request in group.requests], seed)
    merged: dict[str, StreamUpdate] = {}
    stops: list[str] = []
    first = 0
    while first < len(steps):
        size = sizes[first % len(sizes)]
        updates, stopped = outputs.process(steps[first : first + size])
        first += size
        stops += [request.id for request in stopped]
        ids = [group.id for group, _ in updates]
        assert len(ids) == len(set(ids)), "a group has one update"
        for group, update in updates:
            assert isinstance(update, StreamUpdate)
            earlier = merged.get(group.id)
            ends = any(delta.finish_reason for delta in update.deltas)
            most = max(len(delta.token_ids) for delta in update.deltas)
            assert earlier is None or ends or most >= interval
            merged[group.id] = update if earlier is None else merge_updates(earlier, update)
    assert outputs.num_groups == 0
    return merged, metrics.snapshot(), stops


def test_merged_updates_grow_in_place():
    """Each of n updates is merged in O(1): whoever copied the lists would take O(n)."""
    values = [{5: TokenLogprob(-1.0)}]
    first, second, third = (
        StreamUpdate("r", [OutputDelta(0, text, [5], logprobs)], Usage(), prompt)
        for text, logprobs, prompt in [("a", None, [None]), ("b", list(values), None), ("c", values, values)]
    )
    prompt, logprobs = first.prompt_logprobs, second.deltas[0].logprobs
    merged = merge_updates(merge_updates(first, second), third)
    (delta,) = merged.deltas
    assert delta.logprobs is logprobs and logprobs == values * 2
    assert merged.prompt_logprobs is prompt and prompt == [None, *values]
    assert delta.text == "abc" and delta.token_ids == [5, 5, 5]


@pytest.mark.parametrize(
    ("sizes", "interval"),
    [([2], 1), ([8], 1), ([1, 3, 7], 1), ([1000], 1), ([1], 2), ([1], 5), ([1, 3], 1000)],
)
@pytest.mark.parametrize("seed", range(4))
def test_steps_together_give_what_they_give_one_by_one(tokenizer, seed, sizes, interval):
    apart, counted, stopped = play(tokenizer, seed, [1])
    together, counted_together, stopped_together = play(tokenizer, seed, sizes, interval)
    assert together.keys() == apart.keys() == {"0", "1", "2", "3", "4"}
    for key, update in apart.items():
        other = together[key]
        assert sorted(other.deltas, key=lambda d: d.index) == sorted(update.deltas, key=lambda d: d.index)
        assert other.usage == update.usage and other.finished and update.finished
        assert other.times is not None and update.times is not None, "the first token's time is kept"
    assert sorted(stopped_together) == sorted(stopped)
    assert apart["2"].deltas[0].stop_reason is not None, "the stop string has to come up"
    assert apart["4"].deltas[0].finish_reason == "repetition"
    for name in ("requests_finished", "completion_tokens"):
        assert counted_together[name] == counted[name]
    assert counted_together["time_between_tokens_s"]["count"] == counted["time_between_tokens_s"]["count"]
    assert len(together["0"].deltas) == 2


def test_a_stop_string_in_the_text_that_comes_out_at_the_end(tokenizer):
    """Bytes that never became a character are shown as one, and that may complete a stop string."""
    outputs = OutputProcessor(tokenizer, EngineMetrics())
    half = tokenizer.encode("é")[0]
    params = SamplingParams(stop=["\ufffd"], max_tokens=1)
    request = Request("0/0", list(PROMPT), len(PROMPT), params, 64, frozenset())
    outputs.add(RequestGroup("0", [request], Usage(prompt_tokens=len(PROMPT))))
    request.finished = True
    step = StepEvents([request], np.array([half], np.int64), finished={0: "length"})
    [(_, update)], _ = outputs.process([step])
    (delta,) = update.deltas
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("", "stop", "\ufffd")


@pytest.mark.parametrize(("size", "interval"), [(1, 1), (2, 1), (100, 1), (1, 3), (1, 100)])
def test_what_comes_before_an_error_is_given(tokenizer, monkeypatch, size, interval):
    metrics = EngineMetrics()
    outputs = OutputProcessor(tokenizer, metrics, interval)
    group = groups(tokenizer)[3]
    outputs.add(group)
    (request,) = group.requests
    detokenizer = group.sequences[request.id].detokenizer
    append, left = detokenizer.append_one, 5

    def break_off(token: int) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            raise ZeroDivisionError
        return append(token)

    monkeypatch.setattr(detokenizer, "append_one", break_off)
    steps = steps_of([request], 0)
    given: list[StreamUpdate] = []
    errors, aborted = [], []
    for first in range(0, len(steps), size):
        updates, stopped = outputs.process(steps[first : first + size])
        aborted += stopped
        for _, result in updates:
            assert not errors, "nothing comes after the error"
            (given if isinstance(result, StreamUpdate) else errors).append(result)
    tokens = [token for step in steps for row, token in zip(step.requests, step.tokens, strict=True) if row]
    assert [token for update in given for token in update.deltas[0].token_ids] == tokens[:5]
    assert not any(update.finished for update in given)
    assert len(errors) == 1 and isinstance(errors[0], RequestFailed) and aborted == [request]
    assert outputs.num_groups == 0 and metrics.snapshot()["requests_finished"] == 0
