"""The model that ships: its tokens by the engine are those of Transformers, and its answers are right."""

import random
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from engine import LLM, SamplingParams
from models import eval_pocket, questions
from models import samples as data

from . import tiny

FOLDER = Path(__file__).parent.parent.parent / "models" / "pocket"
TOKENS = 24


@pytest.fixture(scope="module")
def conversations() -> list[tuple[list[dict], list]]:
    """Conversations of every kind, with their images."""
    rng = random.Random(11)
    drawn = [data.picture_sample(rng, (w, h)) for w, h in ((90, 131), (224, 168), (300, 140), (150, 340))]
    drawn += [data.comparison_sample(rng, (120, 190)), data.album_sample(rng, (210, 100))]
    drawn.append(data.chat_sample(rng))
    return [(_messages(sample), sample.images) for sample in drawn]


def _messages(sample: data.Sample) -> list[dict]:
    """All turns but the last answer, images where they were shown."""
    messages = []
    for number, turn in enumerate(sample.turns):
        shown = [i for i, at in zip(sample.images, sample.shown_at, strict=True) if at == number]
        parts = [{"type": "image", "image": image} for image in shown]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages[:-1]


@pytest.fixture(scope="module")
def wanted(conversations) -> list[list[int]]:
    """Greedy tokens by Transformers, one conversation at a time."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()
    found = []
    llm = LLM(str(FOLDER), max_model_len=1024)
    for messages, images in conversations:
        # The prompt of our own builder, with placeholders: its ids are compared with Transformers' elsewhere.
        text = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt
        inputs = tiny.reference_inputs(FOLDER, text, images)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    return found


@pytest.mark.parametrize("budget", [17, 512])
def test_tokens_are_those_of_transformers(conversations, wanted, budget):
    llm = LLM(str(FOLDER), max_model_len=1024, max_num_batched_tokens=budget, max_num_seqs=8)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    outputs = llm.chat([messages for messages, _ in conversations], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == wanted
    llm.check_integrity()


def test_it_sees(capsys):
    """Held-out scenes; the model card's figures come from more of them."""
    llm = LLM(str(FOLDER), max_model_len=1024)

    def ask(samples: list[data.Sample]) -> list[str]:
        conversations = [eval_pocket.messages(sample) for sample in samples]
        params = SamplingParams(temperature=0.0, max_tokens=48)
        outputs = llm.chat(conversations, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    for task, least in (("color", 0.9), ("shape", 0.9), ("count", 0.8), ("word", 0.75), ("chat", 1.0)):
        samples = data.evaluation_set(task, 24)
        right = [
            questions.is_correct(s.turns[0], given) for s, given in zip(samples, ask(samples), strict=True)
        ]
        assert sum(right) / len(right) >= least, task
