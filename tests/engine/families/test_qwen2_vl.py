"""Tests of Qwen2-VL alone; ``test_laws.py`` compares whole answers of all families."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from engine.errors import ConfigError, InvalidRequest
from engine.families.load import load_vision_encoder
from engine.families.qwen2_vl.family import FAMILY
from engine.graphs import CudaCapture
from engine.media.video.video import Video
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun, PreparedMedia
from tests.engine.families.cases import case_named
from tests.engine.families.made import Made
from tests.engine.families.opened import encoder, media_processor, parse
from tests.engine.families.qwen import IMAGE
from tests.engine.rerun import rerun
from tests.engine.tiny import make_qwen2_vl, picture, reference_inputs, reference_model, rewrite_json

PROMPT = f"first {IMAGE} then {IMAGE}"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.mark.covering(2)
@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gqa_ratio", [1, 2, 4])
def test_heads_may_share_keys_and_embeddings_be_tied(tmp_path, gqa_ratio, tied, hub):
    def make(path, hub):
        make_qwen2_vl(path, tied=tied, gqa_ratio=gqa_ratio, hub_names=hub, seed=3)

    made = Made(replace(case_named("Qwen2-VL"), make=make), tmp_path / "made", hub)
    made.check_all()
    assert parse(made.path)[1].eos_token_ids == (2, 0)


def test_rows_equal_transformers(path):
    pictures = [picture(60, 44), picture(33, 90, 1)]
    inputs = reference_inputs(path, PROMPT, pictures)
    with torch.inference_mode():
        features = reference_model(path).model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        )
    rows = encoder(path).encode([media_processor(path).prepare(image) for image in pictures])
    for ours, theirs in zip(rows, features.pooler_output, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


class SentEvent:
    """Stands in for the event behind what reads an image's bytes: until it is waited for, they are needed."""

    def __init__(self):
        self.needed = False

    def record(self):
        self.needed = True

    def synchronize(self):
        self.needed = False


def test_bytes_of_an_image_stay_until_the_tower_has_read_them(path, monkeypatch):
    """Batches of several images don't read them."""
    ours = media_processor(path)
    kept = load_vision_encoder(*parse(path), device=torch.device("cpu"), dtype=torch.float32)
    kept.capture_graphs(rerun)
    graphs, sent = kept.tower._graphs, SentEvent()
    written, write = [], graphs._image.write

    def checked(memory, pixels):
        assert not sent.needed
        written.append(pixels.shape)
        write(memory, pixels)

    monkeypatch.setattr(graphs, "_sent", sent)
    monkeypatch.setattr(graphs, "_image", replace(graphs._image, write=checked))
    one, other = (ours.prepare(picture(60, 44, seed)) for seed in range(2))
    kept.encode([one])
    assert sent.needed
    kept.encode([other])
    assert sent.needed and len(written) == 2
    sent.synchronize()
    kept.encode([one, other])
    assert not sent.needed and len(written) == 2


def test_plans_of_a_grid_serve_its_next_image(path):
    """Captured passes don't copy segments again that the last image used. Nobody waits for the device between
    two images."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    ours = media_processor(path)
    kept = load_vision_encoder(*parse(path), device=device, dtype=torch.float32)
    kept.capture_graphs(CudaCapture(device) if on_gpu else rerun)
    wide, tall = ((60, 44), (33, 90))
    batches = [[wide], [wide], [tall], [wide], [wide, tall], [tall], [tall, tall], [wide]]
    media = [
        [ours.prepare(picture(*size, seed + n)) for n, size in enumerate(sizes)]
        for seed, sizes in enumerate(batches)
    ]
    found = [row.clone() for batch in media for row in kept.encode(batch)]
    wanted = [row for batch in media for row in encoder(path).encode(batch)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=2e-3 if on_gpu else 1e-5, rtol=0)


@pytest.mark.parametrize("bounds", [(3136, 12845056), (3136, 1003520), (100000, 200000)])
def test_token_counts_of_the_public_sizes(path, bounds):
    """Counts follow from an image's size alone, here with patches of 14 pixels."""
    theirs = transformers.Qwen2VLImageProcessorPil(min_pixels=bounds[0], max_pixels=bounds[1])
    ours = FAMILY.media_processor(*parse(path), {})
    ours = replace(ours, vision=replace(ours.vision, patch_size=14), pixels=bounds)
    generator = np.random.default_rng(0)
    sizes = [(*generator.integers(1, 6000, 2).tolist(),) for _ in range(300)]
    sizes += [(14 * n, 14 * n + 7) for n in range(1, 40)] + [(42, 70), (1, 200), (8400, 42)]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        assert ours.check((width, height)) * 4 == theirs.get_number_of_image_patches(height, width)


def test_elongated_images_are_refused(path):
    ours = media_processor(path)
    assert ours.check((200, 1)) > 0
    for size in ((201, 1), (3, 601)):
        with pytest.raises(InvalidRequest, match="elongated"):
            ours.check(size)
        with pytest.raises(InvalidRequest, match="elongated"):
            ours.prepare(Image.new("RGB", size))


def test_hashes_of_different_images_differ(path):
    ours = media_processor(path)
    image = picture(60, 44)
    changed = image.copy()
    changed.putpixel((3, 3), (1, 2, 3))
    flat = Image.new("RGB", (16, 64))
    hashes = [
        ours.prepare(image).item.hash,
        ours.prepare(changed).item.hash,
        ours.prepare(flat).item.hash,
        ours.prepare(flat.transpose(Image.Transpose.ROTATE_90)).item.hash,
        ours.prepare_video(Video.of([flat, flat])).item.hash,
        media_processor(path, max_pixels=1024).prepare(image).item.hash,
    ]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == ours.prepare(image.copy()).item.hash


def test_options_bound_the_size_of_images(path):
    small = media_processor(path, max_pixels=512)
    assert small.check((600, 600)) == 4
    # The checkpoint's lower bound gives way to an upper one below it.
    assert media_processor(path, max_pixels=64).check((600, 600)) == 1
    assert media_processor(path, min_pixels=4096, max_pixels=8192).check((8, 8)) == 64


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"min_pixels": 0}, "min_pixels"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"max_pixels": True}, "max_pixels"),
        ({"max_pixels": "9"}, "max_pixels"),
        ({"num_crops": 4}, "num_crops"),
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(path, options, name):
    with pytest.raises(ConfigError, match=name) as error:
        media_processor(path, **options)
    assert error.value.param == f"mm_processor_kwargs.{name}"


def test_positions_equal_transformers(path):
    """Images and videos of several frames: next to each other, at the prompt's ends, and none."""
    _, config = parse(path)
    reference = reference_model(path).model
    grids = {"image": [(1, 4, 6), (1, 10, 2), (1, 2, 2)], "video": [(3, 4, 2), (2, 2, 8)]}
    order = ["video", "text", "image", "text", "image", "text", "video", "text", "image"]
    for start in range(len(order)):
        _compare_positions(config, reference, order[start:], grids)
    _compare_positions(config, reference, ["text"], grids)


def _compare_positions(config, reference, order, grids):
    ids, types, spans = [], [], []
    left = {kind: iter(shapes) for kind, shapes in grids.items()}
    used = {"image": [], "video": []}
    for number, kind in enumerate(order):
        if kind == "text":
            ids += [9] * (3 + number)
            types += [0] * (3 + number)
            continue
        grid = next(left[kind])
        used[kind].append(grid)
        count = grid[0] * grid[1] * grid[2] // 4
        token = config.image_token_id if kind == "image" else config.video_token_id
        item = MediaItem(kind, "", count, grid, (1, 1), (PlaceholderRun(token, count, True),))
        spans.append(MediaSpan(item, len(ids), count))
        ids += [token] * count
        types += [1 if kind == "image" else 2] * count
    # With one more token of text, which is where an answer begins.
    expected, _ = reference.get_rope_index(
        torch.tensor([[*ids, 9]]),
        torch.tensor([[*types, 0]]),
        *(torch.tensor(used[kind]) if used[kind] else None for kind in ("image", "video")),
    )
    positions, offset = FAMILY.positions(config, ids, spans)
    np.testing.assert_array_equal(positions, expected[:, 0, :-1].numpy())
    assert positions.dtype == np.int64
    assert expected[:, 0, -1].tolist() == [len(ids) + offset] * 3


def test_videos_equal_transformers(path):
    """A temporal patch has two frames; the last frame is repeated if one is missing."""
    ours, reference = media_processor(path), reference_model(path).model
    frames = [picture(40, 32, seed) for seed in range(5)]
    media = ours.prepare_video(Video.of(frames))
    assert media.item.grid == (3, 8, 10)
    image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    singles = [image_processor(frame, return_tensors="pt")["pixel_values"] for frame in [*frames, frames[-1]]]
    # Each frame alone was doubled in time: of two frames, take one half from each.
    halves = [single.view(-1, 3, 2, 16)[:, :, 0] for single in singles]
    patches = torch.cat([torch.stack(halves[i : i + 2], dim=2).flatten(1) for i in (0, 2, 4)])
    with torch.inference_mode():
        expected = reference.get_video_features(patches, torch.tensor([[3, 8, 10]])).pooler_output[0]
    torch.testing.assert_close(encoder(path).encode([media])[0], expected, atol=1e-4, rtol=0)
    with pytest.raises(InvalidRequest):
        ours.prepare_video(Video.of([]))
    with pytest.raises(InvalidRequest):
        ours.prepare_video(Video.of([picture(8, 8), picture(8, 9)]))


def test_batched_images_do_not_see_each_other(path):
    vision, ours = encoder(path), media_processor(path)
    media = [ours.prepare(picture(*size)) for size in ((60, 44), (8, 90), (16, 16))]
    media.append(ours.prepare_video(Video.of([picture(40, 32, seed) for seed in range(3)])))
    for together, entry in zip(vision.encode(media), media, strict=True):
        torch.testing.assert_close(together, vision.encode([entry])[0], atol=1e-5, rtol=0)


def test_pixels_that_do_not_fit_their_grid_are_refused(path):
    media = media_processor(path).prepare(picture(60, 44))
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels[:-8])])
    with pytest.raises(InvalidRequest, match="grid"):
        encoder(path).encode([PreparedMedia(media.item, media.pixels.astype(np.float32))])


def test_public_configuration_is_filled_up(tmp_path):
    """The public 2B file states few fields of its tower."""
    path = make_qwen2_vl(tmp_path, hub_names=True)
    public = {"hidden_size": 64, "in_chans": 3, "spatial_patch_size": 14}
    rewrite_json(path / "config.json", {"vision_config": public, "image_token_id": 5})
    rewrite_json(path / "preprocessor_config.json", {"patch_size": 14})
    _, config = parse(path)
    tower = config.vision.tower
    assert (tower.num_layers, tower.hidden_size, tower.num_heads, tower.head_dim) == (32, 1280, 16, 80)
    assert (tower.intermediate_size, tower.patch_dim, config.vision.patch_size) == (5120, 1176, 14)
    assert config.image_token_id == 5 and config.decoder.windows == ()


def test_rows_of_a_read_only_array(path):
    """Arrays from shared memory can't be written to."""
    media = media_processor(path).prepare(picture(60, 44))
    media.pixels.flags.writeable = False
    assert len(encoder(path).encode([media])[0]) == media.item.num_tokens
