"""Tests of Molmo 2 alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.media.bilinear import resize_bilinear
from engine.media.source import MediaSource
from engine.media.video.sampling import FrameRules, molmo2_indices
from engine.media.video.video import VideoInfo, VideoOptions
from engine.model_parts import load_prompt_builder
from engine.preparation import MediaPreparation
from tests.engine.executor.threads import ThreadLauncher
from tests.engine.families.molmo2 import (
    FRAME,
    HAS_MOLMO2,
    IMAGE,
    PROCESSOR,
    VIDEO,
    VIDEOS,
    image_processor_of,
    make_molmo2,
    processor_of,
    video_processor_of,
)
from tests.engine.families.opened import copy_json, media_processor, parse
from tests.engine.media.clips import NTSC, clip, decoded
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
    stated = {"image_processor": {**PROCESSOR, **changed}, "video_processor": VIDEOS}
    (tmp_path / "processor_config.json").write_text(json.dumps(stated))
    ours, theirs = media_processor(tmp_path), image_processor_of(tmp_path)
    for size in SIZES:
        image = picture(*size, 1)
        made, media = theirs([image], return_tensors="pt"), ours.prepare(image)
        shown = made["pixel_values"].flatten(0, 1).numpy() * 127.5 + 127.5
        assert np.array_equal(shown.round(), media.pixels.reshape(shown.shape)), size
        windows = made["image_token_pooling"].numpy()
        assert np.array_equal(windows, ours.vision.windows(media.item.grid)), size


def test_chosen_frames_are_those_of_transformers(path):
    draw, theirs = random.Random("frames"), video_processor_of(path)
    for _ in range(200):
        total, rate = draw.randint(1, draw.choice((40, 4000))), draw.choice((1, 2.0, 7.3, 23.976, 25, 60))
        asked = draw.choice(
            (
                VideoOptions(),
                VideoOptions(fps=draw.choice((0.3, 1.0, 2.5, 24.0))),
                VideoOptions(num_frames=draw.randint(1, 300)),
            )
        )
        rules = FrameRules(fps=draw.choice((2, 2.0, 0.7, None)), num_frames=draw.choice((64, 384)))
        theirs.max_fps = rules.fps
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        count = None if asked.fps else asked.num_frames or rules.num_frames
        # Its float arithmetic may add an index behind the last frame.
        expected = [each for each in theirs.sample_frames(metadata, count, asked.fps) if each < total]
        assert molmo2_indices(VideoInfo(total, rate, (64, 48)), rules, asked) == expected


@pytest.mark.parametrize("hub", [False, True])
def test_files_equal_transformers(path, tmp_path, hub):
    """Pixels, and the tokens of a prompt with the times."""
    path = make_molmo2(tmp_path, hub) if hub else path
    reference, builder = processor_of(path), load_prompt_builder(EngineConfig(model=str(path)))
    preparation = MediaPreparation(media_processor(path), processes=1)
    text = FRAME.format(f"what is {VIDEO} about? yes")
    try:
        for count, rate, asked in (
            (31, Fraction(25), VideoOptions()),
            (12, NTSC, VideoOptions(num_frames=1)),
            # As numbers of 64 bits, .15 is less than that, and as those of 32 it is more.
            (30, Fraction(60), VideoOptions(fps=20)),
        ):
            data = clip(count, rate, size=(48, 32))
            source = MediaSource(0, "here", "video", data=data, video=asked)
            media = preparation.prepare(preparation.for_prompt([source]), source, [data])
            expected = reference(
                text=[text],
                videos=[torch.from_numpy(np.stack(decoded(data)))],
                video_metadata=[VideoMetadata(total_num_frames=count, fps=float(rate))],
                num_frames=None if asked.fps else asked.num_frames or 64,
                fps=asked.fps,
                return_tensors="pt",
            )
            shown = expected["pixel_values_videos"].flatten(0, 1).numpy() * 127.5 + 127.5
            assert np.array_equal(shown.round(), media.pixels.reshape(shown.shape)), asked
            assert builder.from_text(text, [media.item]).token_ids == expected["input_ids"][0].tolist(), asked
    finally:
        preparation.close()


def test_ranks_norm_all_heads_together(tmp_path):
    """Also where two ranks share each KV head."""
    path, text = make_molmo2(tmp_path, hub=True, olmo=True), FRAME.format(f"{IMAGE} and {IMAGE}")
    entry = {"prompt": text, "multi_modal_data": {"image": [picture(70, 70), picture(30, 90, 1)]}}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    found = []
    for size in (1, 4):
        options = {"max_model_len": 256, "num_kv_blocks": 80, "tensor_parallel_size": size}
        llm = LLM(str(path), launcher=ThreadLauncher(), device="cpu", **options)
        (output,) = llm.generate(entry, params, use_tqdm=False)
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        found.append((output.outputs[0].token_ids, [row[token].logprob for token, row in scored]))
    (one, scores), (several, others) = found
    assert one == several and others == pytest.approx(scores, abs=1e-3)


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
