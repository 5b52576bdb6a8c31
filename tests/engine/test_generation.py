"""Greedy tokens of the engine are those of Transformers' ``generate``, however they are computed."""

from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.executor import rank
from engine.runner import forward_graphs, model_runner
from tests.engine.calls import Calls, NotedGraphs
from tests.engine.rerun import rerun

from . import tiny
from .same import assert_same_output

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 12


@dataclass
class Case:
    prompt: str
    pictures: list[Image.Image]
    wanted: list[int]

    @property
    def entry(self) -> dict:
        data = {"multi_modal_data": {"image": self.pictures}} if self.pictures else {}
        return {"prompt": self.prompt, **data}


PROMPTS = [
    ("describe this image " + IMAGE, [(60, 44)]),
    (IMAGE + IMAGE + "what is shown in the pictures?", [(90, 30), (33, 70)]),
    ("hello world 0 1 2 3", []),
    (
        "a red square " + IMAGE + " on a blue " + IMAGE + " background " + IMAGE,
        [(20, 20), (64, 40), (41, 83)],
    ),
    (IMAGE, [(8, 90)]),
]


@torch.inference_mode()
def reference(path: Path, prompt: str, pictures: list[Image.Image]) -> list[int]:
    inputs = tiny.reference_inputs(path, prompt, pictures)
    model = tiny.reference_model(path)
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def make_cases(path: Path) -> list[Case]:
    cases = []
    for number, (text, sizes) in enumerate(PROMPTS):
        pictures = [tiny.picture(w, h, 10 * number + i) for i, (w, h) in enumerate(sizes)]
        prompt = TEMPLATE.format(text)
        cases.append(Case(prompt, pictures, reference(path, prompt, pictures)))
    return cases


@pytest.fixture(scope="module", params=[(False, 2), (True, 1), (False, 4)], ids=["untied", "tied", "mqa"])
def model(request, tmp_path_factory) -> tuple[Path, list[Case]]:
    tied, ratio = request.param
    path = tmp_path_factory.mktemp("qwen2_vl")
    tiny.make_qwen2_vl(path, tied=tied, gqa_ratio=ratio, seed=3)
    return path, make_cases(path)


WAYS = {
    "plain": {},
    # 17 tokens a step split every image; blocks of 4 cut them in the middle.
    "tiny budget": {"max_num_batched_tokens": 17, "max_num_seqs": 4, "block_size": 4},
    # Too few blocks for all: some are interrupted and computed again.
    "few blocks": {"num_kv_blocks": 42, "block_size": 4, "max_num_batched_tokens": 64},
    "no run-ahead": {"run_ahead": 0, "enable_prefix_caching": False},
    "far ahead": {"run_ahead": 3, "max_num_batched_tokens": 100},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(model, way):
    path, cases = model
    llm = LLM(str(path), max_model_len=190, **WAYS[way])
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    outputs = llm.generate([case.entry for case in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        assert output.outputs[0].token_ids == case.wanted
    if way == "few blocks":
        assert llm.metrics()["preempted"] > 0
    llm.check_integrity()


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", ["plain", "tiny budget", "few blocks", "far ahead"])
def test_captured_steps_give_the_same_tokens(model, monkeypatch, way):
    """Batches are padded to captured sizes and read from static tensors. On a GPU the whole file runs with
    graphs; here a replay runs the work eagerly."""
    path, cases = model
    if not torch.cuda.is_available():
        monkeypatch.setattr(rank, "make_capture", lambda device, enforce_eager: rerun)
    monkeypatch.setattr(forward_graphs, "TOKEN_STEP", 24)
    monkeypatch.setattr(forward_graphs, "FINE_TOKENS", 48)
    monkeypatch.setattr(forward_graphs, "MAX_TOKENS", 72)
    monkeypatch.setattr(forward_graphs, "FEW_SEQUENCES", 2)
    if way == "far ahead":
        # Most admissions change more than there is room for.
        monkeypatch.setattr(model_runner, "MOST_CHANGES", 3)
    llm = LLM(str(path), max_model_len=190, **{"max_num_seqs": 5, **WAYS[way]})
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for chosen in (cases, cases[:1], cases[1:3]):
        outputs = llm.generate([case.entry for case in chosen], params, use_tqdm=False)
        for case, output in zip(chosen, outputs, strict=True):
            assert output.outputs[0].token_ids == case.wanted
    llm.check_integrity()


@pytest.mark.parametrize("model", [(False, 2)], ids=["untied"], indirect=True)
def test_a_captured_step_makes_few_calls(model, monkeypatch):
    """Each call that reaches the device costs a busy host some 25 µs."""
    path, cases = model
    graphs = NotedGraphs()
    monkeypatch.setattr(rank, "make_capture", lambda device, enforce_eager: graphs)
    llm = LLM(str(path), max_model_len=190, max_num_seqs=2, max_num_batched_tokens=48, device="cpu")
    runner, noted = llm._engine.core.runner, []
    execute = runner.execute

    def execute_noted(batch, grammar_mask=None):
        before = graphs.replays
        with Calls() as calls:
            step = execute(batch, grammar_mask)
        noted.append((batch, calls.names, graphs.replays - before))
        return step

    runner.execute = execute_noted
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    llm.generate([case.entry for case in cases[:3]], params, use_tqdm=False)
    mixed = [names for batch, names, _ in noted if batch.prefills and len(batch.decode_slots)]
    # The step's arrays, embedding rows, and tokens to the host.
    assert mixed and max(map(len, mixed)) <= 4, mixed
    decodes = [names for batch, names, _ in noted if not batch.prefills]
    assert min(map(len, decodes)) == 1 and max(map(len, decodes)) <= 3, decodes
    # What changes in the tables of the device is written with the prompt's inputs, or by a replay of its own.
    assert all(replays <= (2 if batch.prefills else 3) for batch, _, replays in noted)


def test_alone_is_as_in_a_batch_and_the_second_time_is_cached(model):
    path, cases = model
    llm = LLM(str(path), max_model_len=190)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for case in cases:
        (first,) = llm.generate(case.entry, params, use_tqdm=False)
        (second,) = llm.generate(case.entry, params, use_tqdm=False)
        assert first.outputs[0].token_ids == second.outputs[0].token_ids == case.wanted
        full_blocks = (len(first.prompt_token_ids) - 1) // 16 * 16
        assert second.usage.cached_tokens == full_blocks
    llm.check_integrity()


#: Each asks for something else that an output carries.
ASKED = [
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 2, "max_tokens": TOKENS},
    {"temperature": 0.0, "prompt_logprobs": 0, "max_tokens": TOKENS, "ignore_eos": True},
    {"temperature": 1.0, "seed": 4, "n": 2, "logprobs": 0, "prompt_logprobs": 1, "max_tokens": TOKENS},
    {"temperature": 1.0, "seed": 5, "presence_penalty": 1.0, "logprobs": 5, "max_tokens": 25},
    {"temperature": 0.8, "seed": 6, "stop": ["e"], "include_stop_str_in_output": True, "max_tokens": 25},
]


@pytest.mark.parametrize("model", [(False, 2)], indirect=True, ids=["untied"], scope="module")
@pytest.mark.parametrize("way", WAYS)
def test_everything_that_an_output_carries_is_the_same(model, way):
    path, cases = model
    params = [SamplingParams(**asked) for asked in ASKED]
    alone = LLM(str(path), max_model_len=190, enable_prefix_caching=False)
    wanted = [
        alone.generate(case.entry, each, use_tqdm=False)[0] for case, each in zip(cases, params, strict=True)
    ]
    llm = LLM(str(path), max_model_len=190, **WAYS[way])
    # The second time as much as may be comes from the prefix cache.
    for _ in range(2):
        outputs = llm.generate([case.entry for case in cases], params, use_tqdm=False)
        for found, output in zip(outputs, wanted, strict=True):
            assert_same_output(found, output)
    if way == "few blocks":
        assert llm.metrics()["preempted"] > 0
    llm.check_integrity()


def prepare_at_once(work, *args) -> Future:
    """In place of a pool of threads."""
    future = Future()
    future.set_result(work(*args))
    return future


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_a_prompt_preempted_in_its_middle_is_scored_whole(tmp_path, monkeypatch, run_ahead):
    path = tiny.make_text(tmp_path, "llama")
    ids = [(i * 7) % 200 + 20 for i in range(60)]
    # The first request outgrows its blocks while the second one's prompt is computed, a few tokens a step.
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    scored = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    entries = [{"prompt_token_ids": ids[:8]}, {"prompt_token_ids": ids}]
    options = {"max_model_len": 100, "block_size": 4, "enable_prefix_caching": False}
    (wanted,) = LLM(str(path), **options).generate(entries[1], scored, use_tqdm=False)
    assert wanted.prompt_logprobs[0] is None and len(wanted.prompt_logprobs) == len(ids)
    options |= {"max_num_batched_tokens": 7, "max_num_seqs": 2, "run_ahead": run_ahead}
    in_the_middle = []
    for blocks in range(18, 24):
        llm = LLM(str(path), **options, num_kv_blocks=blocks)
        scheduler = llm._engine.core.scheduler

        def preempt(request, *, scheduler=scheduler, preempt=scheduler.preempt, **changes):
            if 0 < scheduler.slots.computed[request.slot] < request.num_prompt:
                in_the_middle.append(request)
            preempt(request, **changes)

        monkeypatch.setattr(scheduler, "preempt", preempt)
        # Both requests begin together, however busy the machine is.
        monkeypatch.setattr(llm._runner._pool, "submit", prepare_at_once)
        outputs = llm.generate(entries, [long, scored], use_tqdm=False)
        assert_same_output(outputs[1], wanted)
    assert in_the_middle


def test_a_prompt_of_one_token_has_one_entry_of_log_probabilities(tmp_path):
    llm = LLM(str(tiny.make_text(tmp_path, "llama")), max_model_len=64)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=1)
    for n in (1, 2):
        (output,) = llm.generate({"prompt_token_ids": [50]}, replace(params, n=n), use_tqdm=False)
        assert output.prompt_logprobs == [None]


def test_pictures_change_the_answer(model):
    """Else all of the above would hold for an engine that ignores them."""
    path, cases = model
    llm = LLM(str(path), max_model_len=190)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for case in cases:
        if case.pictures:
            other = [tiny.picture(*picture.size, 77) for picture in case.pictures]
            entry = {"prompt": case.prompt, "multi_modal_data": {"image": other}}
            (output,) = llm.generate(entry, params, use_tqdm=False)
            assert output.outputs[0].token_ids != case.wanted
