"""Full attention within one image, for Hopper GPUs.

The general kernel in :mod:`engine.kernels.vision_attention` gives each tile of rows to a program. The tiles of one
image rarely fill a whole number of waves: 1600 patches with 16 heads are 208 tiles of 128 rows for 132 SMs. Here
each SM has one program, and all get an equal share of the pairs of a tile of rows and a tile of keys, one after
the other; shares may begin and end within a tile of rows. The program that ends the last share of a tile of rows
merges them, in the order of their keys: results don't depend on which program comes last.

Warps are specialised as in :mod:`engine.kernels.prefill_attention`: one warp loads tiles through tensor memory
descriptors (TMA), groups of four warps with 64 rows each share the loaded keys and values.

Gluon has no interpreter, so the tests of this kernel need a Hopper GPU.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from engine.kernels.device import is_hopper, num_sms
from engine.kernels.launch import launch
from engine.kernels.paged import LOG2E
from engine.kernels.ring import barriers, buffers, clear_tail, tma_load
from engine.kernels.shares import (
    finishes_tile,
    merge_rows,
    merge_stats,
    part_memory,
    part_of,
    part_pointers,
    program_of,
    share_of_program,
    write_stats,
)

#: Keys per tile; tiles in shared memory at a time.
_KEYS, _STAGES = 128, 2
#: Registers per thread: 168 for three groups of four warps use all registers of an SM. The compute groups take
#: what the load warp gives up.
_REGISTERS, _COMPUTE_REGISTERS, _LOAD_REGISTERS = 168, 240, 24
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether the kernel can compute the attention of ``q``, ``k``, ``v`` ``(T, H, D)``."""
    fits = q.shape[2] in (64, 80, 128) and q.dtype in _DTYPES and is_hopper(q.device)
    return fits and all(_is_matrix(x) for x in (q, k, v))


def _is_matrix(x: torch.Tensor) -> bool:
    """Return whether the heads of a token lie one after the other, where a TMA descriptor can describe them."""
    row, head, column = x.stride()
    aligned = row * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return column == 1 and head == x.shape[2] and aligned


def image_attention_gluon(q, k, v, cu_seqlens, *, scale, counters):
    """See :func:`engine.kernels.dispatch.vision_attention`; one segment that :func:`supports` admits.

    Args:
        counters: see :func:`engine.kernels.shares.part_counters`.
    """
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    programs = num_sms(q.device)
    parts = part_memory(dim, q.device)
    stats = part_memory(2, q.device)
    main = 64 if dim == 80 else dim
    rest = dim - main
    descriptors = [_describe(x, box, width) for x, box in ((q, 64), (k, _KEYS), (v, _KEYS))
                   for width in (main, rest or main)]  # fmt: skip
    launch(
        _image_kernel, (programs,),
        q_desc=descriptors[0], q_rest_desc=descriptors[1], k_desc=descriptors[2], k_rest_desc=descriptors[3],
        v_desc=descriptors[4], v_rest_desc=descriptors[5], bounds_ptr=cu_seqlens, out_ptr=out,
        parts_ptr=parts, stats_ptr=stats, counters_ptr=counters, scale=scale * LOG2E,
        HEADS=heads, MAIN=main, REST=rest, KEYS=_KEYS, STAGES=_STAGES,
        COMPUTE_REGISTERS=_COMPUTE_REGISTERS, LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
    return out


def _describe(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], _DTYPES[x.dtype])
    return TensorDescriptor.from_tensor(x.flatten(1), [rows, width], layout)


# ``scale`` and bounds differ between models only.
@gluon.jit
def _image_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc, bounds_ptr, out_ptr, parts_ptr, stats_ptr,
    counters_ptr, scale, HEADS: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per SM. MAIN, REST: two powers of two, or 0 as the second, whose sum is the head's size."""
    dtype: gl.constexpr = q_desc.dtype
    # Without a second part its buffers are those of the first, and nothing reads them.
    queries = buffers(2, 64, MAIN, dtype)
    keys = buffers(STAGES, KEYS, MAIN, dtype)
    values = buffers(STAGES, KEYS, MAIN, dtype)
    queries_rest = queries
    keys_rest = keys
    values_rest = values
    if REST > 0:
        queries_rest = buffers(2, 64, REST, dtype)
        keys_rest = buffers(STAGES, KEYS, REST, dtype)
        values_rest = buffers(STAGES, KEYS, REST, dtype)
    # Ready: the tile has been loaded. Free: all compute groups have finished with it.
    queries_ready, queries_free = barriers(1, 1), barriers(1, 2)
    keys_ready, keys_free = barriers(STAGES, 1), barriers(STAGES, 2)
    values_ready, values_free = barriers(STAGES, 1), barriers(STAGES, 2)
    q_ring = (queries, queries_rest, queries_ready, queries_free)
    k_ring = (keys, keys_rest, keys_ready, keys_free)
    v_ring = (values, values_rest, values_ready, values_free)
    rings = (q_ring, k_ring, v_ring)
    begin = gl.load(bounds_ptr)
    length = gl.load(bounds_ptr + 1) - begin
    share = _share(length, HEADS, KEYS)
    out = (out_ptr, parts_ptr, stats_ptr, counters_ptr)
    work = (rings, begin, length, share, out, scale)
    loading = (q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (first, work, HEADS, REST, STAGES)),
            (_attend, (second, work, HEADS, REST, STAGES)),
            (_load_tiles, (loading, rings, begin, length, share, REST, STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


@gluon.jit
def _share(length, HEADS: gl.constexpr, KEYS: gl.constexpr):
    """Return this program's first pair of a tile of rows and one of keys, the end of its pairs, the number of all
    pairs, and those of tiles of rows of a head and of tiles of keys."""
    down = gl.cdiv(length, 128)
    along = gl.cdiv(length, KEYS)
    total = down * along * HEADS
    first, end = share_of_program(total)
    return first, end, total, down, along


@gluon.jit
def _num_parts(share):
    """The number of tiles of rows that a share touches."""
    first, end, along = share[0], share[1], share[4]
    return gl.where(end > first, (end - 1) // along - first // along + 1, 0)


@gluon.jit
def _load_tiles(
    descs, rings, begin, length, share, REST: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Load the tiles of a share into the buffers; run by one warp."""
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc = descs
    q_ring, k_ring, v_ring = rings
    queries, queries_rest, queries_ready, queries_free = q_ring
    MAIN: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    pair, end, down, along = share[0], share[1], share[3], share[4]
    step = 0
    for part in range(_num_parts(share)):
        tile = pair // along
        first = pair % along
        count = gl.minimum(along - first, end - pair)
        column = tile // down * (MAIN + REST)
        row = begin + tile % down * 128
        mbarrier.wait(queries_free.index(0), (part & 1) ^ 1)
        mbarrier.expect(queries_ready.index(0), 128 * (MAIN + REST) * 2)
        for group in gl.static_range(2):
            tma_load(q_desc, [row + group * 64, column], queries_ready.index(0), queries.index(group))
            if REST > 0:
                tma_load(
                    q_rest_desc, [row + group * 64, column + MAIN], queries_ready.index(0),
                    queries_rest.index(group),
                )  # fmt: skip
        for index in range(count):
            key = begin + (first + count - 1 - index) * KEYS
            _load_tile(k_desc, k_rest_desc, k_ring, step, key, column, REST, STAGES)
            _load_tile(v_desc, v_rest_desc, v_ring, step, key, column, REST, STAGES)
            step += 1
        pair += count


@gluon.jit
def _load_tile(desc, rest_desc, ring, step, row, column, REST: gl.constexpr, STAGES: gl.constexpr):
    """Load a tile of keys or values once its buffer is free."""
    tiles, tiles_rest, ready, free = ring
    MAIN: gl.constexpr = tiles.shape[2]
    stage = step % STAGES
    # Before its first phase a barrier counts as having completed the phase before.
    mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
    mbarrier.expect(ready.index(stage), tiles.shape[1] * (MAIN + REST) * 2)
    tma_load(desc, [row, column], ready.index(stage), tiles.index(stage))
    if REST > 0:
        tma_load(rest_desc, [row, column + MAIN], ready.index(stage), tiles_rest.index(stage))


@gluon.jit
def _attend(
    group: gl.constexpr, work, HEADS: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Compute 64 rows of each tile of a share; run by one compute group (four warps)."""
    rings, begin, length, share, out, scale = work
    q_ring, k_ring, v_ring = rings
    queries, queries_rest, queries_ready, queries_free = q_ring
    keys_free = k_ring[3]
    values, values_rest, values_ready, values_free = v_ring
    MAIN: gl.constexpr = queries.shape[2]
    RIGHT: gl.constexpr = REST if REST > 0 else 16
    KEYS: gl.constexpr = values.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RIGHT, 16])
    zero = gl.zeros([64, KEYS], gl.float32, layout)
    q = queries.index(group)
    q_rest = queries_rest.index(group)
    pair, end, total, down, along = share
    step = 0
    for part in range(_num_parts(share)):
        tile = pair // along
        first = pair % along
        count = gl.minimum(along - first, end - pair)
        acc = gl.zeros([64, MAIN], gl.float32, acc_layout)
        acc_rest = gl.zeros([64, RIGHT], gl.float32, rest_layout)
        row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
        mbarrier.wait(queries_ready.index(0), part & 1)
        # The last tile of keys comes first. It alone may end beyond the image.
        scores = _scores(q, q_rest, k_ring, step, zero, REST, STAGES)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(keys_free.index(step % STAGES), count=1)
        left = length - (first + count - 1) * KEYS
        key = gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        scores = gl.where((key < left)[None, :], scores, float("-inf"))
        probs, row_max, row_sum, decay = _softmax(scores, row_max, row_sum, scale, values.dtype, acc_layout)
        if left < KEYS:
            mbarrier.wait(values_ready.index(step % STAGES), step // STAGES & 1)
            clear_tail(values.index(step % STAGES), left)
            if REST > 0:
                clear_tail(values_rest.index(step % STAGES), left)
        for index in range(1, count):
            now = step + index
            scores = _scores(q, q_rest, k_ring, now, zero, REST, STAGES)
            acc, acc_rest = _add_values(probs, acc, acc_rest, v_ring, now - 1, REST, STAGES)
            scores = warpgroup_mma_wait(2 if REST > 0 else 1, deps=[scores])
            mbarrier.arrive(keys_free.index(now % STAGES), count=1)
            next_probs, row_max, row_sum, decay = _softmax(
                scores, row_max, row_sum, scale, values.dtype, acc_layout
            )
            acc, acc_rest, probs = warpgroup_mma_wait(0, deps=[acc, acc_rest, probs])
            mbarrier.arrive(values_free.index((now - 1) % STAGES), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
            if REST > 0:
                acc_rest = acc_rest * gl.convert_layout(decay, gl.SliceLayout(1, rest_layout))[:, None]
            probs = next_probs
        mbarrier.arrive(queries_free.index(0), count=1)
        last = step + count - 1
        acc, acc_rest = _add_values(probs, acc, acc_rest, v_ring, last, REST, STAGES)
        acc, acc_rest, probs = warpgroup_mma_wait(0, deps=[acc, acc_rest, probs])
        mbarrier.arrive(values_free.index(last % STAGES), count=1)
        step += count
        pair += count
        place = (begin, length, tile // down, tile % down * 128 + group * 64)
        if count == along:
            _store(acc, acc_rest, row_sum, out[0], place, HEADS, REST)
        else:
            _merge(group, acc, acc_rest, row_max, row_sum, out, place, tile, first, total, along, HEADS, REST)


@gluon.jit
def _scores(q, q_rest, ring, step, zero, REST: gl.constexpr, STAGES: gl.constexpr):
    """Start to multiply queries by a tile of keys."""
    keys, keys_rest, ready = ring[0], ring[1], ring[2]
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    scores = warpgroup_mma(q, keys.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    if REST > 0:
        scores = warpgroup_mma(q_rest, keys_rest.index(stage).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def _add_values(probs, acc, acc_rest, ring, step, REST: gl.constexpr, STAGES: gl.constexpr):
    """Start to add a tile of values."""
    values, values_rest, ready = ring[0], ring[1], ring[2]
    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    acc = warpgroup_mma(probs, values.index(stage), acc, is_async=True)
    if REST > 0:
        rest_layout: gl.constexpr = gl.DotOperandLayout(0, acc_rest.type.layout, 2)
        acc_rest = warpgroup_mma(
            gl.convert_layout(probs, rest_layout), values_rest.index(stage), acc_rest, is_async=True
        )
    return acc, acc_rest


@gluon.jit
def _softmax(scores, row_max, row_sum, scale, dtype: gl.constexpr, acc_layout: gl.constexpr):
    """Add a tile of scores to the online softmax.

    Returns:
        The tile's weights as an operand of the product with values, the new maximum and sum, and the factor by
        which earlier sums shrink.
    """
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale)
    probs = gl.exp2(scores * scale - new_max[:, None])
    decay = gl.exp2(row_max - new_max)
    row_sum = row_sum * decay + gl.sum(probs, axis=1)
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    return gl.convert_layout(probs.to(dtype), operand), new_max, row_sum, decay


@gluon.jit
def _store(acc, acc_rest, row_sum, out_ptr, place, HEADS: gl.constexpr, REST: gl.constexpr):
    """Divide the sums of 64 rows by those of their weights, and store them."""
    begin, length, head, first_row = place
    DIM: gl.constexpr = acc.shape[1] + REST
    _store_part(acc, row_sum, out_ptr, begin, length, first_row, head * DIM, HEADS * DIM)
    if REST > 0:
        _store_part(
            acc_rest, row_sum, out_ptr, begin, length, first_row, head * DIM + acc.shape[1], HEADS * DIM
        )


@gluon.jit
def _store_part(acc, row_sum, out_ptr, begin, length, first_row, first_column, WIDTH: gl.constexpr):
    layout: gl.constexpr = acc.type.layout
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = first_column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    result = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, layout))[:, None]
    offset = (begin + row).to(gl.int64) * WIDTH
    gl.store(
        out_ptr + offset[:, None] + column[None, :], result.to(out_ptr.dtype.element_ty),
        mask=(row < length)[:, None],
    )  # fmt: skip


@gluon.jit
def _merge(
    group: gl.constexpr, acc, acc_rest, row_max, row_sum, out, place, tile, first, total, along,
    HEADS: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Write what this program has of 64 rows; if it is the last of them, merge all parts and store the result."""
    out_ptr, parts_ptr, stats_ptr, counters_ptr = out
    MAIN: gl.constexpr = acc.shape[1]
    first_program = program_of(tile * along, total)
    last_program = program_of((tile + 1) * along - 1, total)
    own = part_of(gl.program_id(0), first == 0, group)
    write_stats(stats_ptr, own, row_max, row_sum)
    gl.store(part_pointers(parts_ptr, own, acc, 0, MAIN + REST), acc)
    if REST > 0:
        gl.store(part_pointers(parts_ptr, own, acc_rest, MAIN, MAIN + REST), acc_rest)
    if finishes_tile(counters_ptr + first_program * 2 + group, last_program - first_program + 1):
        all_acc = gl.zeros_like(acc)
        all_rest = gl.zeros_like(acc_rest)
        all_max = gl.full([64], float("-inf"), gl.float32, row_max.type.layout)
        all_sum = gl.zeros_like(all_max)
        for program in range(first_program, last_program + 1):
            part = part_of(program, program == first_program, group)
            all_max, all_sum, kept, added = merge_stats(stats_ptr, part, all_max, all_sum)
            all_acc = merge_rows(all_acc, kept, parts_ptr, part, added, 0, MAIN + REST)
            if REST > 0:
                all_rest = merge_rows(all_rest, kept, parts_ptr, part, added, MAIN, MAIN + REST)
        _store(all_acc, all_rest, all_sum, out_ptr, place, HEADS, REST)
