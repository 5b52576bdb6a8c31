"""Decisions: questions about texts and images, answered by the probabilities of the next token."""

import math
from contextlib import aclosing
from dataclasses import replace
from string import ascii_uppercase
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from deployments import decisions
from deployments.protocol.decisions import ChoiceQuestion, PredicateQuestion
from engine.outputs import Usage
from engine.parsers.formats import REASONING_TAGS
from tests.deployments.pictures import circle, data_url, square
from tests.serving import ROOT

pytestmark = pytest.mark.usefixtures("idle_afterwards")

PATH = "/v1/decisions"
RED = {"type": "input_image", "image_url": data_url(circle("red"))}
BLUE = {"type": "input_image", "image_url": data_url(circle("blue"))}
COLOR = {
    "type": "choice",
    "instructions": "What color is it?",
    "choices": [{"value": "red"}, {"value": "blue", "description": "like the sky"}, {"value": True}],
}
COUNT = {"type": "score", "instructions": "How many?", "levels": [{"label": "none"}, {"label": "one"}]}


def predicate(*instructions, **fields) -> dict:
    asked = instructions[0] if isinstance(instructions[0], str) else list(instructions)
    return {"type": "predicate", "instructions": asked, **fields}


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


async def decide(http, *questions, **fields) -> dict:
    response = await http.post(PATH, json={"model": "pocket", "questions": questions, **fields})
    assert response.status_code == 200, response.text
    return response.json()


async def calls(http, stage: str) -> float:
    """Requests for a stage's work so far."""
    name = f'sightline_stage_requests_total{{model="pocket",outcome="ok",replica="local",stage="{stage}"}}'
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def test_an_image_answers_questions_of_openais_client(client, http):
    before = await calls(http, "preprocessor")
    questions = [
        predicate("Is there a red circle?", name="red"),
        predicate("Is there a blue circle?"),
        predicate("Is there a square?"),
    ]
    made = await client.decisions.create(model="pocket", input=user(RED), questions=questions)
    assert [answer.type for answer in made.answers] == ["predicate"] * 3
    assert [answer.name for answer in made.answers] == ["red", None, None]
    red, blue, square_ = (answer.probability for answer in made.answers)
    assert red > 0.9 and blue < 0.1 and square_ < 0.1
    # The later questions find the image in the prefix cache, and it was prepared once.
    usage = made.usage
    assert usage.input_tokens_details.cached_tokens >= 2 * 32 and usage.output_tokens == 3
    assert usage.total_tokens == usage.input_tokens + 3
    assert await calls(http, "preprocessor") == before + 1


async def test_a_question_may_show_images_of_its_own(http):
    text = {"type": "input_text", "text": "Is there a blue circle?"}
    other = {"type": "input_image", "image_url": data_url(square("red"))}
    made = await decide(http, predicate(BLUE, text), predicate(text), predicate(other, text), input=user(RED))
    probabilities = []
    for shown, answer in zip(((RED, BLUE), (RED,), (RED, other)), made["answers"], strict=True):
        (whole,) = (await decide(http, predicate(text), input=user(*shown)))["answers"]
        assert answer["probability"] == pytest.approx(whole["probability"], rel=1e-2)
        probabilities.append(answer["probability"])
    assert len(set(probabilities)) == 3


@pytest.mark.parametrize("earlier", [False, True])
async def test_probabilities_are_those_of_transformers(http, earlier):
    """Those of the tokens that spell an option, alone or behind a space, among all tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/pocket")
    model = AutoModelForImageTextToText.from_pretrained(ROOT / "models/pocket", dtype=torch.float32)
    texts = [
        "What color is it?\nA: red\nB: blue - like the sky\nC: true\nAnswer with the letter of one option.",
        "How many?\n0: none\n1: one\nAnswer with the number of one level.",
        'Is it red?\n{"a":[1]}\nAnswer yes or no.',
    ]
    options = [[["A"], ["B"], ["C"]], [["0"], ["1"]], [["yes", "Yes"], ["no", "No"]]]
    given = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A circle."}]
    if earlier:
        given.append({"role": "assistant", "content": "Yes."})
    json_part = {"type": "input_json", "data": {"a": [1]}}
    yes = predicate({"type": "input_text", "text": "Is it red?"}, json_part)
    answers = (await decide(http, COLOR, COUNT, yes, input=given))["answers"]
    vocabulary = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    for answer, text, labels in zip(answers, texts, options, strict=True):
        # A question stands in the user's last message, if that is the input's last.
        asked = [*given, {"role": "user", "content": text}]
        if not earlier:
            asked = [given[0], {"role": "user", "content": f"A circle.\n\n{text}"}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        share = torch.softmax(logits, 0)
        wanted = [
            sum(share[token].item() for token, word in enumerate(vocabulary) if word in words)
            for words in labels
        ]
        mass = sum(wanted)
        found = [each["probability"] for each in answer.get("probabilities", ())]
        if answer["type"] == "predicate":
            found = [answer["probability"], 1 - answer["probability"]]
        assert found == pytest.approx([each / mass for each in wanted], rel=1e-3)
        assert answer["confidence"] == pytest.approx(max(wanted), rel=1e-3)
        if answer["type"] == "choice":
            values = ["red", "blue", True]
            assert [each["value"] for each in answer["probabilities"]] == values
            assert answer["choice"] == values[found.index(max(found))]
        if answer["type"] == "score":
            assert answer["score"] == pytest.approx(found[1])
            assert [(e["value"], e["label"]) for e in answer["probabilities"]] == [(0, "none"), (1, "one")]


async def test_each_question_is_answered_as_if_it_were_alone(http):
    questions = COLOR, COUNT, predicate("Red?")
    together = await decide(http, *questions, input=user(RED), cache_salt="a")
    assert together["usage"]["input_tokens_details"]["cached_tokens"] > 0
    for question, answer in zip(questions, together["answers"], strict=True):
        alone = await decide(http, question, input=user(RED), cache_salt=question["type"])
        assert answer["confidence"] == pytest.approx(alone["answers"][0]["confidence"], rel=1e-3)
        # Nothing that was cached under another salt.
        assert alone["usage"]["input_tokens_details"]["cached_tokens"] == 0


async def test_few_questions_are_in_the_engine_at_a_time_with_the_requests_priority(
    http, running, monkeypatch
):
    pipeline = running.app.api.state.pipelines["pocket"]
    given, now, most, priorities = pipeline.generate, 0, 0, []

    async def generate(*args, priority, **fields):
        nonlocal now, most
        priorities.append(priority)
        now += 1
        most = max(most, now)
        try:
            async with aclosing(given(*args, priority=priority, **fields)) as updates:
                async for update in updates:
                    yield update
        finally:
            now -= 1

    monkeypatch.setattr(pipeline, "generate", generate)
    await decide(http, *[predicate("a")] * 40, input="a", priority=-3)
    assert most == decisions._AT_A_TIME and priorities == [-3] * 40


async def test_options_that_are_all_unlikely_are_compared(http, monkeypatch):
    async def next_token(pipeline, name, prompt, params, *rest):
        # As numbers both probabilities are 0. Each option's best spelling counts.
        yes, no = params.logprob_token_ids[0], params.logprob_token_ids[-1]
        row = dict.fromkeys(params.logprob_token_ids, SimpleNamespace(logprob=-2000.0))
        return row | {yes: SimpleNamespace(logprob=-800.0), no: SimpleNamespace(logprob=-801.0)}, Usage()

    monkeypatch.setattr(decisions, "_next_token", next_token)
    (answer,) = (await decide(http, predicate("a"), input="a"))["answers"]
    assert answer["probability"] == pytest.approx(1 / (1 + math.exp(-1))) and answer["confidence"] == 0


def test_each_of_many_choices_is_named_by_two_letters():
    letters = [one + other for one in ascii_uppercase for other in ascii_uppercase]
    vocabulary = {
        f"{space}{name}": 2 * i + (not space) for i, name in enumerate(letters) for space in ("", " ")
    }
    # Nothing tells these from others: AB and AC have one token, and AD the unknown one.
    unknown = 6000
    vocabulary |= {"AB": 5000, "AC": 5000, " AB": 5001, " AC": 5001, "AD": unknown, " AD": unknown}
    spellings = decisions._spellings(lambda text: [vocabulary.get(text, unknown)], unknown)
    question = {**COLOR, "choices": [{"value": f"v{i}"} for i in range(255)]}
    text, labels = decisions._options(ChoiceQuestion.model_validate(question), "questions[0]", spellings)
    *lines, _ = text.splitlines()
    names = [line.partition(": ")[0] for line in lines]
    assert names == ["AA", *letters[4:258]] and lines[254] == f"{letters[257]}: v254"
    assert labels == [[vocabulary[name], vocabulary[f" {name}"]] for name in names]


def test_a_word_that_a_vocabulary_without_capitals_knows_counts_once():
    spellings = decisions._spellings(lambda text: [{"yes": 1, "no": 2}[text.strip().lower()]], 0)
    asked = PredicateQuestion.model_validate(predicate("a"))
    assert decisions._options(asked, "questions[0]", spellings)[1] == [[1], [2]]


async def test_a_model_that_is_about_to_think_decides_nothing(http, running, monkeypatch):
    pipeline = running.app.api.state.pipelines["pocket"]
    tags = replace(REASONING_TAGS["think"], start="assistant\n")
    monkeypatch.setattr(pipeline, "format", replace(pipeline.format, reasoning=tags))
    body = {"model": "pocket", "input": user(RED), "questions": [predicate("a")]}
    before = await calls(http, "encoder")
    response = await http.post(PATH, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
    assert "thinks before" in response.json()["error"]["message"]
    # Refused before anything is encoded.
    assert await calls(http, "encoder") == before > 0


NOWHERE = {"type": "input_image", "image_url": "nowhere"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": user(NOWHERE)}, "input[0].content[0].image_url"),
        ({"input": user({"type": "input_json", "data": 3})}, "input[0].content[0].data"),
        ({"input": "a " * 3000}, "input"),
        ({"questions": [predicate("a"), predicate("a " * 3000)]}, "questions[1]"),
        ({"questions": []}, "questions"),
        ({"questions": [{"type": "guess", "instructions": "a"}]}, "questions[0]"),
        ({"questions": [{"type": "predicate"}]}, "questions[0].instructions"),
        ({"questions": [predicate("a"), predicate(RED, NOWHERE)]}, "questions[1].instructions[1].image_url"),
        ({"questions": [predicate(RED, {"type": "x"})]}, "questions[0].instructions[1].type"),
        ({"questions": [{**COLOR, "choices": [{"value": "a"}]}]}, "questions[0].choices"),
        ({"questions": [{**COLOR, "choices": [{"value": "a"}, {"value": "a"}]}]}, "questions[0].choices"),
        # Its tokenizer has few tokens of two letters.
        (
            {"questions": [{**COLOR, "choices": [{"value": str(i)} for i in range(27)]}]},
            "questions[0].choices",
        ),
        (
            {"input": user(*[RED] * 7), "questions": [predicate(RED, BLUE)]},
            "questions[0].instructions[1].image_url",
        ),
        ({"joint": True}, "joint"),
        ({"stream": True}, "stream"),
        ({"instructions": "Be brief."}, "instructions"),
        ({"temperature": 0.5}, "temperature"),
        ({"mm_processor_kwargs": {"x": 1}, "input": user(RED)}, "mm_processor_kwargs.x"),
        ({"model": "tests/vectors"}, "model"),
    ],
)
async def test_what_is_refused_is_named(http, fields, param):
    body = {"model": "pocket", "input": "a", "questions": [predicate("a")], **fields}
    response = await http.post(PATH, json=body)
    assert response.status_code in (400, 413) and response.json()["error"]["param"] == param, response.text
