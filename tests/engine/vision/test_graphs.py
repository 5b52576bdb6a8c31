"""Captured forward passes of a tower give the eager results, whatever ran before."""

from dataclasses import replace

import pytest
import torch

from engine.distributed.group import SingleProcessGroup
from engine.graphs import CudaCapture
from engine.layers.build import BuildContext
from engine.vision import graphs as vision_graphs
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionTransformer
from engine.vision.transformer_config import VisionConfig
from tests.engine.rerun import rerun

#: Lengths of segments, one batch after the other: many short ones before few long ones, and the other way.
BATCHES = [[9, 5, 8, 7], [40, 33], [3], [64, 2, 2], [70], [10, 10, 10, 10]]


def tower(window_len: int | None) -> VisionTransformer:
    config = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=12,
        num_heads=2,
        patch_dim=12,
        activation="gelu",
        rope_theta=10000.0,
        full_layers=None if window_len is None else (1, 5),
    )
    build = BuildContext(torch.device("cpu"), torch.float32, SingleProcessGroup())
    made = VisionTransformer(config, build, keep=(0, 4))
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1600], [1000, 24, 900], [100], [1600] * 4, [2048, 900]])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_on_a_gpu(lengths):
    """A tower of Qwen2-VL's width, captured in bfloat16 with the kernels for many rows, against the same
    weights run eagerly in float32."""
    device = torch.device("cuda")
    config = VisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_layers=6,
        num_heads=16,
        patch_dim=1176,
        activation="quick_gelu",
        rope_theta=10000.0,
    )
    captured, eager = (
        VisionTransformer(config, BuildContext(device, dtype, SingleProcessGroup()), keep=(2,))
        for dtype in (torch.bfloat16, torch.float32)
    )
    torch.manual_seed(0)
    for parameter, wide in zip(captured.parameters(), eager.parameters(), strict=True):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
        parameter.data.normal_(std=scale)
        wide.data.copy_(parameter)
    captured.expects_crowds = sum(lengths) > vision_graphs.MAX_TOKENS
    captured.capture_graphs(CudaCapture(device), positions=False, rehearse=lambda: None)
    count = sum(lengths)
    angles = torch.randn(count, 40, device=device)
    segments = VisionSegments(bounds(lengths).to(device), max(lengths), angles.cos(), angles.sin())
    for _ in range(2):
        patches = torch.randn(count, 1176, device=device).bfloat16()
        with torch.inference_mode():
            wanted = eager.states(patches.float(), segments)
            found = captured.states(patches, segments)
        for one, other in zip(found, wanted, strict=True):
            assert (one.float() - other).norm() < 0.03 * other.norm()


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize(("window_len", "positions"), [(None, False), (None, True), (4, False)])
def test_replays_equal_eager_passes(monkeypatch, window_len, positions):
    """From patches on, and from embedded patches to which the caller adds positions."""
    monkeypatch.setattr(vision_graphs, "TOKEN_STEP", 16)
    monkeypatch.setattr(vision_graphs, "MAX_TOKENS", 80)
    eager, captured = tower(window_len), tower(window_len)
    captured.capture_graphs(rerun, window_len=window_len, positions=positions, rehearse=lambda: None)
    pauses: list[int] = []
    for number, lengths in enumerate(BATCHES):
        count, generator = sum(lengths), torch.Generator().manual_seed(number)
        angles, patches = (
            torch.randn(count, 8, generator=generator),
            torch.randn(count, 12, generator=generator),
        )
        segments = VisionSegments(bounds(lengths), max(lengths), angles.cos(), angles.sin())
        windows = None
        if window_len is not None:
            cut = [min(window_len, n - i) for n in lengths for i in range(0, n, window_len)]
            windows = VisionSegments(bounds(cut), window_len, angles.cos(), angles.sin())
        options = {"windows": windows}
        if positions:
            options["positions"] = torch.randn(count, 32, generator=generator)
        with torch.inference_mode():
            wanted = eager.states(patches, segments, **options)
            captured.pause = lambda: pauses.append(number)  # noqa: B023
            found = captured.states(patches, segments, **options)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    # Between the three parts.
    assert pauses == sorted([*range(len(BATCHES))] * 2)


@pytest.mark.parametrize("window_len", [None, 4])
def test_a_crowd_s_images_share_a_replay(monkeypatch, window_len):
    """Of several images that are small enough each; larger ones, and more of them, run eagerly."""
    monkeypatch.setattr(vision_graphs, "TOKEN_STEP", 8)
    monkeypatch.setattr(vision_graphs, "MAX_TOKENS", 16)
    monkeypatch.setattr(vision_graphs, "CROWD_STEP", 16)
    monkeypatch.setattr(vision_graphs, "CROWD_TOKENS", 64)
    eager, captured = tower(window_len), tower(window_len)
    captured.expects_crowds = True
    captured.capture_graphs(rerun, window_len=window_len, rehearse=lambda: None)
    sizes = []
    for number, lengths in enumerate([[16, 16], [16] * 4, [5, 15, 9], [16], [17, 3], [16, 16, 16, 16, 1]]):
        count, generator = sum(lengths), torch.Generator().manual_seed(number)
        angles = torch.randn(count, 8, generator=generator)
        patches = torch.randn(count, 12, generator=generator)
        segments = VisionSegments(bounds(lengths), max(lengths), angles.cos(), angles.sin())
        windows = None
        if window_len is not None:
            cut = [min(window_len, n - i) for n in lengths for i in range(0, n, window_len)]
            windows = VisionSegments(bounds(cut), window_len, angles.cos(), angles.sin())
        sizes.append(captured._graphs.fits(patches, segments, windows))
        with torch.inference_mode():
            wanted = eager.states(patches, segments, windows=windows)
            found = captured.states(patches, segments, windows=windows)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert sizes == [True, True, True, True, False, False]


@pytest.mark.parametrize("window_len", [None, 4])
def test_segments_are_copied_when_they_change(monkeypatch, window_len):
    """Equal objects several times, others of the same lengths, and other windows of the same segments."""
    monkeypatch.setattr(vision_graphs, "TOKEN_STEP", 16)
    monkeypatch.setattr(vision_graphs, "MAX_TOKENS", 32)
    eager, captured = tower(window_len), tower(window_len)
    captured.capture_graphs(rerun, window_len=window_len, rehearse=lambda: None)
    generator = torch.Generator().manual_seed(0)

    def segments(*lengths: int) -> VisionSegments:
        angles = torch.randn(sum(lengths), 8, generator=generator)
        return VisionSegments(bounds(list(lengths)), max(lengths), angles.cos(), angles.sin())

    def windows(given: VisionSegments, *lengths: int) -> VisionSegments | None:
        return None if window_len is None else replace(given, cu_seqlens=bounds(list(lengths)), max_len=4)

    long, same_length, short = segments(20), segments(20), segments(3, 9)
    first = long, windows(long, 4, 4, 4, 4, 4)
    second = same_length, windows(same_length, 2, 4, 4, 4, 4, 2)
    third = short, windows(short, 3, 4, 4, 1)
    cut_otherwise = long, windows(long, 1, 3, 4, 4, 4, 4)
    batches = [first, first, second, first, third, third, first, cut_otherwise, first]
    for within, windowed in batches:
        patches = torch.randn(int(within.cu_seqlens[-1]), 12, generator=generator)
        with torch.inference_mode():
            wanted = eager.states(patches, within, windows=windowed)
            found = captured.states(patches, within, windows=windowed)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window_len", [None, 4])
def test_no_segment_exceeds_the_size_that_is_captured(monkeypatch, window_len):
    """An image that is encoded before the captures leaves its segments behind, which are longer than the
    smallest size. Captured work runs, so it must not see them."""
    monkeypatch.setattr(vision_graphs, "TOKEN_STEP", 16)
    monkeypatch.setattr(vision_graphs, "MAX_TOKENS", 80)
    made, seen = tower(window_len), []

    def capture(work):
        *_, segments, windows = work.args
        ends = [int(bounds.cu_seqlens.max()) for bounds in (segments, windows) if bounds is not None]
        seen.append((segments.max_len, max(ends)))
        return rerun(work)

    def encode():
        within = VisionSegments(bounds([70]), 70, torch.ones(70, 8), torch.zeros(70, 8))
        windows = None if window_len is None else replace(within, cu_seqlens=bounds([35, 35]), max_len=35)
        made.states(torch.zeros(70, 12), within, windows=windows)

    made.capture_graphs(capture, window_len=window_len, rehearse=encode)
    assert min(size for size, _ in seen) == 16
    assert all(end <= size for size, end in seen)


def test_batches_too_large_for_a_graph_run_eagerly(monkeypatch):
    monkeypatch.setattr(vision_graphs, "MAX_TOKENS", 32)
    monkeypatch.setattr(vision_graphs, "TOKEN_STEP", 32)
    made, captures = tower(None), []
    made.capture_graphs(lambda work: captures.append(work()) or work, rehearse=lambda: None)
    # Two numbers of segments, and three parts: 4, 7 and 1 blocks.
    assert len(captures) == 6
    for lengths in ([33], [4] * 5):
        count = sum(lengths)
        segments = VisionSegments(bounds(lengths), max(lengths), torch.ones(count, 8), torch.zeros(count, 8))
        assert made.states(torch.zeros(count, 12), segments)[-1].shape == (count, 32)
    assert len(captures) == 6
