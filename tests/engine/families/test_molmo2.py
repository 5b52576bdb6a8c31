"""Tests of Molmo 2 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.media.bilinear import resize_bilinear
from tests.engine.families.molmo2 import FRAME, HAS_MOLMO2, IMAGE, PROCESSOR, image_processor_of, make_molmo2
from tests.engine.families.opened import copy_json, media_processor, parse
from tests.engine.tiny import picture

pytestmark = pytest.mark.skipif(not HAS_MOLMO2, reason="this release of Transformers has no Molmo 2")

#: As Molmo2-8B states it, whose tower has fewer layers than that.
PUBLIC = {
    "architectures": ["Molmo2ForConditionalGeneration"],
    "adapter_config": {"vit_layers": [-3, -9], "text_hidden_size": 4096, "intermediate_size": 12288},
    "image_patch_id": 151938,
    "model_type": "molmo2",
    "text_config": {"hidden_size": 4096, "layer_norm_eps": 1e-6, "qkv_bias": False, "rope_theta": 1e6},
    "torch_dtype": "float32",
    "vit_config": {"num_hidden_layers": 27, "image_default_input_size": [378, 378], "image_num_pos": 729},
}
SIZES = [(60, 44), (1, 1), (28, 28), (29, 97), (641, 480), (2000, 30), (30, 2000), (70, 70), (71, 71)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_molmo2(tmp_path_factory.mktemp("molmo2"), hub=False)


@pytest.fixture(scope="module")
def llm(path):
    return LLM(str(path), max_model_len=512, device="cpu", kv_cache_bytes=8 << 20)


@pytest.fixture
def public(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC))
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"max_crops": 8}}))
    return tmp_path


def test_public_configuration_is_filled_up(public):
    _, parsed = parse(public)
    decoder, vision = parsed.decoder, parsed.vision
    assert (decoder.vocab_size, decoder.unpredicted, decoder.row_token) == (152064, 128, 151938)
    assert (decoder.num_layers, decoder.num_kv_heads, decoder.head_dim) == (36, 8, 128)
    assert decoder.both_ways == "tokens" and decoder.seeing_tokens == (151938,)
    assert decoder.qk_norm and not decoder.tie_word_embeddings
    # Behind layers 24 and 18 of 27.
    assert vision.tower.num_layers == 25 and vision.tower.features == (25, 19)
    assert vision.rows((1, 1)) == 2 * 14 * 14 and vision.canvas((2, 3)) == (46, 65)


def test_crops_are_those_of_transformers_at_public_sizes(public):
    ours, draw = media_processor(public), random.Random("crops")
    theirs = image_processor_of(public)
    sizes = [tuple(round(math.exp(draw.uniform(0, math.log(4000)))) for _ in range(2)) for _ in range(200)]
    for width, height in [*SIZES, (112, 112), (112, 500), (378, 378), *sizes]:
        grid, crops = theirs.get_image_grid_and_crops(height, width)
        found = ours.grid((width, height))
        assert ours.vision.shapes(found) == (tuple(grid[:2]), tuple(grid[2:])), (width, height)
        assert found[0] * found[1] + 1 == crops and ours.check((width, height)) == ours.vision.rows(found)


@pytest.mark.parametrize(
    "changed", [{}, {"overlap_margins": [2, 0], "pooling_size": [3, 2]}, {"max_crops": 7}], ids=str
)
def test_pixels_and_windows_are_those_of_transformers(path, tmp_path, changed):
    copy_json(path, tmp_path)
    stated = {"image_processor": {**PROCESSOR, **changed}}
    (tmp_path / "processor_config.json").write_text(json.dumps(stated))
    ours, theirs = media_processor(tmp_path), image_processor_of(tmp_path)
    for size in SIZES:
        image = picture(*size, 1)
        made, media = theirs([image], return_tensors="pt"), ours.prepare(image)
        shown = made["pixel_values"].flatten(0, 1).numpy() * 127.5 + 127.5
        assert np.array_equal(shown.round(), media.pixels.reshape(shown.shape)), size
        windows = made["image_token_pooling"].numpy()
        assert np.array_equal(windows, ours.vision.windows(media.item.grid)), size


def test_resizing_to_the_same_size_changes_nothing():
    pixels = np.asarray(picture(33, 20, 3))
    assert np.array_equal(resize_bilinear(pixels, (33, 20)), pixels)


def test_prompts_begin_with_one_token_of_the_beginning(llm):
    params = SamplingParams(max_tokens=1)
    plain, begun = llm.generate(["a red square", "<|endoftext|>a red square"], params, use_tqdm=False)
    assert plain.prompt_token_ids == begun.prompt_token_ids and plain.prompt_token_ids[0] == 0


def test_tokens_of_images_are_in_no_answer(path, llm):
    """And their log-probability in a prompt is a number that JSON has."""
    first = parse(path)[1].decoder.vocab_size - parse(path)[1].decoder.unpredicted
    params = SamplingParams(temperature=1e6, max_tokens=40, n=4, seed=1, prompt_logprobs=0)
    prompt = FRAME.format(IMAGE)
    (output,) = llm.generate(
        {"prompt": prompt, "multi_modal_data": {"image": [picture(70, 70)]}}, params, use_tqdm=False
    )
    assert all(token < first for choice in output.outputs for token in choice.token_ids)
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    found = [row[token].logprob for token, row in scored if token >= first]
    assert found and all(math.isfinite(value) and value < -1e4 for value in found)
