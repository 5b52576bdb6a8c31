"""Log-probabilities of an answer: texts and bytes of its tokens join up to its text."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.logprobs import LogprobTensors
from engine.metrics import EngineMetrics
from engine.output_processor import OutputProcessor
from engine.outputs import Usage
from engine.request import Request
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvents
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TOKENIZERS = {name: Tokenizer(make(), config) for name, (make, config) in KINDS.items()}


def answer(tokenizer, prompt, tokens, *, ends, group_of=1, **fields):
    """Deltas of an answer of ``tokens``, taken in ``group_of`` at a time, and what comes of its prompt."""
    params = SamplingParams(logprobs=1, prompt_logprobs=1, max_tokens=None, **fields)
    request = Request("0", list(prompt), len(prompt), params, 10_000, frozenset())
    group = RequestGroup("0", [request], Usage(prompt_tokens=len(prompt)))
    outputs = OutputProcessor(tokenizer, EngineMetrics())
    outputs.add(group)
    steps = []
    for index, token in enumerate(tokens):
        top = torch.full((1, 1), -0.5)
        values = LogprobTensors(top[:, 0], torch.tensor([2]), torch.tensor([[7]]), top)
        finished = {0: ends} if index == len(tokens) - 1 else {}
        steps.append(StepEvents([request], np.array([token]), finished=finished, logprobs=values))
    rows = torch.full((len(prompt) - 1, 1), -0.5)
    scores = LogprobTensors(rows[:, 0], torch.ones(len(rows)).long(), torch.zeros(len(rows), 1).long(), rows)
    # In two chunks, as of a long prompt.
    half = 1 + (len(prompt) - 1) // 2
    steps[0].prompt_logprobs = [
        (request, start, LogprobTensors(*(x[start - 1 : end - 1] for x in fields_of(scores))))
        for start, end in ((1, half), (half, len(prompt)))
        if end > start
    ]
    deltas, prompt_rows = [], []
    for first in range(0, len(steps), group_of):
        updates, stopped = outputs.process(steps[first : first + group_of])
        for _, update in updates:
            deltas += update.deltas
            prompt_rows += update.prompt_logprobs or []
        if stopped:
            break
    return deltas, prompt_rows


def fields_of(values):
    return values.token_logprobs, values.ranks, values.top_ids, values.top_logprobs


@pytest.mark.parametrize("name", KINDS)
def test_texts_and_bytes_join_up_to_the_answer(name):
    tokenizer = TOKENIZERS[name]
    alphabet = "the red 你😀é\n" if name != "unigram" else "the red"
    specials = st.sampled_from(["<s>", "<|im_start|>", "<tool_call>"])
    text_of = st.lists(specials | st.text(alphabet, max_size=5), max_size=6).map("".join)

    @settings(max_examples=80)
    # A token with a space and a part of the picture, of which only the space is in the answer.
    @example(text=" 😀", stop=[" "], include=True, skip=False, group_of=1, ends="stop")
    @example(text=" 😀", stop=["😀"], include=False, skip=False, group_of=1, ends="length")
    @given(
        text=text_of,
        stop=st.lists(st.text(alphabet, min_size=1, max_size=3), max_size=2),
        include=st.booleans(),
        skip=st.booleans(),
        group_of=st.integers(1, 4),
        ends=st.sampled_from(["stop", "length", "error"]),
    )
    def check(text, stop, include, skip, group_of, ends):
        prompt = tokenizer.encode("the red " + text)
        tokens = tokenizer.encode("x" + text, add_special_tokens=False)
        tokens += {"stop": [tokenizer.role_id("eos_token")], "error": [-1], "length": []}[ends]
        if len(prompt) < 2:
            return
        deltas, prompt_rows = answer(
            tokenizer, prompt, tokens, ends=ends, group_of=group_of, stop=stop,
            include_stop_str_in_output=include, skip_special_tokens=skip,
        )  # fmt: skip
        content = "".join(delta.text for delta in deltas)
        given = [token for delta in deltas for token in delta.token_ids]
        assert given == [token for token in tokens[: len(given)] if token >= 0]
        rows = [row for delta in deltas for row in delta.logprobs or []]
        assert len(rows) == len(given) and all(
            next(iter(row)) == t for row, t in zip(rows, given, strict=True)
        )
        own = [row[token] for row, token in zip(rows, given, strict=True)]
        assert b"".join(value.bytes for value in own) == content.encode()
        assert "".join(value.decoded_token for value in own if value.bytes) == content
        # Rows come with the text that they are of, or later, never before.
        so_far = shown = ""
        for delta in deltas:
            so_far += delta.text
            for token, row in zip(delta.token_ids, delta.logprobs or [], strict=True):
                shown += row[token].decoded_token if row[token].bytes else ""
            assert not stop or so_far.startswith(shown)
        assert prompt_rows[0] is None and len(prompt_rows) == len(prompt)
        scored = [row[token] for row, token in zip(prompt_rows[1:], prompt[1:], strict=True)]
        whole = tokenizer.decode(prompt)
        first = len(tokenizer.decode(prompt[:1]))
        assert "".join(value.decoded_token for value in scored) == whole[first:]

    check()


def test_an_ending_token_is_named_and_has_no_bytes():
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [tokenizer.token_id("▁the"), tokenizer.role_id("eos_token")]
    deltas, _ = answer(tokenizer, [1, 300], tokens, ends="stop")
    found = [
        row[token] for delta in deltas for token, row in zip(delta.token_ids, delta.logprobs, strict=True)
    ]
    assert [(value.decoded_token, value.bytes) for value in found] == [(" the", b" the"), ("</s>", b"")]


def test_of_a_cut_token_the_part_before_the_cut_is_left():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = [i for c in ("é", "the") for i in tokenizer.encode(c, add_special_tokens=False)]
    deltas, _ = answer(tokenizer, [1, 50], [*tokens, tokens[0]], ends="length", stop=["he"])
    assert "".join(delta.text for delta in deltas) == "ét"
    rows = [row for delta in deltas for row in delta.logprobs or []]
    values = [next(iter(row.values())) for row in rows]
    assert b"".join(value.bytes for value in values) == "ét".encode()
