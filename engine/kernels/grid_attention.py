"""Attention within square images, or windows of them, with scores by the distance of a query and a key.

Patches of an image lie line by line. Windows at its right and at its bottom reach beyond it: the places without a
patch have keys and values too, which are those of an empty patch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch
from engine.kernels.paged import LOG2E
from engine.kernels.pdl import pdl_options, wait_for_previous
from engine.kernels.tile import AttentionTile

#: Numbers of scores that are computed together by the reference.
_TOGETHER = 1 << 28


def grid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor | None,
    empty: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    side: int,
    window: int,
    scale: float,
) -> torch.Tensor:
    """Softmax attention of each patch over all places of its window.

    The score of a query ``q`` and a key ``k`` is ``scale * (q · k) + q · down + q · along``: products with vectors of
    how far the query is below the key, and how far to its right (https://arxiv.org/abs/2112.01526, section 4.1).

    Args:
        q, k, v: ``(N, heads, head_dim)``, all patches of images of ``side`` by ``side`` patches; views of one tensor
            with a contiguous last dimension.
        table: ``(rows, head_dim)``: ``down`` and behind it ``along`` for the distances from ``1 - window`` to
            ``window - 1``, and any further rows; None adds nothing. With rows that are a multiple of 8, products
            with it take less time.
        empty: key and value ``(heads, head_dim)``, contiguous, of places without a patch; None: zeros.
        window: side of a window, from an image's upper left on.

    Returns:
        ``(N, heads, head_dim)`` contiguous.
    """
    products = None if table is None else torch.matmul(q, table.T)
    run = grid_attention_triton if use_triton(q) else grid_attention_reference
    return run(q, k, v, products, empty, side=side, window=window, scale=scale)


def grid_attention_reference(q, k, v, products, empty, *, side, window, scale):
    shape = len(q) // side**2, side, side, q.shape[1], -1
    fill = (None, None, None) if empty is None else (None, *empty)
    q_w, k_w, v_w = (
        _windows(x.reshape(shape), window, each) for x, each in zip((q, k, v), fill, strict=True)
    )
    of_windows = None if products is None else _windows(products.view(shape), window, None)
    together = max(1, _TOGETHER // (window**4 * q.shape[1]))
    outputs = []
    for first in range(0, len(q_w), together):
        part = slice(first, first + together)
        bias = None if of_windows is None else _bias(of_windows[part], window)
        heads = (x[part].transpose(1, 2) for x in (q_w, k_w, v_w))
        outputs.append(F.scaled_dot_product_attention(*heads, bias, scale=scale).transpose(1, 2))
    along = -(-side // window)
    out = torch.cat(outputs).view(-1, along, along, window, window, *q.shape[1:]).transpose(2, 3)
    return out.flatten(3, 4).flatten(1, 2)[:, :side, :side].flatten(0, 2)


def _windows(x: torch.Tensor, window: int, empty: torch.Tensor | None) -> torch.Tensor:
    """Cut images ``(images, side, side, heads, D)`` into windows ``(windows, window², heads, D)``; places without
    a patch are ``empty`` ``(heads, D)``, or zeros."""
    images, side = x.shape[:2]
    along = -(-side // window)
    canvas = x.new_zeros(images, along * window, along * window, *x.shape[3:])
    if empty is not None:
        canvas[...] = empty
    canvas[:, :side, :side] = x
    lines = canvas.view(images, along, window, along, window, *x.shape[3:])
    return lines.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _bias(products: torch.Tensor, window: int) -> torch.Tensor:
    """The scores by distance ``(windows, heads, window², window²)`` of products
    ``(windows, window², heads, rows)``."""
    of_places = products.transpose(1, 2).unflatten(2, (window, window))
    lines, columns, *_ = of_places.split(2 * window - 1, dim=-1)
    places = torch.arange(window, device=products.device)
    distances = places[:, None] - places + window - 1
    down = lines.gather(-1, distances[:, None].expand(*lines.shape[:-1], -1))
    along = columns.gather(-1, distances.expand(*columns.shape[:-1], -1))
    return (down[..., :, None] + along[..., None, :]).flatten(4, 5).flatten(2, 3)


def choose_tile(window: int, itemsize: int) -> AttentionTile:
    """Choose the tile of a problem; ``keys`` are those of whole lines of a window, which may lie further apart."""
    keys = max(32, places_of(window))
    if itemsize > 2:
        return AttentionTile(32, keys, 4, 1)
    # Of five tiles for whole images and six for windows, those of SAM's sizes take the least time on an H200.
    return AttentionTile(64, keys, 4, 3 if window > 32 else 2)


def places_of(window: int) -> int:
    """Places of a line of a window in a tile."""
    return max(16, triton.next_power_of_2(window))


def grid_attention_triton(q, k, v, products, empty, *, side, window, scale):
    """See :func:`grid_attention`."""
    tokens, heads, dim = q.shape
    assert q.stride() == k.stride() == v.stride() and q.stride(2) == 1 and tokens % side**2 == 0
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    tile, along = choose_tile(window, q.element_size()), triton.cdiv(side, window)
    # Windows that divide the images hold patches alone.
    empty = None if side % window == 0 else empty
    empty_k, empty_v = (q, q) if empty is None else empty
    launch(
        _grid_kernel, (triton.cdiv(window**2, tile.rows), heads, tokens // side**2 * along**2),
        q_ptr=q, k_ptr=k, v_ptr=v, products_ptr=q if products is None else products.contiguous(),
        empty_k_ptr=empty_k, empty_v_ptr=empty_v, out_ptr=out, scale=scale * LOG2E, log2e=LOG2E,
        TOKEN=q.stride(0), HEAD=q.stride(1), HEADS=heads, DIM=dim, MAIN=max(16, triton.next_power_of_2(dim)),
        SIDE=side, WINDOW=window, PLACES=places_of(window), ROWS=tile.rows, KEYS=tile.keys,
        PRODUCTS=0 if products is None else products.shape[2], EMPTY=empty is not None,
        num_warps=tile.warps, num_stages=tile.stages, **pdl_options(q),
    )  # fmt: skip
    return out


@triton.jit
def _grid_kernel(
    q_ptr, k_ptr, v_ptr, products_ptr, empty_k_ptr, empty_v_ptr, out_ptr, scale, log2e,
    TOKEN: tl.constexpr, HEAD: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr,
    SIDE: tl.constexpr, WINDOW: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRODUCTS: tl.constexpr, EMPTY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries, head and window. A step takes whole lines of keys, each padded to
    ``PLACES``. PRODUCTS: numbers of a query and head at ``products_ptr``; 0 for none."""
    wait_for_previous(PDL)
    LINES: tl.constexpr = KEYS // PLACES
    COUNT: tl.constexpr = 2 * WINDOW - 1
    ALONG: tl.constexpr = (SIDE + WINDOW - 1) // WINDOW
    head = tl.program_id(1)
    image = tl.program_id(2) // (ALONG * ALONG)
    top = tl.program_id(2) // ALONG % ALONG * WINDOW
    left = tl.program_id(2) % ALONG * WINDOW
    base = image.to(tl.int64) * (SIDE * SIDE)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line, column = place // WINDOW, place % WINDOW
    shown = (line < WINDOW) & (top + line < SIDE) & (left + column < SIDE)
    token = base + (top + line) * SIDE + left + column
    main = tl.arange(0, MAIN)
    mask = shown[:, None] & (main < DIM)[None, :]
    q = tl.load(q_ptr + token[:, None] * TOKEN + head * HEAD + main[None, :], mask=mask, other=0.0)
    key_line, key_column = tl.arange(0, KEYS) // PLACES, tl.arange(0, KEYS) % PLACES
    # Products of a query lie in the order of distances, from the farthest key behind it on.
    products = products_ptr + (token * HEADS + head) * PRODUCTS + WINDOW - 1
    places = tl.arange(0, PLACES)
    along = tl.zeros([ROWS, PLACES], tl.float32)
    if PRODUCTS > 0:
        known = shown[:, None] & (places < WINDOW)[None, :]
        columns = products[:, None] + COUNT + column[:, None] - places[None, :]
        along = tl.load(columns, mask=known, other=0.0).to(tl.float32) * log2e
    empty_k = tl.zeros([MAIN], q.dtype)
    empty_v = empty_k
    if EMPTY:
        empty_k = tl.load(empty_k_ptr + head * DIM + main, mask=main < DIM, other=0.0)
        empty_v = tl.load(empty_v_ptr + head * DIM + main, mask=main < DIM, other=0.0)
    acc = tl.zeros([ROWS, MAIN], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, WINDOW, LINES):
        key_y, key_x = top + first + key_line, left + key_column
        within = (first + key_line < WINDOW) & (key_column < WINDOW)
        key = base + key_y * SIDE + key_x
        k_at = k_ptr + key[None, :] * TOKEN + head * HEAD + main[:, None]
        v_at = v_ptr + key[:, None] * TOKEN + head * HEAD + main[None, :]
        if PLACES == WINDOW and SIDE == WINDOW and WINDOW % LINES == 0 and MAIN == DIM:
            k, v = tl.load(k_at), tl.load(v_at)
        else:
            inside = within & (key_y < SIDE) & (key_x < SIDE)
            k = tl.load(k_at, mask=inside[None, :] & (main < DIM)[:, None], other=0.0)
            v = tl.load(v_at, mask=inside[:, None] & (main < DIM)[None, :], other=0.0)
            if EMPTY:
                k = tl.where(inside[None, :], k, empty_k[:, None])
                v = tl.where(inside[:, None], v, empty_v[None, :])
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if PRODUCTS > 0:
            if LINES == 1:
                down = tl.load(products + line - first, mask=shown, other=0.0).to(tl.float32) * log2e
                scores += down[:, None] + along
            else:
                lines = first + tl.arange(0, LINES)
                above = products[:, None] + line[:, None] - lines[None, :]
                held = shown[:, None] & (lines < WINDOW)[None, :]
                down = tl.load(above, mask=held, other=0.0).to(tl.float32) * log2e
                scores += tl.reshape(down[:, :, None] + along[:, None, :], [ROWS, KEYS])
        if PLACES > WINDOW or WINDOW % LINES != 0:
            scores = tl.where(within[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        probs = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(probs, axis=1)
        row_max = new_max
        acc = tl.dot(probs.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    out = out_ptr + (token[:, None] * HEADS + head) * DIM + main[None, :]
    tl.store(out, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
