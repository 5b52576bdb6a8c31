"""Sampling parameters, through the whole engine."""

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

from engine import LLM, SamplingParams
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.sampling_params import StructuredSpec

from . import tiny

POCKET = Path(__file__).parent.parent.parent / "models" / "pocket"
PROMPT = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(POCKET), max_model_len=512, max_num_seqs=64)


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> tuple[Path, LLM]:
    """Random weights: many tokens are likely, so that parameters make a difference."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.make_qwen2_vl(path, seed=5)
    return path, LLM(str(path), max_model_len=256)


def one(llm: LLM, prompt: str = PROMPT, **options):
    (output,) = llm.generate(prompt, SamplingParams(**{"temperature": 0.0} | options), use_tqdm=False)
    return output


def test_the_seed_decides_whatever_the_batch(spread):
    _, llm = spread
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=20)
    alone = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids
    others = [SamplingParams(temperature=1.0, seed=seed, max_tokens=20) for seed in range(6)]
    batch = llm.generate([PROMPT] * 7, [*others, params], use_tqdm=False)
    assert batch[-1].outputs[0].token_ids == alone
    assert len({tuple(o.outputs[0].token_ids) for o in batch}) == 7


def test_n_sequences_differ_and_share_their_prompt(spread):
    _, llm = spread
    before = llm.metrics()["computed_tokens"]
    long = PROMPT + "hello world " * 15
    output = one(llm, long, temperature=1.0, seed=3, n=4, max_tokens=5)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in output.outputs}) == 4
    computed = llm.metrics()["computed_tokens"] - before
    assert computed < 2 * len(output.prompt_token_ids), "the prompt is computed once"
    again = one(llm, long, temperature=1.0, seed=3, n=4, max_tokens=5)
    assert [o.token_ids for o in again.outputs] == [o.token_ids for o in output.outputs]


def test_logprobs_are_those_of_transformers(spread):
    path, llm = spread
    output = one(llm, max_tokens=8, logprobs=5, prompt_logprobs=3)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [*output.prompt_logprobs, *output.outputs[0].logprobs]
    assert found[0] is None and len(found) == len(ids)
    for place in range(1, len(ids)):
        row, reference = found[place], wanted[place - 1]
        count = 3 if place < len(output.prompt_token_ids) else 5
        assert next(iter(row)) == ids[place], "the token itself comes first"
        assert row[ids[place]].rank == int((reference > reference[ids[place]]).sum()) + 1
        assert set(reference.topk(count).indices.tolist()) <= set(row)
        for token, value in row.items():
            assert value.logprob == pytest.approx(float(reference[token]), abs=2e-4)
    assert output.outputs[0].cumulative_logprob == pytest.approx(
        sum(float(wanted[i - 1][ids[i]]) for i in range(len(output.prompt_token_ids), len(ids))), abs=1e-3
    )


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"stop_token_ids": [100]}, {"eos_token_id": [2, 100]}),
        ({"min_tokens": 15}, {"min_new_tokens": 15}),
        ({"logit_bias": {50: 6.0, 60: -7.0}}, {"sequence_bias": [[[50], 6.0], [[60], -7.0]]}),
        ({"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 1}),
        ({"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 2}),
    ],
    ids=["repetition", "stop ids", "min_tokens", "bias", "no token twice", "no pair twice"],
)
def test_greedy_tokens_are_those_of_transformers(spread, options, change):
    path, llm = spread
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    output = one(llm, max_tokens=20, **options)
    inputs = torch.tensor([output.prompt_token_ids])
    wanted = model.generate(input_ids=inputs, max_new_tokens=20, do_sample=False, **change)
    assert output.outputs[0].token_ids == wanted[0, inputs.shape[1] :].tolist()


def test_what_a_checkpoint_forbids_is_what_transformers_forbids(spread, tmp_path):
    """Each field of generation_config.json forbids a token of the answer before, so that all matter."""
    folder = shutil.copytree(spread[0], tmp_path / "checkpoint")
    file = folder / "generation_config.json"
    config = json.loads(file.read_text()) | {"do_sample": False, "max_new_tokens": 24}
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    # The prompt repeats itself, for n-grams that begin in it.
    prompt = PROMPT + "hello world hello"
    answers = []
    for field, value in (
        ("max_new_tokens", lambda tokens: 24),
        ("min_new_tokens", lambda tokens: len(tokens) + 4),
        ("begin_suppress_tokens", lambda tokens: [tokens[0], -1]),
        ("suppress_tokens", lambda tokens: [tokens[1], 10**6]),
        ("bad_words_ids", lambda tokens: [[tokens[2]], tokens[4:6], config["eos_token_id"][:1]]),
        ("no_repeat_ngram_size", lambda tokens: 2),
        ("repetition_penalty", lambda tokens: 1.4),
        ("sequence_bias", lambda tokens: [[[tokens[3]], -8.0]]),
    ):
        config[field] = value(answers[-1] if answers else [])
        file.write_text(json.dumps(config))
        checkpoint = LLM(str(folder), max_model_len=256)
        output = checkpoint.generate(prompt, use_tqdm=False)[0]
        inputs = torch.tensor([output.prompt_token_ids])
        model.generation_config = GenerationConfig(**config)
        wanted = model.generate(input_ids=inputs)[0, inputs.shape[1] :].tolist()
        assert output.outputs[0].token_ids == wanted, field
        answers.append(wanted)
    assert len(set(map(tuple, answers))) > 6


def test_penalties_against_their_formulas(spread):
    """Each step's logits minus presence and frequency terms, by hand from the model's own logits."""
    path, llm = spread
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    output = one(llm, max_tokens=15, presence_penalty=1.5, frequency_penalty=0.8, ignore_eos=True)
    prompt, made = list(output.prompt_token_ids), []
    for token in output.outputs[0].token_ids:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + made])).logits[0, -1].tolist()
        for seen in set(made):
            logits[seen] -= 1.5 + 0.8 * made.count(seen)
        assert logits.index(max(logits)) == token
        made.append(token)


def test_allowed_tokens_and_bad_words(spread):
    _, llm = spread
    allowed = [30, 31, 32]
    output = one(llm, temperature=1.0, allowed_token_ids=allowed, max_tokens=20, seed=1)
    assert set(output.outputs[0].token_ids) <= set(allowed)
    tokenizer = llm.get_tokenizer()
    plain = one(llm, max_tokens=12, ignore_eos=True).outputs[0]
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in plain.token_ids]
    banned = next(piece for piece in pieces if piece.strip() and piece.isascii())
    output = one(llm, max_tokens=12, bad_words=[banned], ignore_eos=True)
    ids = tokenizer.encode(banned, add_special_tokens=False)
    assert not any(output.outputs[0].token_ids[i : i + len(ids)] == ids for i in range(12))


def test_stops(llm):
    whole = one(llm, max_tokens=60).outputs[0]
    assert whole.finish_reason == "stop" and "simple pictures" in whole.text
    cut = one(llm, max_tokens=60, stop=[" pictures"]).outputs[0]
    assert cut.text == whole.text[: whole.text.index(" pictures")]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", " pictures")
    kept = one(llm, max_tokens=60, stop=[" pictures"], include_stop_str_in_output=True).outputs[0]
    assert kept.text == cut.text + " pictures"
    on = one(llm, max_tokens=60, ignore_eos=True).outputs[0]
    assert on.finish_reason == "length" and len(on.token_ids) == 60
    # Without max_tokens an answer may fill the context.
    filled = one(LLM(str(POCKET), max_model_len=96), max_tokens=None, ignore_eos=True)
    assert len(filled.prompt_token_ids) + len(filled.outputs[0].token_ids) == 96


SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
        "plain": {"type": "boolean"},
    },
    "required": ["shape", "count", "words", "plain"],
    "additionalProperties": False,
}


def test_an_answer_under_a_schema_always_parses(spread):
    """Two hundred answers of random weights, which alone would write nonsense."""
    path, _ = spread
    llm = LLM(str(path), max_model_len=1024, max_num_seqs=64)
    params = SamplingParams(
        temperature=1.5,
        max_tokens=900,
        n=50,
        seed=1,
        structured=StructuredSpec(kind="json_schema", text=json.dumps(SCHEMA)),
    )
    prompts = [PROMPT + "hello world" * count for count in range(4)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [completion for output in outputs for completion in output.outputs]
    assert len(answers) == 200
    for answer in answers:
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert len({answer.text for answer in answers}) > 100
    llm.check_integrity()


@pytest.mark.parametrize("run_ahead", [0, 2])
@pytest.mark.parametrize(
    ("kind", "text", "right"),
    [
        ("choice", '["left", "right"]', lambda t: t in ("left", "right")),
        ("regex", r"[A-C]{3}-\d{2}", lambda t: len(t) == 6 and t[3] == "-" and t[4:].isdigit()),
        ("grammar", 'start: "x" y+ "z"\ny: "ab" | "cd"', lambda t: t[0] + t[-1] == "xz" and len(t) % 2 == 0),
    ],
    ids=["choice", "regex", "grammar"],
)
def test_constraints_beside_free_requests(run_ahead, kind, text, right):
    llm = LLM(str(POCKET), max_model_len=512, run_ahead=run_ahead, max_num_batched_tokens=64)
    bound = SamplingParams(
        temperature=1.2, seed=4, max_tokens=300, structured=StructuredSpec(kind=kind, text=text)
    )
    free = SamplingParams(temperature=0.0, max_tokens=30)
    outputs = llm.generate([PROMPT] * 6, [bound, free] * 3, use_tqdm=False)
    assert len({output.outputs[0].text for output in outputs[1::2]}) == 1
    for output in outputs[::2]:
        if output.outputs[0].finish_reason == "stop":
            assert right(output.outputs[0].text)
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs[::2])
    llm.check_integrity()


def test_any_json_object(llm):
    """Nothing says what should be in it, so what ends strings and objects is made more likely."""
    encode = llm.get_tokenizer().encode
    params = SamplingParams(
        temperature=0.8,
        seed=2,
        n=16,
        max_tokens=120,
        logit_bias={encode(mark)[0]: 6.0 for mark in '":}'},
        structured=StructuredSpec(kind="json_object"),
    )
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    assert all(answer.text.startswith("{") for answer in output.outputs)
    ended = [json.loads(a.text) for a in output.outputs if a.finish_reason == "stop"]
    assert ended and all(isinstance(value, dict) for value in ended)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"structured": StructuredSpec(kind="json_schema", text="{")}, "schema"),
        ({"structured": StructuredSpec(kind="regex", text="(")}, "regex"),
        ({"max_tokens": 5000}, "context"),
        ({"stop_token_ids": [10**6]}, "vocabulary"),
        ({"allowed_token_ids": [-1]}, "vocabulary"),
    ],
)
def test_what_cannot_be_is_refused_and_costs_nothing(llm, options, error):
    before = llm.metrics()["computed_tokens"]
    with pytest.raises((InvalidRequest, ContextLengthExceeded), match=error):
        one(llm, **options)
    assert llm.metrics()["computed_tokens"] == before
    assert one(llm, max_tokens=3).outputs[0].token_ids
    llm.check_integrity()
