"""Video files, prepared for each family with videos as Transformers' own samplers and processors do it.

Transformers' video processors can't be made without torchvision. Their methods are called alone, and
``Reference.video`` does the rest with the image processor's parts.
"""

from __future__ import annotations

import io
import random
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from engine.config import EngineConfig
from engine.errors import CheckpointError, ContextLengthExceeded, InvalidRequest
from engine.media.source import MediaSource
from engine.media.video.sampling import (
    FrameRules,
    glm4v_indices,
    glm46v_indices,
    middle_indices,
    minicpm_indices,
    qwen2_indices,
    qwen3_indices,
    smolvlm_indices,
    uniform_indices,
)
from engine.media.video.video import VideoInfo, VideoOptions
from engine.model_parts import load_prompt_builder
from engine.preparation import MediaPreparation
from tests.engine.families import glm, qwen
from tests.engine.families.case import CasePrompt
from tests.engine.families.glm import GlmReference, make_glm
from tests.engine.families.idefics import IdeficsReference, make_smolvlm, video_text
from tests.engine.families.internvl import SIDE as INTERNVL_SIDE
from tests.engine.families.internvl import make_internvl
from tests.engine.families.lfm3_vl import make_lfm3_vl
from tests.engine.families.minicpm_v4_6 import VIDEO, MiniCPMV46Reference, make_minicpm_v4_6
from tests.engine.families.onevision import SIDE, make_onevision
from tests.engine.families.opened import encoder, media_processor
from tests.engine.families.qwen import Reference, make_qwen2_5_vl, make_qwen3_5, make_qwen3_vl
from tests.engine.media.clips import FILM, NTSC, clip, decoded
from tests.engine.tiny import TRANSFORMERS, make_qwen2_vl, rewrite_json

USUAL = VideoOptions()
RATES = [10, 12.5, 15, float(FILM), 24, 25, float(NTSC), 30, 50, 59.94, 60, 7.3]

#: Frames, rate, and what the caller asks for.
CLIPS = [
    *((frames, rate, USUAL) for frames in (4, 5, 13, 60, 97) for rate in (25, NTSC, FILM)),
    *((frames, 30, USUAL) for frames in (1, 2, 3, 31, 121)),
    *((frames, FILM, VideoOptions(fps=fps)) for frames in (40, 61) for fps in (0.5, 1.0, 5.0, 23.0)),
    *((77, NTSC, VideoOptions(num_frames=count)) for count in (2, 6, 8, 33)),
    (3000, 5, USUAL),
]


#: Degrees, counter-clockwise, by which a player turns the frames of a file with each display matrix.
TURNS = {(0, -1, 1, 0): 90, (-1, 0, 0, -1): 180, (0, 1, -1, 0): 270}
#: Files of each container that is read, upright and turned: what :func:`clip` is asked for.
FILES: list[dict[str, Any]] = [
    {"container": "mov", "codec": "mpeg4"},
    {"container": "matroska", "codec": "libx264"},
    {"container": "webm", "codec": "libvpx"},
    {"container": "webm", "codec": "libvpx-vp9"},
    {"container": "avi", "codec": "mpeg4"},
    {"container": "avi", "codec": "libx264"},
    *({"matrix": matrix} for matrix in TURNS),
    {"sound": True},
]


@pytest.fixture(scope="module")
def samplers() -> Any:
    """Transformers' video processors; some of their modules import torchvision for the resizing."""
    names = ["torchvision", *(f"torchvision.transforms{part}" for part in ("", ".v2", ".v2.functional"))]
    added = [name for name in names if name not in sys.modules]
    try:
        import_module("torchvision")
        added = []
    except ModuleNotFoundError:
        for name in added:
            sys.modules[name] = ModuleType(name)
    try:
        return SimpleNamespace(
            qwen2=import_module(
                "transformers.models.qwen2_vl.video_processing_qwen2_vl"
            ).Qwen2VLVideoProcessor,
            qwen3=import_module(
                "transformers.models.qwen3_vl.video_processing_qwen3_vl"
            ).Qwen3VLVideoProcessor,
            glm4v=import_module("transformers.models.glm4v.video_processing_glm4v").Glm4vVideoProcessor,
            smolvlm=import_module(
                "transformers.models.smolvlm.video_processing_smolvlm"
            ).SmolVLMVideoProcessor,
            glm46v=import_module("transformers.models.glm46v.video_processing_glm46v").Glm46VVideoProcessor,
            minicpm=import_module(
                "transformers.models.minicpmv4_6.video_processing_minicpmv4_6"
            ).MiniCPMV4_6VideoProcessor,
            internvl=import_module(
                "transformers.models.internvl.video_processing_internvl"
            ).InternVLVideoProcessor,
        )
    finally:
        for name in added:
            del sys.modules[name]


def theirs(samplers: Any, family: str, metadata: VideoMetadata, asked: VideoOptions) -> list[int]:
    """The indices that Transformers' sampler gives."""
    if family == "onevision":
        count = asked.num_frames or (None if asked.fps else min(32, metadata.total_num_frames))
        return default_sample_indices_fn(metadata, count, asked.fps).tolist()
    if family == "internvl":
        # Its own count may be 0, by which it divides.
        count = asked.num_frames or min(8, metadata.total_num_frames)
        if asked.fps and not asked.num_frames:
            count = max(1, int(metadata.total_num_frames / metadata.fps * asked.fps))
        stated = SimpleNamespace(num_frames=None, fps=None, initial_shift=True)
        return samplers.internvl.sample_frames(stated, metadata, num_frames=count).tolist()
    if family in ("glm4v", "glm46v"):
        stated = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
        # Of a video shorter than its shortest step, theirs shows nothing.
        found = getattr(samplers, family).sample_frames(stated, metadata, fps=asked.fps).tolist()
        return found or [0, 0]
    stated = SimpleNamespace(
        num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768, default_fps=2
    )
    if family == "qwen3":
        stated.fps = 2
        given = {"num_frames": asked.num_frames, "fps": asked.fps}
        if asked.num_frames is not None:
            stated.fps = None
        return samplers.qwen3.sample_frames(stated, metadata, **given).tolist()
    fps = None if asked.num_frames is not None else asked.fps or 2
    found = samplers.qwen2.sample_frames(stated, metadata, num_frames=asked.num_frames, fps=fps).tolist()
    # Its float arithmetic may add an index behind the last frame.
    return [index for index in found if index < metadata.total_num_frames]


OURS = {
    "qwen2": qwen2_indices,
    "qwen3": qwen3_indices,
    "onevision": uniform_indices,
    "internvl": middle_indices,
}
RULES = {
    "qwen2": FrameRules(2.0, temporal=2),
    "qwen3": FrameRules(2.0, temporal=2),
    "onevision": FrameRules(num_frames=32),
    "internvl": FrameRules(num_frames=8),
}


@pytest.mark.parametrize("family", OURS)
def test_chosen_frames_are_those_of_transformers(samplers, family):
    draw = random.Random(0)
    compared = refused = 0
    for _ in range(3000):
        total, rate = draw.randint(2, draw.choice((40, 4000, 40_000))), draw.choice(RATES)
        asked = draw.choice(
            (
                USUAL,
                VideoOptions(fps=draw.choice((0.3, 1.0, 2.0, 2.5, 24.0))),
                VideoOptions(num_frames=draw.randint(2, 900)),
            )
        )
        info = VideoInfo(total, rate, (64, 48))
        metadata = VideoMetadata(total_num_frames=total, fps=rate)
        try:
            expected = theirs(samplers, family, metadata, asked)
        except ValueError:
            with pytest.raises(InvalidRequest, match=f"{total} frames, fewer than"):
                OURS[family](info, RULES[family], asked)
            refused += 1
            continue
        assert OURS[family](info, RULES[family], asked) == expected, (total, rate, asked)
        compared += 1
    assert compared > 2000
    assert refused > 50 or family == "qwen3"


@pytest.mark.parametrize("kind", ["glm4v", "glm46v"])
def test_chosen_frames_are_those_of_glm(samplers, kind):
    ours = {"glm4v": glm4v_indices, "glm46v": glm46v_indices}[kind]
    draw = random.Random(1)
    for _ in range(1000):
        total, rate = draw.randint(1, draw.choice((40, 900, 30_000))), draw.choice([5, *RATES])
        fps = draw.choice((None, 0.5, 1.0, 3.0)) if kind == "glm4v" else None
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        asked = VideoOptions(fps=fps)
        found = ours(VideoInfo(total, rate, (64, 48)), RULES["qwen2"], asked)
        assert found == theirs(samplers, kind, metadata, asked), (total, rate, fps)


def test_chosen_frames_are_those_of_smolvlm(samplers):
    draw, stated = random.Random(2), SimpleNamespace(num_frames=64, fps=1)
    rules = FrameRules(fps=1.0, max_frames=64)
    for _ in range(2000):
        total, rate = draw.randint(1, draw.choice((40, 900, 30_000))), draw.choice([5, *RATES])
        asked = draw.choice(
            (USUAL, VideoOptions(fps=draw.choice((0.3, 2.0, 2.5))), VideoOptions(num_frames=7))
        )
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        expected = samplers.smolvlm.sample_frames(stated, metadata, asked.num_frames, asked.fps).tolist()
        assert smolvlm_indices(VideoInfo(total, rate, (64, 48)), rules, asked) == expected, (
            total,
            rate,
            asked,
        )


def minicpm(samplers: Any, metadata: VideoMetadata, asked: VideoOptions, most: int) -> list[int]:
    """The indices that Transformers' sampler gives of a checkpoint that shows ``most`` frames at most."""
    stated = SimpleNamespace(max_num_frames=most, stack_frames=1)
    return samplers.minicpm.sample_frames(stated, metadata, max_num_frames=asked.num_frames)


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="these releases choose frames otherwise")
def test_chosen_frames_are_those_of_minicpm(samplers):
    draw, long = random.Random(3), 0
    for _ in range(300):
        total, rate = draw.randint(1, draw.choice((40, 900, 9000))), draw.choice([5, *RATES])
        asked = draw.choice((USUAL, VideoOptions(num_frames=draw.randint(1, 300))))
        most = draw.choice((7, 128))
        metadata = VideoMetadata(total_num_frames=total, fps=rate, duration=total / rate)
        expected = minicpm(samplers, metadata, asked, most)
        found = minicpm_indices(VideoInfo(total, rate, (64, 48)), FrameRules(max_frames=most), asked)
        assert found == expected, (total, rate, asked)
        long += total / rate > (asked.num_frames or most)
    assert 30 < long < 270
    with pytest.raises(InvalidRequest, match="no fps"):
        minicpm_indices(VideoInfo(50, 25.0, (64, 48)), FrameRules(), VideoOptions(fps=1.0))


def chosen_by_minicpm(samplers: Any, asked: VideoOptions, metadata: VideoMetadata, **_: Any) -> list[int]:
    return minicpm(samplers, metadata, asked, 128)


@pytest.mark.parametrize("version", [6, 7])
def test_minicpm_is_shown_frames_as_images(samplers, clips, tmp_path, version, wide):
    """Rows and tokens of files. Without ``wide`` each version has half of the clips, together all."""
    path = make_minicpm_v4_6(tmp_path, False, version)
    reference, vision = MiniCPMV46Reference(path, version), encoder(path)
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    preparation = MediaPreparation(media_processor(path), processes=1)
    try:
        for data, asked in clips if wide else clips[version % 2 :: 2]:
            if asked.fps:
                asked = USUAL  # it takes no such wish
            source = MediaSource(0, "here", "video", data=data, video=asked)
            media = preparation.prepare(preparation.for_prompt([source]), source, [data])
            choose = partial(chosen_by_minicpm, samplers, asked)
            frames, _ = read_video_pyav(io.BytesIO(data), choose)
            images = tuple(map(Image.fromarray, frames))
            expected = reference.inputs(CasePrompt(f"what is {VIDEO} about?", (), images))
            assert builder.from_text(f"what is {VIDEO} about?", [media.item]).token_ids == expected.ids
            rows = reference.model.get_video_features(
                expected.arguments["pixel_values_videos"], expected.arguments["target_sizes_videos"]
            ).pooler_output
            torch.testing.assert_close(vision.encode([media])[0], torch.cat(rows))
    finally:
        preparation.close()


def test_stacked_frames_of_minicpm_are_refused(tmp_path):
    path = make_minicpm_v4_6(tmp_path, True)
    rewrite_json(path / "video_preprocessor_config.json", {"stack_frames": 3})
    with pytest.raises(CheckpointError, match="stack_frames 3 is not supported"):
        media_processor(path)


def test_what_glm_decides_itself_is_refused():
    info = VideoInfo(50, 25.0, (64, 48))
    for sample in (glm4v_indices, glm46v_indices):
        with pytest.raises(InvalidRequest, match="no num_frames"):
            sample(info, RULES["qwen2"], VideoOptions(num_frames=3))
    with pytest.raises(InvalidRequest, match="no fps"):
        glm46v_indices(info, RULES["qwen2"], VideoOptions(fps=1.0))


@pytest.mark.parametrize("family", OURS)
def test_a_lone_frame_is_shown(family):
    info = VideoInfo(1, 25.0, (64, 48))
    assert OURS[family](info, RULES[family], USUAL) == [0]
    assert OURS[family](info, RULES[family], VideoOptions(fps=0.1)) == [0]


@pytest.fixture(scope="module")
def clips() -> list[tuple[bytes, VideoOptions]]:
    return [(clip(frames, Fraction(rate), size=(48, 32)), asked) for frames, rate, asked in CLIPS]


def seen(samplers: Any, family: str, data: bytes, asked: VideoOptions) -> tuple[list[Image.Image], Any]:
    """The frames that Transformers reads from a file by its sampler, and their metadata."""

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        if metadata.total_num_frames == 1 and family == "qwen2":
            return np.array([0])  # for which its sampler divides by 0
        return np.array(theirs(samplers, family, metadata, asked))

    frames, metadata = read_video_pyav(io.BytesIO(data), choose)
    if len(frames) < len(metadata.frames_indices):  # it reads a repeated index once
        order = sorted(set(metadata.frames_indices.tolist()))
        frames = frames[[order.index(index) for index in metadata.frames_indices]]
    return [Image.fromarray(frame) for frame in frames], metadata


def turned(samplers: Any, family: str, data: bytes, rate: Fraction, degrees: int) -> list[Image.Image]:
    """The frames that Transformers' sampler chooses among all that a file holds, as a player turns them."""
    frames = [np.rot90(frame, degrees // 90) for frame in decoded(data)]
    metadata = VideoMetadata(total_num_frames=len(frames), fps=float(rate))
    return [Image.fromarray(frames[index]) for index in theirs(samplers, family, metadata, USUAL)]


#: Whose sampler each kind of GLM has.
GLM = {"Glm4v": "glm4v", "Glm4vMoe": "glm46v", "GlmOcr": "glm46v"}
#: How a checkpoint of each kind is made, and whose sampler it has.
KINDS = {
    "Qwen2VL": (make_qwen2_vl, "qwen2"),
    "Qwen2_5_VL": (make_qwen2_5_vl, "qwen2"),
    "Qwen3VL": (make_qwen3_vl, "qwen3"),
    "Qwen3_5": (make_qwen3_5, "qwen3"),
    "Lfm3Vl": (make_lfm3_vl, "qwen3"),
    **{kind: (partial(make_glm, kind=kind), family) for kind, family in GLM.items()},
}


def reference_of(path: Path, kind: str) -> Reference:
    return (GlmReference if kind in GLM else Reference)(path, kind)


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_files_of_every_container_equal_transformers(samplers, kind, tmp_path):
    """Grid and pixels of files that may state no number of frames, or that they are to be turned."""
    make, family = KINDS[kind]
    path = make(tmp_path)
    reference, vision = Reference(path, kind), encoder(path)
    preparation = MediaPreparation(media_processor(path), processes=1)
    try:
        for number, asked in enumerate(FILES):
            rate = (NTSC, FILM, Fraction(25))[number % 3]
            data = clip(25 + number, rate, size=(48, 32), **asked)
            source = MediaSource(0, "here", "video", data=data)
            media = preparation.prepare(preparation.for_prompt([source]), source, [data])
            frames = turned(samplers, family, data, rate, TURNS.get(asked.get("matrix"), 0))
            patches, grid = reference.video(frames)
            assert media.item.grid == tuple(grid[0].tolist()), asked
            ours = vision.patchify(torch.from_numpy(media.pixels.copy()))
            torch.testing.assert_close(ours, patches, atol=0, rtol=0)
    finally:
        preparation.close()


@pytest.mark.parametrize("kind", KINDS)
def test_items_equal_transformers(samplers, clips, kind, tmp_path, wide):
    """Grid, pixels, the times that the model is told, and the tokens of a prompt.

    Without ``wide`` each kind has a third of the clips; three kinds together have all.
    """
    make, family = KINDS[kind]
    if not wide:
        clips = clips[list(KINDS).index(kind) % 3 :: 3]
    path = make(tmp_path)
    reference, vision = reference_of(path, kind), encoder(path)
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    text = f"what is {glm.VIDEO if kind in GLM else qwen.VIDEO} about? yes"
    pad = "<|video|>" if kind in GLM else "<|video_pad|>"
    preparation = MediaPreparation(media_processor(path), processes=1)
    try:
        for data, asked in clips:
            if family == "glm46v" or (kind in GLM and asked.num_frames):
                asked = USUAL  # it takes no wishes
            source = MediaSource(0, "here", "video", data=data, video=asked)
            media = preparation.prepare(preparation.for_prompt([source]), source, [data])
            frames, metadata = seen(samplers, family, data, asked)
            patches, grid = reference.video(frames)
            assert media.item.grid == tuple(grid[0].tolist())
            ours = vision.patchify(torch.from_numpy(media.pixels.copy()))
            torch.testing.assert_close(ours, patches, atol=0, rtol=0)
            if kind == "Qwen2VL":
                assert media.item.times == ()
            elif kind == "Qwen2_5_VL":
                seconds = 2 / metadata.sampled_fps
                assert media.item.times == tuple(step * seconds for step in range(media.item.grid[0]))
            words = reference.placeholder(len(frames), grid[0].tolist(), 0.0, metadata)
            expected = reference.tokenizer(text.replace(pad, words))["input_ids"]
            assert builder.from_text(text, [media.item]).token_ids == expected, asked
    finally:
        preparation.close()


@pytest.mark.parametrize(
    ("family", "make", "side"),
    [("onevision", make_onevision, SIDE), ("internvl", make_internvl, INTERNVL_SIDE)],
)
def test_squares_of_frames_equal_transformers(samplers, clips, tmp_path, request, family, make, side, wide):
    """OneVision shows 32 frames, InternVL the middle ones of eight parts.

    Without ``wide`` each has half of the clips; both together have all.
    """
    rate = Fraction(25)
    if not wide:
        clips = clips[family == "internvl" :: 2]
    given = [(data, asked, seen(samplers, family, data, asked)[0]) for data, asked in clips]
    for asked in FILES:
        data = clip(40, rate, size=(48, 32), **asked)
        given.append((data, USUAL, turned(samplers, family, data, rate, TURNS.get(asked.get("matrix"), 0))))
    preparation = MediaPreparation(media_processor(make(tmp_path)), processes=1)
    request.addfinalizer(preparation.close)
    for data, asked, frames in given:
        source = MediaSource(0, "here", "video", data=data, video=asked)
        media = preparation.prepare(preparation.for_prompt([source]), source, [data])
        assert media.item.grid == (len(frames), 0, 0)
        expected = np.stack([frame.resize((side, side), Image.Resampling.BICUBIC) for frame in frames])
        assert (media.pixels == expected).all()


def test_smolvlm_is_shown_frames_with_their_times(samplers, clips, tmp_path, request):
    """Ids, pixels and times of files, with the size and the numbers of frames of a public checkpoint."""
    path, stated = make_smolvlm(tmp_path), SimpleNamespace(num_frames=12, fps=1)
    rewrite_json(
        path / "preprocessor_config.json",
        {"video_sampling": {"fps": 1, "max_frames": 12, "video_size": {"longest_edge": 90}}},
    )
    reference = IdeficsReference(path, "SmolVLM")
    preparation = MediaPreparation(media_processor(path), processes=1)
    request.addfinalizer(preparation.close)
    builder = load_prompt_builder(EngineConfig(model=str(path)))
    sample = samplers.smolvlm.sample_frames

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        return sample(stated, metadata, asked.num_frames, asked.fps)

    for data, asked in clips:
        source = MediaSource(0, "here", "video", data=data, video=asked)
        media = preparation.prepare(preparation.for_prompt([source]), source, [data])
        frames, metadata = read_video_pyav(io.BytesIO(data), choose)
        images = [[Image.fromarray(frame) for frame in frames]]
        made = reference.processor.image_processor(images, do_image_splitting=False, return_tensors="pt")
        pixels = (torch.from_numpy(media.pixels) / 255 - 0.5) / 0.5
        torch.testing.assert_close(pixels.permute(0, 3, 1, 2), made["pixel_values"][0])
        words = video_text(reference.processor, metadata)
        text = "User: look {} what is it?"
        expected = reference.processor.tokenizer(text.format(words))["input_ids"]
        assert builder.from_text(text.format("<video>"), [media.item]).token_ids == expected


@pytest.mark.parametrize("kind", ["Qwen2_5_VL", "Qwen3VL"])
def test_sizes_of_capped_videos_are_those_of_transformers(samplers, kind, tmp_path, monkeypatch):
    """``cap_pixels_per_frame`` bounds the frames by their share of a budget of tokens."""
    make, family = {"Qwen2_5_VL": (make_qwen2_5_vl, "qwen2"), "Qwen3VL": (make_qwen3_vl, "qwen3")}[kind]
    path, theirs = make(tmp_path), getattr(samplers, family)
    tokens = 400 if family == "qwen2" else 30
    bounds = {"shortest_edge": 64, "longest_edge": 20_000}
    stated = {"cap_pixels_per_frame": True, "max_video_tokens": tokens, "size": bounds}
    if not (path / "video_preprocessor_config.json").exists():
        shutil.copy(path / "preprocessor_config.json", path / "video_preprocessor_config.json")
    rewrite_json(path / "video_preprocessor_config.json", stated)
    backend = theirs.__mro__[1]
    monkeypatch.setattr(backend, "resize", lambda self, image, size, resample, **_: size, raising=False)
    processor = object.__new__(theirs)
    processor.max_video_tokens = tokens
    capped, free = media_processor(path), replace(media_processor(path), max_video_tokens=None)
    seen = set()
    for size in ((160, 120), (40, 300), (16, 16), (500, 333)):
        for count in (1, 2, 5, 12, 30):
            clip = torch.zeros(1, max(count, 2 if family == "qwen3" else 1), 3, size[1], size[0])
            wanted = processor.resize(
                clip, SizeDict(**bounds), None, factor=8, temporal_factor=2, cap_pixels_per_frame=True
            )
            rows = -(-count // 2) * (wanted.height // 8) * (wanted.width // 8)
            assert capped.check_video(size, count) == rows, (size, count)
            seen.add(rows == free.check_video(size, count))
    assert seen == {True, False}


def test_a_video_longer_than_the_context_is_refused_before_decoding(tmp_path):
    path = make_qwen2_5_vl(tmp_path)
    preparation = MediaPreparation(media_processor(path), max_tokens=20, processes=1)
    data = clip(50, 5, size=(160, 120))
    source = MediaSource(0, "messages[0].content[0].video_url.url", "video", data=data)
    try:
        with pytest.raises(ContextLengthExceeded) as error:
            preparation.prepare(preparation.for_prompt([source]), source, [data])
        assert error.value.param == source.where
    finally:
        preparation.close()
