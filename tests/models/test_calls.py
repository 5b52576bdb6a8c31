"""Conversations with tools and JSON: their truth, their prompts, and what is learned of them."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.parsers.events import CallArguments, CallStart
from engine.parsers.formats import tool_format_of
from models import calls, eval_calls, pocket_format, scenes
from models.calls import Dialogue
from models.mix import mixed

POCKET = Path(__file__).parents[2] / "models" / "pocket-tools"
GRID = (8, 8)


@pytest.fixture(scope="module")
def core() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


def drawn(count: int) -> list[Dialogue]:
    """Of every kind equally many."""
    kinds = [lambda rng, size: calls.text_dialogue(rng), calls.picture_dialogue, *calls.PICTURE_DIALOGUES]
    return [kinds[index % len(kinds)](random.Random(index), (100, 100)) for index in range(count)]


def made(message: calls.Message) -> list[tuple[str, calls.Values]]:
    """The calls of a message."""
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], function["arguments"]) for function in functions]


def test_prompts_are_those_of_the_chat_template(core: Tokenizer) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(POCKET)
    for dialogue in drawn(60):
        text = tokenizer.apply_chat_template(dialogue.messages, tools=dialogue.tools or None, tokenize=False)
        expanded = text.replace("<|image_pad|>", "<|image_pad|>" * 16)
        assert tokenizer(expanded)["input_ids"] == pocket_format.encode_dialogue(core, dialogue, GRID).ids


def test_the_parser_reads_what_the_template_writes(core: Tokenizer) -> None:
    found = tool_format_of((POCKET / "chat_template.jinja").read_text())
    assert found is not None and found.name == "hermes"
    seen = 0
    for dialogue in drawn(60):
        for message in dialogue.messages:
            if made(message):
                text = "".join(piece for piece, _ in pocket_format.dialogue_pieces(Dialogue([], [message])))
                text = text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
                parser = found.parser({})
                events = [*parser.feed(text), *parser.finish()]
                names = [event.name for event in events if isinstance(event, CallStart)]
                arguments = "".join(e.text for e in events if isinstance(e, CallArguments))
                assert names == [name for name, _ in made(message)]
                assert arguments == "".join(json.dumps(values) for _, values in made(message))
                assert len(events) == 2 * len(names)
                seen += 1
    assert seen > 20


def test_calls_follow_the_schemas_of_their_tools() -> None:
    types = {"string": str, "integer": int, "number": int}
    for dialogue in drawn(120):
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in dialogue.tools}
        assert len(schemas) == len(dialogue.tools)
        for name, arguments in [call for message in dialogue.messages for call in made(message)]:
            properties = schemas[name]["properties"]
            assert list(arguments) == list(properties)
            for key, value in arguments.items():
                assert type(value) is types[properties[key]["type"]]


def test_only_answers_are_learned_and_of_forced_ones_only_values(core: Tokenizer) -> None:
    for dialogue in drawn(120):
        row = pocket_format.encode_dialogue(core, dialogue, GRID)
        assert len(row.ids) == len(row.labels) == row.positions.shape[1]
        learned = core.decode([label for label in row.labels if label >= 0], skip_special_tokens=False)
        answers = [message for message in dialogue.messages if message["role"] == "assistant"]
        if not dialogue.values_only:
            written = "".join(
                piece for piece, learn in pocket_format.dialogue_pieces(dialogue) if learn is not False
            )
            assert learned == written and learned.count("<|im_end|>") == len(answers)
            continue
        values = made(answers[0])[0][1] if made(answers[0]) else json.loads(answers[0]["content"])
        assert not any(f'"{key}"' in learned for key in values)
        for value in values.values():
            if not isinstance(value, list):
                assert (json.dumps(value).strip('"') if isinstance(value, str) else str(value)) in learned


def test_facts_are_those_of_the_scene() -> None:
    rng = random.Random(3)
    for _ in range(80):
        scene, shape = calls.random_scene(rng, (120, 120))
        facts = calls.facts_of(scene, shape, rng)
        if scene.text is not None:
            assert facts["text"] == scene.text
            continue
        things = [thing for thing in scene.things if shape in (None, thing.shape)]
        assert facts["count"] == len(things) >= 1
        assert {(thing.color, thing.shape) for thing in things} == {(facts["color"], facts["shape"])}


def test_training_never_shows_the_pairs_kept_out_and_evaluation_does() -> None:
    rng = random.Random(4)
    seen = set()
    for _ in range(120):
        scene, _ = calls.random_scene(rng, (100, 100))
        seen |= {(thing.color, thing.shape) for thing in scene.things}
        seen |= set(calls.uniform_pairs(rng))
    assert not seen & scenes.HELD_OUT
    assert any(calls.uniform_pairs(rng, None)[0] in scenes.HELD_OUT for _ in range(120))


@pytest.mark.parametrize("task", eval_calls.TASKS)
def test_an_answer_counts_as_right_for_its_own_question_alone(task: str) -> None:
    asked = eval_calls.evaluation_set(task, 8)
    again = eval_calls.evaluation_set(task, 8)
    assert [question.messages for question in asked] == [question.messages for question in again]
    for question in asked:
        assert not question.is_right({"content": ""}) and not question.is_right({})
        right = {"color": "red", "shape": "star", "count": 9}
        call = {"function": {"name": "report", "arguments": json.dumps(right)}}
        assert not question.is_right({"tool_calls": [call], "content": json.dumps(right)})


def test_calls_are_short_and_written_words_stay_letter_by_letter() -> None:
    grown = pocket_format.make_tool_tokenizer()
    assert grown.encode("<tool_call>", add_special_tokens=False).ids == [grown.token_to_id("<tool_call>")]
    call = '{"name": "report", "arguments": {"color": "red", "count": 3}}'
    assert len(grown.encode(call, add_special_tokens=False).ids) < 26
    for word in ("STAR", "90210"):
        assert grown.encode(word, add_special_tokens=False).tokens == list(word)


def test_a_mix_is_the_mean_of_late_weights_with_a_share_of_those_at_the_start() -> None:
    late = [{"w": torch.tensor([[1.0], [3.0], [5.0]])}, {"w": torch.tensor([[3.0], [5.0], [7.0]])}]
    found = mixed(late, {"w": torch.tensor([[10.0], [0.0]])}, 0.25)
    # The last row is a token's that the start lacks.
    assert found["w"].tolist() == [[4.0], [3.0], [6.0]]
