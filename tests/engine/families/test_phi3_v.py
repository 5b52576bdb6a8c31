"""Phi-3.5-vision and VLM2Vec against a reference composed of Transformers' parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from engine.families.phi3_v import FAMILY
from engine.inputs.frontend import load_media_processor
from engine.weights.checkpoint import Checkpoint
from engine.weights.loader import load_vision_encoder
from tests.engine.tiny import picture, rewrite_json

from .phi3_v_reference import ORIGINAL, canvas_of, make_phi3_v, reference_ids

SIZES = [(60, 44), (44, 70), (28, 28), (1, 1), (200, 20), (20, 200), (27, 29), (640, 480), (99, 100)]
TOKENS = 12
PROMPTS = [
    ("<|user|>\n<|image_1|>\ndescribe this image<|end|>\n<|assistant|>\n", [(60, 44)]),
    ("<|user|>\n<|image_2|>\n<|image_1|>\nwhat is shown?<|end|>\n<|assistant|>\n", [(44, 70), (90, 30)]),
    ("<|user|>\nhello world<|end|>\n<|assistant|>\n", []),
    ("<|image_1|> what is shown in the picture?", [(28, 28)]),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("phi3_v")
    return path, make_phi3_v(path, seed=3)


@pytest.fixture(scope="module")
def cases(made):
    """Prompt, pictures, the reference's expanded ids and its tokens."""
    path, reference = made
    found = []
    for number, (prompt, sizes) in enumerate(PROMPTS):
        pictures = [picture(*size, 10 * number + i) for i, size in enumerate(sizes)]
        ids = reference_ids(path, prompt)
        with torch.inference_mode():
            rows = {i + 1: reference.rows(image, 4) for i, image in enumerate(pictures)}
        wanted = reference.greedy(reference.embeds(ids, rows), TOKENS, {2, 6})
        found.append((prompt, pictures, ids, {k: len(v) for k, v in rows.items()}, wanted))
    return found


def entry(prompt, pictures):
    return {"prompt": prompt, "multi_modal_data": {"image": pictures}} if pictures else prompt


WAYS = {
    "plain": {},
    "tiny budget": {"max_num_batched_tokens": 17, "max_num_seqs": 4, "block_size": 4},
    "few blocks": {"num_kv_blocks": 40, "block_size": 4, "max_num_batched_tokens": 64},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens(made, cases, way):
    path, _ = made
    # Shorter than where long factors would begin.
    llm = LLM(str(path), max_model_len=ORIGINAL, **WAYS[way])
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    outputs = llm.generate([entry(p, images) for p, images, *_ in cases], params, use_tqdm=False)
    for output, (_, _, ids, counts, wanted) in zip(outputs, cases, strict=True):
        expanded = [t for i in ids for t in ([None] * counts[-i] if i < 0 else [i])]
        plain = [
            None if want is None else got for got, want in zip(output.prompt_token_ids, expanded, strict=True)
        ]
        assert plain == expanded
        assert output.outputs[0].token_ids == wanted
    llm.check_integrity()
    alone = [llm.generate(entry(p, images), params, use_tqdm=False)[0] for p, images, *_ in cases]
    assert [o.outputs[0].token_ids for o in alone] == [wanted for *_, wanted in cases]


def test_pictures_matter(made, cases):
    path, _ = made
    llm = LLM(str(path), max_model_len=ORIGINAL)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    for prompt, pictures, _, _, wanted in cases:
        if pictures:
            others = [picture(*image.size, 99) for image in pictures]
            (output,) = llm.generate(entry(prompt, others), params, use_tqdm=False)
            assert output.outputs[0].token_ids != wanted


@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_long_factors_are_chosen_for_the_life_of_the_model(made, length):
    """Transformers chooses by the longest position of a batch; compared where both use the same factors."""
    path, reference = made
    llm = LLM(str(path), max_model_len=length)
    prompt = "<|user|>\n" + "hello world " * 10 + "<|end|>\n<|assistant|>\n"
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    assert len(ids) == length
    with torch.inference_mode():
        if length > ORIGINAL:
            # One token more makes the reference take the long factors for all of them.
            logits = reference.language(input_ids=torch.tensor([ids])).logits[0]
        else:
            logits = reference.language(input_ids=torch.tensor([ids[:-1]])).logits[0]
    start = len(output.prompt_token_ids)
    assert logits[start - 1 : length - 1].argmax(-1).tolist() == ids[start:]


@pytest.mark.parametrize("num_crops", [1, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_and_rows(made, size, num_crops):
    path, reference = made
    processor = load_media_processor(
        EngineConfig(model=str(path), mm_processor_kwargs={"num_crops": num_crops})
    )
    image = picture(*size, 4)
    prepared = processor.prepare(image)
    assert np.array_equal(prepared.pixels, np.asarray(canvas_of(image, num_crops)))
    assert processor.check(size) == prepared.item.num_tokens
    checkpoint = Checkpoint.open(str(path))
    config = FAMILY.parse(checkpoint)
    encoder = load_vision_encoder(checkpoint, config, device=torch.device("cpu"), dtype=torch.float32)
    other = processor.prepare(picture(50, 60, 8))
    with torch.inference_mode():
        wanted = reference.rows(image, num_crops)
    (alone,) = encoder.encode([prepared])
    _, beside = encoder.encode([other, prepared])
    for rows in (alone, beside):
        torch.testing.assert_close(rows, wanted, rtol=2e-4, atol=2e-4)


def test_embeddings_in_place_of_pictures(made, cases):
    path, reference = made
    llm = LLM(str(path), max_model_len=ORIGINAL)
    prompt, pictures, _, _, wanted = cases[1]
    with torch.inference_mode():
        rows = [reference.rows(image, 4) for image in pictures]
    given = {"image_embeds": rows, "image_size_list": [image.size for image in pictures]}
    (output,) = llm.generate(
        entry(prompt, given), SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False
    )
    assert output.outputs[0].token_ids == wanted


def test_chat(made, cases):
    path, _ = made
    llm = LLM(str(path), max_model_len=ORIGINAL)
    prompt, pictures, *_, wanted = cases[0]
    content = [
        {"type": "image", "image": pictures[0]},
        {"type": "text", "text": "describe this image"},
    ]
    (output,) = llm.chat(
        [{"role": "user", "content": content}],
        SamplingParams(temperature=0.0, max_tokens=TOKENS),
        use_tqdm=False,
    )
    assert output.prompt == prompt and output.outputs[0].token_ids == wanted


def test_vlm2vec(made):
    """The last token's state after the final norm, at length 1; 16 crops; no template."""
    path, reference = made
    llm = LLM(str(path), task="embed", max_model_len=ORIGINAL, mm_processor_kwargs={"num_crops": 16})
    images = [picture(44, 44, 1), picture(40, 30, 2)]
    texts = [
        "<|image_1|> Represent the given image.",
        "<|image_1|> Represent the given image with the following question: what is shown?",
    ]
    prompts = [entry(text, [image]) for text, image in zip(texts, images, strict=True)]
    prompts.append("a red square on a blue background")
    outputs = llm.embed(prompts, use_tqdm=False)
    for number, output in enumerate(outputs):
        ids = reference_ids(path, texts[number] if number < 2 else prompts[2])
        with torch.inference_mode():
            rows = {1: reference.rows(images[number], 16)} if number < 2 else {}
            embeds = reference.embeds(ids, rows)
            states = reference.language.model(inputs_embeds=embeds).last_hidden_state[0, -1]
        wanted = states / states.norm()
        np.testing.assert_allclose(output.embedding, wanted, atol=2e-4)
    # Twice BOS: the empty text before the mark is tokenised as well.
    ids = outputs[0].prompt_token_ids
    assert ids[0] == 1 and ids.count(1) == 2


def test_what_is_refused(made, tmp_path):
    path, _ = made
    with pytest.raises(ConfigError, match="from 1 to 64"):
        load_media_processor(EngineConfig(model=str(path), mm_processor_kwargs={"num_crops": 65}))
    with pytest.raises(ConfigError, match="'crops'"):
        load_media_processor(EngineConfig(model=str(path), mm_processor_kwargs={"crops": 4}))
    processor = load_media_processor(EngineConfig(model=str(path)))
    with pytest.raises(InvalidRequest, match="too elongated"):
        processor.prepare(Image.new("RGB", (300, 1)))
    make_phi3_v(tmp_path)
    rewrite_json(tmp_path / "config.json", {"embd_layer": {"hd_transform_order": "glb_sub"}})
    with pytest.raises(CheckpointError, match="hd_transform_order"):
        FAMILY.parse(Checkpoint.open(str(tmp_path)))


def test_the_public_shape(tmp_path):
    """CLIP-L/14-336 without a word of it in config.json: 757 rows for a square picture in one crop."""
    public = {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
        "eos_token_id": 2,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.1] * 48},
    }
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Phi3VForCausalLM"], **public}))
    model = FAMILY.parse(Checkpoint.open(str(tmp_path)))
    assert model.eos_token_ids == (2, 32000, 32007) and model.image_token_id == 32044
    config = model.vision
    assert config.tower.num_layers == 23 and config.tower.hidden_size == 1024 and config.side == 24
    # (crops + 1) * 144 + 1 + (down + 1) * 12
    for down, across in ((1, 1), (2, 2), (1, 4), (4, 4)):
        assert config.num_rows((down, across)) == (down * across + 1) * 144 + 1 + (down + 1) * 12
