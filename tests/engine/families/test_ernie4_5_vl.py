"""ERNIE 4.5 VL: frames of files with their times on them, and whose experts generated tokens have."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata, read_video_pyav

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequest
from engine.media.source import MediaSource
from engine.media.video.sampling import FrameRules, ernie_indices
from engine.media.video.video import Pace, Video, VideoInfo, VideoOptions
from engine.model_parts import load_prompt_builder
from engine.preparation import MediaPreparation
from tests.engine.families.case import TOKENS, CasePrompt
from tests.engine.families.cases import case_named
from tests.engine.families.ernie4_5_vl import (
    FONT,
    FRAME,
    IMAGE,
    PATCH,
    SPECIALS,
    VIDEO,
    ErnieReference,
    video_processor,
)
from tests.engine.families.expected import Expected
from tests.engine.families.made import greedy
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.media.clips import FILM, NTSC, clip
from tests.engine.tiny import picture, rewrite_json

RULES = FrameRules(2.0, min_frames=16, max_frames=180, temporal=2)


@pytest.fixture(scope="module")
def model(made):
    return made(case_named("ERNIE 4.5 VL"))


def chosen(metadata: VideoMetadata, asked: VideoOptions) -> list[int]:
    """The indices of Transformers' sampler, which may add one behind the last frame."""
    stated = SimpleNamespace(num_frames=None, min_frames=16, max_frames=180)
    fps = None if asked.num_frames else asked.fps or 2.0
    found = video_processor().sample_frames(stated, metadata, num_frames=asked.num_frames, fps=fps).tolist()
    return [index for index in found if index < metadata.total_num_frames]


def test_chosen_frames_are_those_of_transformers():
    draw, refused = random.Random(4), 0
    for _ in range(2000):
        total, rate = draw.randint(1, draw.choice((40, 900, 30_000))), draw.choice((25.0, 24000 / 1001, 5.0))
        asked = draw.choice(
            (
                VideoOptions(),
                VideoOptions(fps=draw.choice((0.3, 2.5, 24.0))),
                VideoOptions(num_frames=draw.randint(10, 200)),
            )
        )
        info = VideoInfo(total, rate, (64, 48))
        try:
            expected = chosen(VideoMetadata(total_num_frames=total, fps=rate), asked)
        except ValueError:
            with pytest.raises(InvalidRequest, match="num_frames"):
                ernie_indices(info, RULES, asked)
            refused += 1
            continue
        assert ernie_indices(info, RULES, asked) == expected, (total, rate, asked)
    assert 50 < refused < 500


def test_times_are_drawn_onto_frames_of_files_as_by_transformers(model):
    """To the bit, before frames are resized; their number may be odd."""
    preparation = MediaPreparation(media_processor(model.path), processes=1)
    reference, vision = ErnieReference(model.path), encoder(model.path)
    try:
        for count, rate, asked in (
            (5, 25, VideoOptions()),
            (77, NTSC, VideoOptions()),
            (61, FILM, VideoOptions(fps=5.0)),
            (40, 1, VideoOptions(num_frames=17)),
        ):
            data = clip(count, Fraction(rate), size=(64, 96))
            source = MediaSource(0, "here", "video", data=data, video=asked)
            media = preparation.prepare(preparation.for_prompt([source]), source, [data])

            def choose(metadata: VideoMetadata, asked: VideoOptions = asked, **_: Any) -> np.ndarray:
                return np.array(chosen(metadata, asked))

            frames, metadata = read_video_pyav(io.BytesIO(data), choose)
            patches, grid = reference.video([Image.fromarray(frame) for frame in frames], metadata)
            assert media.item.grid == tuple(grid[0].tolist())
            ours = vision.patchify(torch.from_numpy(media.pixels.copy()))
            torch.testing.assert_close(ours, patches, atol=0, rtol=0)
    finally:
        preparation.close()


def test_hours_and_minutes_are_drawn_as_by_transformers(model):
    times = (0.0, 59.996, 61.5, 3599.0, 3600.0, 7385.25)
    frames = [picture(200, 120, number) for number in range(len(times))]
    media = media_processor(model.path).prepare_video(Video.of(frames, Pace.of_times(times)))
    # Of frames at one a second.
    metadata = VideoMetadata(total_num_frames=9000, fps=1, frames_indices=list(times))
    patches, _ = ErnieReference(model.path).video(frames, metadata)
    ours = encoder(model.path).patchify(torch.from_numpy(media.pixels.copy()))
    torch.testing.assert_close(ours, patches, atol=0, rtol=0)


def test_frames_that_take_no_times_are_refused(model):
    processor = media_processor(model.path)
    processor.check_video((10, 10), 3)
    with pytest.raises(InvalidRequest, match="9x40 pixels are too small"):
        processor.check_video((9, 40), 3)
    lacking = replace(processor.video.stamp, font=b"")
    processor = replace(processor, video=replace(processor.video, stamp=lacking))
    with pytest.raises(InvalidRequest, match=f"lacks the font {FONT}"):
        processor.check_video((64, 64), 3)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 13, "block_size": 4}])
def test_generated_tokens_have_the_experts_of_text(model, options):
    """Those of images, too, which a caller can have by a bias, also when they are computed once more."""
    prompt = CasePrompt(FRAME.format(f"{IMAGE}what is shown?"), (picture(60, 44, 3),))
    end = SPECIALS.index("<|IMAGE_END|>")
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, logit_bias={end: 100}, ignore_eos=True)
    wanted = model.logprobs(prompt, [end] * 8)[-8:].tolist()
    llm = model.llm(enable_prefix_caching=False, **options)
    scheduler = llm._engine.core.scheduler
    schedule, steps = scheduler.schedule, iter(range(1000))

    def interrupted():
        if next(steps) in (3, 9) and scheduler.running:
            scheduler.preempt(scheduler.running[0])
        return schedule()

    scheduler.schedule = interrupted
    ((completion,),) = [output.outputs for output in llm.generate([prompt.entry], params, use_tqdm=False)]
    assert completion.token_ids == [end] * 8 and llm.metrics()["preempted"] > 0
    found = [step[end].logprob for step in completion.logprobs]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_generated_token_of_an_image_is_another_one_in_the_next_prompt(model):
    """There it has the experts of images, so that the answer's blocks can't be those of the prompt."""
    first = model.inputs(CasePrompt(FRAME.format("what is shown?")))
    start, llm = SPECIALS.index("<|IMAGE_START|>"), model.llm(block_size=4)
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={start: 100}, ignore_eos=True)
    llm.generate({"prompt_token_ids": first.ids}, params, use_tqdm=False)
    second = first.extended([*[start] * 9, *range(40, 50)])
    (output,) = llm.generate({"prompt_token_ids": second.ids}, greedy(), use_tqdm=False)
    model.compare(output, Expected(second, TOKENS))
    assert llm.metrics()["cached_tokens"] == len(first.ids) // 4 * 4


def publish(path: Path, target: Path) -> None:
    """Copy a checkpoint with config.json and the processor's options as the publisher writes them."""
    shutil.copytree(path, target)
    config = json.loads((path / "config.json").read_text())
    text, tower = config.pop("text_config"), config.pop("vision_config")
    for name in ("model_type", "mlp_layer_types", "rope_parameters", "head_dim"):
        text.pop(name, None)
    tower = {name: tower[name] for name in ("depth", "hidden_size", "hidden_act", "num_heads", "patch_size")}
    flat = {
        **{name: value for name, value in config.items() if name != "video_token_id"},
        **text,
        "tie_word_embeddings": config["tie_word_embeddings"],
        "model_type": "ernie4_5_moe_vl",
        "im_patch_id": config["image_token_id"],
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": [1, 1],
        "moe_layer_end_index": [29, 28],
        "moe_layer_interval": 1,
        "rope_theta": 1e4,
        "freq_allocation": 2,
        "vision_config": {**tower, "mlp_ratio": 1.5},
    }
    (target / "config.json").write_text(json.dumps(flat))
    images = {"patch_size": PATCH, "merge_size": 2, "min_pixels": 256, "max_pixels": 4096}
    (target / "preprocessor_config.json").write_text(json.dumps(images))


def test_the_publishers_files_give_the_same_model(model, tmp_path):
    publish(model.path, tmp_path / "public")
    named = (
        ("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>"),
        ("<|VIDEO_PLACEHOLDER|>", "<|video@placeholder|>"),
    )
    prompts, renamed = [model.case.single_prompts()[1], *model.case.video_prompts()], []
    for prompt in prompts:
        text = prompt.text
        for ours, theirs in named:
            text = text.replace(ours, theirs)
        renamed.append(replace(prompt, text=text).entry)
    llm = LLM(str(tmp_path / "public"), **model.options)
    for output, prompt in zip(model.run(llm, renamed), prompts, strict=True):
        assert output.outputs[0].token_ids == model.answer(prompt).tokens


@pytest.mark.parametrize(("stated", "layers"), [(-1, (1, 2)), ([-1, -1], (1, 2)), ([1, 0], (1,))])
def test_layers_with_experts_end_where_the_publishers_file_says(model, tmp_path, stated, layers):
    """-1 is the last layer."""
    publish(model.path, tmp_path / "public")
    change = {"moe_layer_end_index": stated, "rope_scaling": {"rope_type": "default"}}
    rewrite_json(tmp_path / "public" / "config.json", change)
    assert parse(tmp_path / "public")[1].decoder.experts.layers == layers


def test_an_image_before_a_video_stays_that_in_the_publishers_token_ids(model, tmp_path):
    """Rows of both have one token there; an image of as many rows as the video, and of more."""
    publish(model.path, tmp_path / "public")
    processor = media_processor(tmp_path / "public")
    builder = load_prompt_builder(EngineConfig(model=str(tmp_path / "public")))
    frames = [picture(60, 44, number) for number in range(3)]
    video = processor.prepare_video(Video.of(frames, Pace.of_rate(3, 1.0))).item
    shown = f"{IMAGE} {VIDEO}".replace("IMAGE_PLACEHOLDER", "image@placeholder")
    shown = shown.replace("VIDEO_PLACEHOLDER", "video@placeholder")
    for size in ((60, 44), (64, 64)):
        items = [processor.prepare(picture(*size)).item, video]
        assert items[0].num_tokens >= video.num_tokens
        built = builder.from_text(FRAME.format(shown), items)
        again = builder.from_token_ids(built.token_ids, items)
        assert [(s.item, s.offset) for s in again.spans] == [(s.item, s.offset) for s in built.spans]
        assert again.token_ids == built.token_ids


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"moe_num_experts": [6, 5]}, "moe_num_experts should be the same"),
        ({"moe_layer_end_index": [2, None]}, "moe_layer_end_index should be an integer"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling .*yarn.* is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling .* is not supported"),
        ({"freq_allocation": 0}, "freq_allocation should be a positive integer"),
        ({"freq_allocation": 3}, "mrope_section should be three numbers"),
        ({"temporal_conv_size": 1}, "temporal_merge_size 1 should be 2"),
    ],
)
def test_publishers_fields_that_cannot_be_used_are_refused(model, tmp_path, change, error):
    publish(model.path, tmp_path / "public")
    rewrite_json(tmp_path / "public" / "config.json", change)
    with pytest.raises(CheckpointError, match=error):
        media_processor(tmp_path / "public")
