"""Pooled hidden states, from the one engine."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, Qwen2VLForConditionalGeneration

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest

from . import tiny

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.make_qwen2_vl(tmp_path_factory.mktemp("embed"), seed=4)


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    sizes = [(40, 24), (24, 56), (64, 64)]
    texts = [
        "hello " + IMAGE,
        IMAGE + " what is shown " + IMAGE,
        "a long text without a picture 0 1 2 3",
    ]
    pictures = [[tiny.picture(*sizes[0], 1)], [tiny.picture(*size, 2) for size in sizes[1:]], []]
    return [
        {"prompt": text, "multi_modal_data": {"image": images}} if images else {"prompt": text}
        for text, images in zip(texts, pictures, strict=True)
    ]


@pytest.fixture(scope="module")
def hidden(path, prompts) -> list[torch.Tensor]:
    """Last hidden states by Transformers."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for entry in prompts:
        images = entry.get("multi_modal_data", {}).get("image", [])
        inputs = tiny.reference_inputs(path, entry["prompt"], images)
        with torch.inference_mode():
            found.append(model.model(**inputs).last_hidden_state[0])
    return found


def saved_without_head(path, folder):
    """A checkpoint as Transformers' class of the model without its head saves it, named after that class."""
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder)
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert name.endswith("Model")
    return model


def test_a_model_saved_without_its_head(path, prompts, hidden, tmp_path):
    saved_without_head(path, tmp_path / "base")
    llm = LLM(str(tmp_path / "base"), task="embed", max_model_len=128)
    for output, states in zip(llm.embed(prompts, normalize=False, use_tqdm=False), hidden, strict=True):
        np.testing.assert_allclose(output.embedding, states[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["mistral", "gemma3", "qwen3_5"])
def test_a_text_model_saved_without_its_head(tmp_path, kind):
    tiny.make_text(tmp_path / "whole", kind, seed=3)
    model = saved_without_head(tmp_path / "whole", tmp_path / "base")
    ids = [5, 9, 70, 33, 12]
    (output,) = LLM(str(tmp_path / "base"), task="embed", max_model_len=64).embed(
        [{"prompt_token_ids": ids}], normalize=False, use_tqdm=False
    )
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    np.testing.assert_allclose(output.embedding, states[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", [13, 512])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_vectors_are_those_of_transformers(path, prompts, hidden, pooling, budget):
    llm = LLM(str(path), task="embed", max_model_len=128, max_num_batched_tokens=budget, block_size=4)
    pool = {"last": lambda h: h[-1], "mean": lambda h: h.mean(0), "cls": lambda h: h[0]}[pooling]
    for again in range(2):
        outputs = llm.embed(prompts, pooling=pooling, normalize=False, use_tqdm=False)
        for output, states in zip(outputs, hidden, strict=True):
            np.testing.assert_allclose(output.embedding, pool(states), rtol=1e-3, atol=1e-3)
            assert (output.usage.cached_tokens > 0) == bool(again and pooling == "last")
    units = llm.embed(prompts, pooling=pooling, use_tqdm=False)
    for unit, output in zip(units, outputs, strict=True):
        vector = np.array(output.embedding)
        np.testing.assert_allclose(unit.embedding, vector / np.linalg.norm(vector), atol=1e-5)
    llm.check_integrity()


@pytest.mark.parametrize("budget", [13, 512])
def test_vectors_of_all_tokens_are_those_of_transformers(path, prompts, hidden, budget):
    llm = LLM(str(path), task="embed", max_model_len=128, max_num_batched_tokens=budget, block_size=4)
    for _ in range(2):
        outputs = llm.embed(prompts, pooling="all", normalize=False, use_tqdm=False)
        for output, states in zip(outputs, hidden, strict=True):
            found = output.token_embeddings
            assert found is not None and found.dtype == np.float32 and output.embedding == []
            assert len(found) == len(output.prompt_token_ids) and output.usage.cached_tokens == 0
            np.testing.assert_allclose(found, states, rtol=1e-3, atol=1e-3)
    for unit, output in zip(llm.embed(prompts, pooling="all", use_tqdm=False), outputs, strict=True):
        lengths = np.linalg.norm(output.token_embeddings, axis=1, keepdims=True)
        np.testing.assert_allclose(unit.token_embeddings, output.token_embeddings / lengths, atol=1e-5)
    llm.check_integrity()


def test_messages_and_scores(path, prompts):
    llm = LLM(str(path), task="embed", max_model_len=128)
    picture = tiny.picture(40, 24, 1)
    content = [{"type": "text", "text": "hello"}, {"type": "image", "image": picture}]
    (one,) = llm.embed(messages=[{"role": "user", "content": content}], use_tqdm=False)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    text = f"{system}<|im_start|>user\nhello{IMAGE}<|im_end|>\n"
    (other,) = llm.embed({"prompt": text, "multi_modal_data": {"image": picture}}, use_tqdm=False)
    assert one.embedding == pytest.approx(other.embedding)
    vectors = [np.array(o.embedding) for o in llm.embed(prompts, use_tqdm=False)]
    scores = llm.score(prompts[0], prompts, use_tqdm=False)
    assert scores == pytest.approx([float(vectors[0] @ vector) for vector in vectors], abs=1e-5)
    assert scores[0] == pytest.approx(1.0)
    with pytest.raises(InvalidRequest, match="2 prompts can't be compared with 3"):
        llm.score(prompts[:2], prompts)
    with pytest.raises(InvalidRequest, match="one vector each"):
        llm.score(prompts[0], prompts, pooling="all")
    assert llm.score([], []) == llm.score("a", []) == []
    for name, ask in (
        ("instruction", lambda: llm.score("a", "b", instruction=5)),
        ("instruction", lambda: llm.embed("a", instruction=["x"])),
        ("normalize", lambda: llm.embed("a", normalize="no")),
    ):
        with pytest.raises(InvalidRequest) as refused:
            ask()
        assert refused.value.param == name


def test_each_task_refuses_the_other(path):
    with pytest.raises(InvalidRequest, match="makes embeddings"):
        LLM(str(path), task="embed").generate("hello", SamplingParams(max_tokens=1), use_tqdm=False)
    llm = LLM(str(path))
    with pytest.raises(InvalidRequest, match="generates text"):
        llm.embed("hello", use_tqdm=False)
    with pytest.raises(InvalidRequest, match="last, mean, cls, all"):
        llm.embed("hello", pooling="max")
    llm.check_integrity()
