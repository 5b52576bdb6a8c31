"""The embedding model's data, training pass and evaluation, against Transformers and the engine."""

import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.llm import LLM
from models import eval_pocket_embed, pairs, pocket_format, questions, scenes
from models.eval_pocket_embed import messages
from models.train_pocket_embed import (
    Embedder,
    PairBatches,
    TransformersEmbed,
    check_batches,
    encode_item,
    picture_side,
)
from models.training import check_pass, prepare, save

POCKET = Path(__file__).parents[2] / "models" / "pocket"


@pytest.fixture(scope="module")
def core() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture
def embedder(core: Tokenizer) -> Embedder:
    torch.manual_seed(0)
    embedder = Embedder(pocket_format.make_model(core))
    for parameter in embedder.model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return embedder


def test_no_two_captions_are_equal_and_all_follows_from_the_seed() -> None:
    found, again, other = (pairs.retrieval_set(100, seed) for seed in (0, 0, 1))
    assert len({pair.caption for pair in found}) == 100
    assert [pair.text for pair in found] == [pair.text for pair in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(found, again, strict=True))
    assert [pair.text for pair in found] != [pair.text for pair in other]


def test_a_training_batch_has_distinct_captions_and_no_held_out_things() -> None:
    drawn = pairs.captioned_pairs(random.Random(3), 150, (96, 96))
    assert len({pair.caption for pair in drawn}) == 150
    assert {pair.image.size for pair in drawn} == {(96, 96)}
    unseen = [f"{color} {shape}" for color, shape in scenes.HELD_OUT]
    assert not any(name in pair.caption for pair in drawn for name in unseen)


def test_every_wording_says_all_of_the_caption() -> None:
    rng = random.Random(1)
    for pair in pairs.retrieval_set(40):
        wordings = {pairs.reworded(pair.caption, rng) for _ in range(80)}
        assert len(wordings) == 9
        body = questions.letters(pair.caption)[1:]
        assert all(body in questions.letters(wording) for wording in wordings)


def test_prompts_are_those_of_the_chat_template(core: Tokenizer, embedder: Embedder, tmp_path: Path) -> None:
    save(embedder, core, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for pair in pairs.retrieval_set(10):
        for item in (pair.text, pair.image):
            prompt = tokenizer.apply_chat_template(messages(item), tokenize=False)
            count = encode_item(core, item).ids.count(pocket_format.IMAGE)
            expanded = prompt.replace("<|image_pad|>", "<|image_pad|>" * count)
            assert tokenizer(expanded)["input_ids"] == encode_item(core, item).ids
        assert encode_item(core, pair.text, bare=True).ids == tokenizer(pair.text)["input_ids"]


def test_the_training_pass_is_transformers_forward(core: Tokenizer, embedder: Embedder) -> None:
    check_pass(embedder, check_batches(core))


def test_training_vectors_are_transformers_and_the_engine_s(
    core: Tokenizer, embedder: Embedder, tmp_path: Path
) -> None:
    drawn = pairs.captioned_pairs(random.Random(4), 3, (120, 160))
    items = [item for pair in drawn for item in (pair.text, pair.image)]
    embedder.model.to(torch.bfloat16).float()
    rows = [encode_item(core, item) for item in items]
    texts = pocket_format.stack(rows[::2], [])
    pictures = pocket_format.stack(rows[1::2], items[1::2])
    check_pass(embedder, [texts, pictures])
    with torch.no_grad():
        trained = torch.stack([embedder.vectors(texts), embedder.vectors(pictures)], 1).flatten(0, 1).numpy()
    save(embedder, core, tmp_path)
    wanted = TransformersEmbed(tmp_path, torch.device("cpu"), torch.float32)(items)
    np.testing.assert_allclose(trained, wanted, atol=1e-4)
    llm = LLM(str(tmp_path), task="embed", device="cpu", dtype="float32")
    found = llm.embed(messages=[messages(item) for item in items], use_tqdm=False)
    np.testing.assert_allclose([output.embedding for output in found], wanted, atol=1e-3)
    # Far from each other, or the comparison would show nothing.
    assert np.abs(wanted[1] - wanted[3]).max() > 0.02


def test_the_loss_falls_on_a_fixed_batch_from_pocket_s_weights() -> None:
    model, core = prepare(Namespace(start_from=POCKET, grow=False, device="cpu"))
    assert core.to_str() == Tokenizer.from_file(str(POCKET / "tokenizer.json")).to_str()
    trainee = Embedder(model)
    batch = PairBatches(core, 4)(random.Random(2))
    check_pass(trainee, [picture_side(batch)])
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-4)
    losses = []
    for _ in range(5):
        loss = trainee(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses


def test_the_shipped_model_finds_captions_and_pictures() -> None:
    folder = POCKET.parent / "pocket-embed"
    llm = LLM(str(folder), task="embed", device="cpu", dtype="float32")

    def embed(items) -> np.ndarray:
        outputs = llm.embed(messages=[messages(item) for item in items], use_tqdm=False)
        return np.array([output.embedding for output in outputs])

    scores = eval_pocket_embed.evaluate(embed, 40)
    assert min(scores["text->picture @1"], scores["picture->text @1"]) >= 0.9
    assert (folder / "model.safetensors").stat().st_size <= 16 << 20


def test_recall_counts_ranks_and_ties() -> None:
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.3, 0.3]])
    assert eval_pocket_embed.recall(similarity, 1) == pytest.approx(1 / 3)
    assert eval_pocket_embed.recall(similarity, 2) == pytest.approx(2 / 3)
    assert eval_pocket_embed.recall(similarity, 3) == 1.0


def test_evaluation_takes_any_callable(capsys: pytest.CaptureFixture[str]) -> None:
    found = pairs.retrieval_set(6)
    place = {pair.text: index for index, pair in enumerate(found)}
    place |= {pair.image.tobytes(): index for index, pair in enumerate(found)}

    def embed(items):
        return np.eye(6)[[place[item if isinstance(item, str) else item.tobytes()] for item in items]]

    assert set(eval_pocket_embed.evaluate(embed, 6).values()) == {1.0}
    assert "picture->text" in capsys.readouterr().out
    assert eval_pocket_embed.evaluate(lambda items: np.ones((6, 4)), 6)["text->picture @1"] == 0.0
