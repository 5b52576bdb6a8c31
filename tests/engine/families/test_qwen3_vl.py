"""Tests of Qwen3-VL alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from engine.errors import ConfigError, InvalidRequest
from engine.families.qwen3_vl.family import FAMILY, patch_times, video_size
from engine.inputs.builder import PromptBuilder
from engine.media.video.video import Pace, Video
from engine.text.tokenizer import Tokenizer
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.qwen import IMAGE, VIDEO, Reference, frames, make_qwen3_vl
from tests.engine.tiny import picture, rewrite_json

their_video_size = import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl").smart_resize


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="module")
def reference(path):
    return Reference(path, "Qwen3VL")


def their_rows(output) -> torch.Tensor:
    # Divided by items in later versions of Transformers, as the pooled output always is.
    layers = [part if isinstance(part, torch.Tensor) else part[0] for part in output.deepstack_features]
    return torch.cat([output.pooler_output[0], *layers], dim=1)


@pytest.mark.parametrize("size", [(60, 44), (8, 8), (7, 1000), (64, 64), (33, 90), (16, 120)], ids=str)
def test_rows_equal_transformers(path, reference, size):
    """Rows for the prompt, and beside them the rows for the decoder's first layers."""
    theirs = reference.images(picture(*size), return_tensors="pt")
    media = media_processor(path).prepare(picture(*size))
    assert media.item.grid == tuple(theirs["image_grid_thw"][0].tolist())
    vision = encoder(path)
    pixels = vision.patchify(torch.from_numpy(media.pixels.copy()))
    torch.testing.assert_close(pixels, theirs["pixel_values"], atol=0, rtol=0)
    with torch.inference_mode():
        expected = their_rows(reference.model.model.get_image_features(**theirs))
    torch.testing.assert_close(vision.encode([media])[0], expected, atol=1e-4, rtol=0)


def test_rows_of_several_items_at_once(path, reference):
    ours, vision = media_processor(path), encoder(path)
    media = [ours.prepare(picture(*size)) for size in ((60, 44), (8, 90), (16, 16))]
    media.insert(1, ours.prepare_video(Video.of(frames(3))))
    patches, grid = reference.video(frames(3))
    assert media[1].item.grid == tuple(grid[0].tolist())
    with torch.inference_mode():
        expected = their_rows(reference.model.model.get_video_features(patches, grid))
    together = vision.encode(media)
    torch.testing.assert_close(together[1], expected, atol=1e-4, rtol=0)
    for rows, entry in zip(together, media, strict=True):
        torch.testing.assert_close(rows, vision.encode([entry])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("count", "fps"), [(1, 24), (2, 1.5), (5, 1.5), (8, 3), (7, 29.97)])
def test_placeholders_of_videos_are_those_of_transformers(path, reference, count, fps):
    checkpoint, config = parse(path)
    item = media_processor(path, fps=fps).prepare_video(Video.of(frames(count))).item
    builder = PromptBuilder.for_model(FAMILY, config, Tokenizer.load(checkpoint.path), None)
    prompt = f"say {VIDEO} and {IMAGE}"
    theirs = prompt.replace("<|video_pad|>", reference.placeholder(count, item.grid, fps))
    image = media_processor(path).prepare(picture(8, 8)).item
    theirs = theirs.replace("<|image_pad|>", "<|image_pad|>" * image.num_tokens)
    built = builder.from_text(prompt, [image, item])
    assert built.token_ids == reference.tokenizer(theirs)["input_ids"]
    # With one more token of text, which is where an answer begins.
    ids = torch.tensor([[*built.token_ids, 40]])
    types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
    expected, _ = reference.model.model.get_rope_index(
        ids, types, torch.tensor([image.grid]), torch.tensor([item.grid])
    )
    positions, offset = FAMILY.positions(config, built.token_ids, built.spans)
    np.testing.assert_array_equal(positions, expected[:, 0, :-1].numpy())
    assert expected[:, 0, -1].tolist() == [len(built.token_ids) + offset] * 3


@pytest.mark.parametrize(("tied", "ratio"), [(True, 2), (False, 4)])
def test_other_ratios(tmp_path, tied, ratio):
    """Tied embeddings and ratios of heads that the laws don't cover."""

    def make(path, hub):
        make_qwen3_vl(path, tied=tied, gqa_ratio=ratio, seed=3)

    Made(replace(case_named("Qwen3-VL"), make=make), tmp_path / "made").check_all()


def test_sizes_of_videos_are_those_of_transformers():
    """All frames together are bounded; frames smaller than a merged square are enlarged first."""
    generator = np.random.default_rng(0)
    low, high = 4096, 2_000_000
    seen = set()
    for width, height, count in generator.integers(1, [3000, 2000, 40], (300, 3)).tolist():
        wanted = None
        if count >= 2:
            try:
                wanted = their_video_size(count, height, width, 2, 32, low, high)[::-1]
            except ValueError:
                with pytest.raises(InvalidRequest, match="elongated"):
                    video_size(count, (width, height), 2, 32, low, high)
                continue
            assert video_size(count, (width, height), 2, 32, low, high) == wanted
            seen.add(np.sign(count * width * height - high))
    assert len(seen) == 2
    # A lone frame, which Transformers refuses, is its own second.
    assert video_size(1, (640, 480), 2, 32, low, high) == video_size(2, (640, 480), 2, 32, low, high)


def test_times_are_means_of_first_and_last_frame():
    assert patch_times(Pace.of_rate(5, 2.0), 2) == (0.25, 1.25, 2.0)


def test_a_video_at_another_pace_is_another_video(path):
    slow, fast = (media_processor(path, fps=fps).prepare_video(Video.of(frames(4))).item for fps in (1, 2))
    assert slow.hash != fast.hash
    with pytest.raises(ConfigError, match="fps"):
        media_processor(path, fps=0)


def test_a_silent_configuration_is_filled_up(path, tmp_path):
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    rewrite_json(tmp_path / "config.json", {"vision_config": {"out_hidden_size": 64}})
    _, config = parse(tmp_path)
    tower = config.vision.tower
    assert (tower.num_layers, tower.head_dim, tower.intermediate_size) == (27, 72, 4304)
    assert (config.vision.position_side, config.vision.deepstack_layers) == (48, (8, 16, 24))
    assert config.embedding_width == 4 * 64
