"""Images as bytes to the flat, normalised patches that a vision tower takes, in one kernel."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch

#: Values of a byte.
_LEVELS = 256
#: Bytes in front of the pixels of a described image.
HEADER = 16


def patchify(
    pixels: torch.Tensor, table: torch.Tensor, *, patch: int, merge: int, temporal: int
) -> torch.Tensor:
    """Cut an image, or the frames of a video, into patches, and look up each byte's normalised value.

    Args:
        pixels: uint8 ``(H, W, B)``, or ``(F, H, W, B)`` with ``F`` a multiple of ``temporal``; contiguous. Bytes of a
            pixel beyond its ``C`` channels mean nothing. An image counts as ``temporal`` equal frames. Pixels beyond the last whole square are ignored, as in
            a convolution with that stride.
        table: ``(C * 256,)``, the value of each byte of each channel.
        patch: side of a patch, in pixels.
        merge: side of a square, in patches; patches of a square are neighbours in the result.
        temporal: frames per patch.

    Returns:
        ``(F / temporal * H / patch * W / patch, C * temporal * patch²)`` in the dtype of ``table``. Rows are
        ordered by frame, then by square, then line by line within the square.
    """
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and table.is_contiguous()
    run = patchify_triton if use_triton(pixels) else patchify_reference
    return run(pixels, table, patch=patch, merge=merge, temporal=temporal)


def describe_image(out: np.ndarray, pixels: np.ndarray) -> None:
    """Write an image for :func:`patchify_described`: its height, its width and the bytes of a pixel as int32, then
    its pixels from :data:`HEADER` on.

    Args:
        out: uint8 ``(HEADER + H * W * B,)``.
        pixels: uint8 ``(H, W, B)``.
    """
    out[:HEADER].view(np.int32)[:3] = pixels.shape
    out[HEADER:].reshape(pixels.shape)[...] = pixels


def patchify_described(
    described: torch.Tensor, table: torch.Tensor, rows: int, *, patch: int, merge: int, temporal: int
) -> torch.Tensor:
    """Compute :func:`patchify` of one image whose size the host doesn't know.

    Args:
        described: uint8, what :func:`describe_image` has written, and any bytes behind it.
        rows: of the result, at least as many as the image has patches, of which it has one or more. The others hold
            anything that is finite.
    """
    run = patchify_described_triton if use_triton(described) else patchify_described_reference
    return run(described, table, rows, patch=patch, merge=merge, temporal=temporal)


def patchify_described_reference(described, table, rows, **sides):
    height, width, length = described[:HEADER].view(torch.int32)[:3].tolist()
    pixels = described[HEADER : HEADER + height * width * length].view(height, width, length)
    found = patchify_reference(pixels, table, **sides)
    return torch.cat([found, found.new_zeros(rows - len(found), found.shape[1])])


def patchify_reference(pixels, table, *, patch, merge, temporal):
    # Looked up before an image is repeated over time: fewer lookups.
    channels = len(table) // _LEVELS
    values = table[pixels[..., :channels] + torch.arange(channels, device=pixels.device) * _LEVELS]
    frames = values if values.dim() == 4 else values.expand(temporal, *values.shape)
    side = patch * merge
    height, width = (length // side * side for length in pixels.shape[-3:-1])
    frames = frames[:, :height, :width].unflatten(0, (-1, temporal))
    frames = frames.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
    # t, T, H, m, p, W, m, p, C  →  t, H, W, m, m, C, T, p, p
    return frames.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).flatten(5).flatten(0, 4)


def patchify_described_triton(described, table, rows, **sides):
    return _launch(described[HEADER:], table, rows, described.view(torch.int32), (0, 0, 0, 0), **sides)


def patchify_triton(pixels, table, *, patch, merge, temporal):
    *frames, height, width, length = pixels.shape
    squares = (height // (patch * merge)) * (width // (patch * merge))
    rows = (frames[0] // temporal if frames else 1) * squares * merge**2
    shape = height, width, length, height * width * length if frames else 0
    return _launch(pixels, table, rows, None, shape, patch=patch, merge=merge, temporal=temporal)


def _launch(pixels, table, rows, described, shape, *, patch, merge, temporal):
    """Launch the kernel; ``described`` says what of ``shape`` (height, width, bytes of a pixel, elements of a frame)
    the host doesn't know."""
    channels = len(table) // _LEVELS
    size = channels * temporal * patch**2
    out = torch.empty((rows, size), dtype=table.dtype, device=pixels.device)
    height, width, length, frame_stride = shape
    launch(
        _patchify_kernel, (rows,),
        pixels_ptr=pixels, table_ptr=table, out_ptr=out, described_ptr=table if described is None else described,
        height=height, width=width, length=length, frame_stride=frame_stride,
        DESCRIBED=described is not None, CHANNELS=channels, TEMPORAL=temporal, PATCH=patch, MERGE=merge,
        LEVELS=_LEVELS, SIZE=size, num_warps=4,
    )  # fmt: skip
    return out


# These differ between images and videos; specialising on them would compile the kernel again during requests.
@triton.jit(do_not_specialize=["height", "width", "length", "frame_stride"])
def _patchify_kernel(
    pixels_ptr, table_ptr, out_ptr, described_ptr, height, width, length, frame_stride,
    DESCRIBED: tl.constexpr, CHANNELS: tl.constexpr, TEMPORAL: tl.constexpr, PATCH: tl.constexpr, MERGE: tl.constexpr,
    LEVELS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One program per patch."""
    row = tl.program_id(0)
    if DESCRIBED:
        height = tl.load(described_ptr)
        width = tl.load(described_ptr + 1)
        length = tl.load(described_ptr + 2)
    across = width // (PATCH * MERGE)
    squares = height // (PATCH * MERGE) * across
    square, inner = row // (MERGE * MERGE), row % (MERGE * MERGE)
    frame, within = square // squares, square % squares
    top = (within // across * MERGE + inner // MERGE) * PATCH
    left = (within % across * MERGE + inner % MERGE) * PATCH
    column = tl.arange(0, triton.next_power_of_2(SIZE))
    mask = column < SIZE
    channel = column // (TEMPORAL * PATCH * PATCH)
    y = top + column // PATCH % PATCH
    x = left + column % PATCH
    moment = frame * TEMPORAL + column // (PATCH * PATCH) % TEMPORAL
    source = moment.to(tl.int64) * frame_stride + (y * width + x) * length + channel
    level = tl.load(pixels_ptr + source, mask=mask, other=0).to(tl.int32)
    value = tl.load(table_ptr + channel * LEVELS + level, mask=mask, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * SIZE + column, value, mask=mask)
