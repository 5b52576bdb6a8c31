"""Tests of Qwen2.5-VL alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.errors import ConfigError
from engine.families.qwen2_5_vl.family import FAMILY
from engine.media.video.video import Video
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun
from engine.vision.native_grid import plan_frame
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.qwen import Reference, frames, make_qwen2_5_vl
from tests.engine.tiny import TRANSFORMERS, picture, rewrite_json

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def reference(path):
    return Reference(path, "Qwen2_5_VL")


@pytest.mark.parametrize("size", [(60, 44), (8, 8), (7, 1000), (64, 64), (33, 90), (16, 120)], ids=str)
def test_rows_equal_transformers(path, reference, size):
    image = picture(*size)
    theirs = reference.images(image, return_tensors="pt")
    media = media_processor(path).prepare(image)
    assert media.item.grid == tuple(theirs["image_grid_thw"][0].tolist())
    vision = encoder(path)
    pixels = vision.patchify(torch.from_numpy(media.pixels.copy()))
    torch.testing.assert_close(pixels, theirs["pixel_values"], atol=0, rtol=0)
    with torch.inference_mode():
        expected = reference.model.model.get_image_features(**theirs).pooler_output[0]
    torch.testing.assert_close(vision.encode([media])[0], expected, atol=1e-4, rtol=0)


def test_rows_of_several_items_at_once(path, reference):
    ours, vision = media_processor(path), encoder(path)
    media = [ours.prepare(picture(*size)) for size in ((60, 44), (8, 90), (16, 16))]
    media.insert(1, ours.prepare_video(Video.of(frames(5))))
    patches, grid = reference.video(frames(5))
    assert media[1].item.grid == tuple(grid[0].tolist())
    with torch.inference_mode():
        expected = reference.model.model.get_video_features(patches, grid).pooler_output[0]
    together = vision.encode(media)
    torch.testing.assert_close(together[1], expected, atol=1e-4, rtol=0)
    for rows, entry in zip(together, media, strict=True):
        torch.testing.assert_close(rows, vision.encode([entry])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(8, 8), (10, 14), (2, 18), (22, 6), (2, 2)])
def test_windows_equal_transformers(path, grid):
    vision_utils = pytest.importorskip("transformers.vision_utils")
    order, bounds = vision_utils.get_vision_window_index(
        torch.tensor([[1, *grid]]), spatial_merge_size=2, window_size=16, patch_size=4
    )
    plan = plan_frame(parse(path)[1].vision, *grid, CPU)
    torch.testing.assert_close(plan.order, order)
    assert np.cumsum([0, *plan.windows]).tolist() == bounds.tolist()


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2 / 24, 2 / 30, 7.3])
def test_positions_equal_transformers(path, reference, seconds):
    """An image has one position in time; a video's steps are apart by its pace, in whole positions."""
    if seconds % 1 and TRANSFORMERS < (5, 23):
        pytest.skip("earlier versions of Transformers cut off fractions of seconds")
    _, config = parse(path)
    ids, types, spans = [], [], []
    grids = [("text", 3), ("video", (40, 4, 2)), ("text", 2), ("image", (1, 10, 6)), ("text", 2)]
    grids += [("video", (3, 4, 12)), ("text", 1)]
    for kind, grid in grids:
        if kind == "text":
            ids += [9] * grid
            types += [0] * grid
            continue
        count = grid[0] * grid[1] * grid[2] // 4
        times = tuple(i * seconds for i in range(grid[0])) if kind == "video" else ()
        item = MediaItem(kind, "", count, grid, (1, 1), (PlaceholderRun(8, count, True),), times)
        spans.append(MediaSpan(item, len(ids), count))
        ids += [8] * count
        types += [1 if kind == "image" else 2] * count
    # With one more token of text, which is where an answer begins.
    expected, _ = reference.model.model.get_rope_index(
        torch.tensor([[*ids, 9]]),
        torch.tensor([[*types, 0]]),
        torch.tensor([g for kind, g in grids if kind == "image"]),
        torch.tensor([g for kind, g in grids if kind == "video"]),
        second_per_grid_ts=torch.tensor([seconds, seconds]),
    )
    positions, offset = FAMILY.positions(config, ids, spans)
    np.testing.assert_array_equal(positions, expected[:, 0, :-1].numpy())
    assert expected[:, 0, -1].tolist() == [len(ids) + offset] * 3


@pytest.mark.parametrize(
    ("names", "tied", "ratio"), [("saved", True, 4), ("hub", False, 4), ("memory", False, 1)]
)
def test_other_names_and_ratios(tmp_path, names, tied, ratio):
    """Names, tied embeddings and ratios of heads that the laws don't cover."""

    def make(path, hub):
        make_qwen2_5_vl(path, names=names, tied=tied, gqa_ratio=ratio, seed=3)

    Made(replace(case_named("Qwen2.5-VL"), make=make), tmp_path / "made").check_all()


def test_a_video_at_another_pace_is_another_video(path):
    slow, fast = (media_processor(path, fps=fps).prepare_video(Video.of(frames(4))).item for fps in (1, 2))
    assert slow.times == (0.0, 2.0) and fast.times == (0.0, 1.0)
    assert slow.hash != fast.hash
    # Unless told, as Transformers does.
    assert media_processor(path).prepare_video(Video.of(frames(3))).item.times == (0.0, 2 / 24)


@pytest.mark.parametrize("fps", [0, -1, "2", True, 1e9])
def test_a_bad_pace_is_refused(path, fps):
    with pytest.raises(ConfigError, match="fps") as error:
        media_processor(path, fps=fps)
    assert error.value.param == "mm_processor_kwargs.fps"


def test_videos_have_bounds_of_their_own(tmp_path):
    path = make_qwen2_5_vl(tmp_path)
    (tmp_path / "video_preprocessor_config.json").write_text('{"min_pixels": 64, "max_pixels": 512}')
    media = media_processor(path).prepare_video(Video.of(frames(2)))
    assert media.pixels.shape[1] * media.pixels.shape[2] <= 512 < 40 * 56


def test_videos_have_default_bounds_of_their_own(tmp_path):
    """The bounds of Transformers' video processor, if neither file states any."""
    path = make_qwen2_5_vl(tmp_path)
    rewrite_json(path / "preprocessor_config.json", {"size": None})
    assert media_processor(path).pixels == (56 * 56, 1280 * 28 * 28)
    assert media_processor(path).video_pixels == (128 * 28 * 28, 768 * 28 * 28)


def test_public_configuration(tmp_path):
    path = make_qwen2_5_vl(tmp_path, names="hub")
    public = {"hidden_size": 1280, "in_chans": 3, "out_hidden_size": 64, "spatial_patch_size": 14}
    rewrite_json(path / "config.json", {"vision_config": public})
    rewrite_json(path / "preprocessor_config.json", {"patch_size": 14})
    _, config = parse(path)
    tower = config.vision.tower
    assert (tower.num_layers, tower.head_dim, tower.intermediate_size) == (32, 80, 3420)
    assert (config.vision.window, tower.full_layers) == (4, (7, 15, 23, 31))
