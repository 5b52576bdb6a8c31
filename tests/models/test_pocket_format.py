"""The training's own preparation against Transformers' processor and model."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.graphs import Capture
from models import pocket_format, samples, scenes
from models.pocket_format import END, IMAGE, PAD
from models.train_pocket import Answerer, TransformersAsk, check_batches
from models.training import Passes, Trainee, check_pass, save
from tests.engine.rerun import rerun
from tests.engine.tiny import reference_processor


@pytest.fixture(scope="module")
def core() -> Tokenizer:
    return pocket_format.make_tokenizer()


@pytest.fixture(scope="module")
def folder(core: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket")
    torch.manual_seed(0)
    save(Trainee(pocket_format.make_model(core)), core, path)
    return path


def test_prompts_and_pixels_are_the_processor_s(core: Tokenizer, folder: Path) -> None:
    processor = reference_processor(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for seed in range(24):
        rng = random.Random(seed)
        size = scenes.random_size(rng)
        draw = samples.comparison_sample if seed % 2 else samples.picture_sample
        sample = draw(rng, size)
        ids = pocket_format.encode_sample(core, sample, pocket_format.patches(size)).ids
        question = {"type": "text", "text": sample.turns[0].question}
        content = [*({"type": "image_url", "image_url": {}} for _ in sample.images), question]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        wanted = processor(text=[prompt], images=sample.images, return_tensors="pt")
        assert wanted["input_ids"][0].tolist() == ids
        found = [torch.from_numpy(pocket_format.pixels(image).copy())[None] for image in sample.images]
        patches = torch.cat([pocket_format.patchify(picture)[0] for picture in found])
        torch.testing.assert_close(patches, wanted["pixel_values"], rtol=0, atol=1e-4)


def test_only_answers_are_learned(core: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(20):
        sample = samples.picture_sample(rng, (100, 100))
        row = pocket_format.encode_sample(core, sample, (8, 8), rng)
        ids, labels = row.ids, row.labels
        learned = [label for label in labels if label != -100]
        answers = "".join(turn.answer + "<|im_end|>" for turn in sample.turns)
        assert core.decode(learned, skip_special_tokens=False) == answers
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        assert ids.count(IMAGE) == 16
        assert row.positions.shape == (3, len(ids))


def test_padding_is_not_learned(core: Tokenizer) -> None:
    rng = random.Random(2)
    drawn = [samples.picture_sample(rng, (100, 100)) for _ in range(6)]
    batch = pocket_format.collate(core, drawn, (8, 8), rng)
    padding = torch.arange(batch["ids"].shape[1]) >= batch["lengths"][:, None]
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert (batch["ids"][padding] == PAD).all()


def test_the_vocabulary_does_not_depend_on_the_weights_of_tasks(
    core: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = dict.fromkeys(samples.TRAINING_TASKS, 1) | {"color": 1000}
    monkeypatch.setattr(samples, "TRAINING_TASKS", weights)
    assert pocket_format.make_tokenizer().to_str() == core.to_str()


def test_words_are_spelled_letter_by_letter(core: Tokenizer) -> None:
    for word in (*samples.WORDS, "QXZJV", "90210"):
        assert core.encode(word, add_special_tokens=False).tokens == list(word)


def test_the_training_pass_is_transformers_forward(core: Tokenizer) -> None:
    torch.manual_seed(1)
    trainee = Trainee(pocket_format.make_model(core))
    for parameter in trainee.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    check_pass(trainee, check_batches(core))


@dataclass
class Taught:
    """A model, and the loss and the gradients that PyTorch gives for each batch."""

    trainee: Answerer
    batches: list[dict[str, torch.Tensor]]
    wanted: list[tuple[float, list[torch.Tensor | None]]]


@pytest.fixture(scope="module")
def taught(core: Tokenizer) -> Taught:
    torch.manual_seed(2)
    trainee, batches, wanted = Answerer(pocket_format.make_model(core)), check_batches(core), []
    for batch in batches:
        trainee.zero_grad()
        loss = trainee(batch)
        loss.backward()
        wanted.append(
            (loss.item(), [None if p.grad is None else p.grad.clone() for p in trainee.parameters()])
        )
    return Taught(trainee, [*batches, *batches[::-1]], [*wanted, *wanted[::-1]])


@pytest.mark.parametrize(
    "capture", [pytest.param(None, marks=pytest.mark.wide), rerun], ids=["eager", "captured"]
)
def test_passes_leave_the_gradients_of_each_batch(taught: Taught, capture: Capture | None) -> None:
    trainee = taught.trainee
    passes = Passes(trainee, torch.amp.GradScaler("cpu", init_scale=1.0), capture, patience=1)
    for batch, (loss, gradients) in zip(taught.batches, taught.wanted, strict=True):
        assert passes(batch).item() == pytest.approx(loss, rel=1e-5)
        for parameter, gradient in zip(trainee.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-3)
    # Two of the three batches are of one shape.
    assert passes.num_captured == (0 if capture is None else 2)


def test_a_saved_checkpoint_answers_in_batches_as_alone(folder: Path) -> None:
    ask = TransformersAsk(folder, torch.device("cpu"))
    drawn = [*samples.evaluation_set("word", 2), *samples.evaluation_set("chat", 1)]
    drawn += samples.evaluation_set("two pictures", 1)
    ask.model.float()
    assert ask(drawn) == [ask([sample])[0] for sample in drawn]
    assert END in ask.model.generation_config.eos_token_id
