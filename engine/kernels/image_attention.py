"""Full attention within images, for Hopper GPUs.

The general kernel in :mod:`engine.kernels.vision_attention` gives each tile of rows to a program. Here each SM has one
program, which takes one tile after the other, and loads the next while it finishes one. The tiles of one image rarely
fill a whole number of rounds: 2304 patches with 16 heads are 288 tiles of 128 rows for 132 SMs. There are two ways out,
among which :mod:`engine.kernels.image_plan` chooses. Tiles of 192 rows may need fewer rounds. Or all programs get an
equal share of the pairs of a tile of rows and a tile of keys, one after the other; shares may begin and end within a
tile of rows. The program that ends the last share of a tile of rows merges them, in the order of their keys: results
don't depend on which program comes last.

Warps are specialised as in :mod:`engine.kernels.prefill_attention`: one warp loads tiles through tensor memory
descriptors (TMA), two or three groups of four warps with 64 rows each share the loaded keys and values. The groups
start their products in turns, so that one computes a softmax while another uses the tensor cores.

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
from engine.kernels.image_plan import KEYS, ImagePlan
from engine.kernels.launch import launch
from engine.kernels.paged import LOG2E
from engine.kernels.pdl import wait_for_previous
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

#: Tiles of keys in shared memory at a time; by compute groups, where their values share their barriers.
_STAGES, _TOGETHER_STAGES = 2, {2: 4, 3: 6}
#: Registers per thread, by compute groups: at the launch all groups, with the load warp's, use all registers of an SM.
#: The compute groups take what the load warp gives up.
_REGISTERS = {2: (168, 240), 3: (128, 160)}
_LOAD_REGISTERS = 24
_wait_for_previous = gluon.jit(wait_for_previous.fn)
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


def image_attention_gluon(q, k, v, cu_seqlens, *, scale, plan: ImagePlan, counters=None):
    """See :func:`engine.kernels.dispatch.vision_attention`; for what :func:`supports` admits.

    Args:
        plan: one that :func:`engine.kernels.image_plan.choose_plan` may choose.
        counters: see :func:`engine.kernels.shares.part_counters`; for equal shares.
    """
    assert not plan.shares or (len(cu_seqlens) == 2 and counters is not None)
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    programs = num_sms(q.device)
    parts = part_memory(dim, q.device) if plan.shares else out
    stats = part_memory(2, q.device) if plan.shares else out
    main = 64 if dim == 80 else dim
    rest = dim - main
    keys = KEYS[plan.groups]
    # Equal shares are as fast without; heads of 128 have neither the registers nor the shared memory for it.
    together = dim < 128 and not plan.shares
    registers, compute_registers = _REGISTERS[plan.groups]
    descriptors = [_describe(x, box, width) for x, box in ((q, 64), (k, keys), (v, keys))
                   for width in (main, rest or main)]  # fmt: skip
    launch(
        _image_kernel, (programs,),
        q_desc=descriptors[0], q_rest_desc=descriptors[1], k_desc=descriptors[2], k_rest_desc=descriptors[3],
        v_desc=descriptors[4], v_rest_desc=descriptors[5], bounds_ptr=cu_seqlens, out_ptr=out,
        parts_ptr=parts, stats_ptr=stats, counters_ptr=counters if plan.shares else cu_seqlens,
        segments=len(cu_seqlens) - 1, scale=scale * LOG2E, HEADS=heads, MAIN=main, REST=rest, KEYS=keys,
        GROUPS=plan.groups, STAGES=_TOGETHER_STAGES[plan.groups] if together else _STAGES, TOGETHER=together,
        SHARES=plan.shares, PDL=True, COMPUTE_REGISTERS=compute_registers, LOAD_REGISTERS=_LOAD_REGISTERS,
        num_warps=4, maxnreg=registers, launch_pdl=True,
    )  # fmt: skip
    return out


def _describe(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], _DTYPES[x.dtype])
    return TensorDescriptor.from_tensor(x.flatten(1), [rows, width], layout)


# ``scale`` and bounds differ between models only, ``segments`` between batches.
@gluon.jit(do_not_specialize=["segments"])
def _image_kernel(
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc, bounds_ptr, out_ptr, parts_ptr, stats_ptr,
    counters_ptr, segments, scale, HEADS: gl.constexpr, MAIN: gl.constexpr, REST: gl.constexpr, KEYS: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, SHARES: gl.constexpr, PDL: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per SM.

    Args:
        MAIN, REST: two powers of two, or 0 as the second, whose sum is the head's size.
        TOGETHER: a tile of keys and that of their values share their barriers, and queries are copied to registers.
    """
    dtype: gl.constexpr = q_desc.dtype
    # Without a second part its buffers are those of the first, and nothing reads them.
    queries = buffers(GROUPS, 64, MAIN, dtype)
    keys = buffers(STAGES, KEYS, MAIN, dtype)
    values = buffers(STAGES, KEYS, MAIN, dtype)
    queries_rest = queries
    keys_rest = keys
    values_rest = values
    if REST > 0:
        queries_rest = buffers(GROUPS, 64, REST, dtype)
        keys_rest = buffers(STAGES, KEYS, REST, dtype)
        values_rest = buffers(STAGES, KEYS, REST, dtype)
    # Ready: the tile has been loaded. Free: all compute groups have finished with it.
    queries_ready, queries_free = barriers(1, 1), barriers(1, GROUPS)
    keys_ready, keys_free = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    if TOGETHER:
        values_ready, values_free = keys_ready, keys_free
    else:
        values_ready, values_free = barriers(STAGES, 1), barriers(STAGES, GROUPS)
    turns = barriers(GROUPS, 1)
    q_ring = (queries, queries_rest, queries_ready, queries_free)
    k_ring = (keys, keys_rest, keys_ready, keys_free)
    v_ring = (values, values_rest, values_ready, values_free)
    rings = (q_ring, k_ring, v_ring)
    _wait_for_previous(PDL)
    plan = _plan(bounds_ptr, segments, HEADS, KEYS, GROUPS, SHARES)
    out = (out_ptr, parts_ptr, stats_ptr, counters_ptr)
    work = (rings, bounds_ptr, plan, out, scale, turns)
    loading = (q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (first, work, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES)),
                (_attend, (second, work, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES)),
                (
                    _load_tiles,
                    (loading, rings, bounds_ptr, plan, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES),
                ),
            ],
            [4, 1],
            [COMPUTE_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_attend, (first, work, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES)),
                (_attend, (second, work, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES)),
                (_attend, (third, work, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES)),
                (
                    _load_tiles,
                    (loading, rings, bounds_ptr, plan, HEADS, REST, GROUPS, STAGES, TOGETHER, SHARES),
                ),
            ],
            [4, 4, 1],
            [COMPUTE_REGISTERS, COMPUTE_REGISTERS, LOAD_REGISTERS],
        )


@gluon.jit
def _plan(
    bounds_ptr, segments, HEADS: gl.constexpr, KEYS: gl.constexpr, GROUPS: gl.constexpr, SHARES: gl.constexpr
):  # fmt: skip
    """Plan the parts of this program.

    Returns:
        The number of its parts; with shares also the first pair of a tile of rows and one of keys of its share, the end
        of its pairs, and the number of all pairs.
    """
    first = 0
    end = 0
    total = 0
    if SHARES:
        length = gl.load(bounds_ptr + 1) - gl.load(bounds_ptr)
        along = gl.cdiv(length, KEYS)
        total = gl.cdiv(length, GROUPS * 64) * along * HEADS
        first, end = share_of_program(total)
        parts = gl.where(end > first, (end - 1) // along - first // along + 1, 0)
    else:
        for segment in range(segments):
            length = gl.load(bounds_ptr + segment + 1) - gl.load(bounds_ptr + segment)
            total += gl.cdiv(length, GROUPS * 64) * HEADS
        parts = gl.cdiv(gl.maximum(total - gl.program_id(0), 0), gl.num_programs(0))
    return parts, first, end, total


@gluon.jit
def _start(bounds_ptr, plan):
    """Return where :func:`_next_part` begins: a pair, a segment, the tiles of rows of those before it, where it
    begins, and its length."""
    begin = gl.load(bounds_ptr)
    return plan[1], begin * 0, begin * 0, begin, gl.load(bounds_ptr + 1) - begin


@gluon.jit
def _next_part(
    at, part, bounds_ptr, plan, HEADS: gl.constexpr, KEYS: gl.constexpr, GROUPS: gl.constexpr, SHARES: gl.constexpr
):  # fmt: skip
    """Return a part, and where the next one begins.

    A part is its place (where its segment begins, that one's length, the head, the first row), its tile of rows, its
    first tile of keys, the number of its tiles of keys, and that of all tiles of keys of the segment.
    """
    pair, segment, before, begin, length = at
    along = gl.cdiv(length, KEYS)
    if SHARES:
        tile = pair // along
        first = pair % along
        count = gl.minimum(along - first, plan[2] - pair)
        pair += count
    else:
        tile = gl.program_id(0) + part * gl.num_programs(0)
        while tile >= before + gl.cdiv(length, GROUPS * 64) * HEADS:
            before += gl.cdiv(length, GROUPS * 64) * HEADS
            segment += 1
            begin += length
            length = gl.load(bounds_ptr + segment + 1) - begin
        along = gl.cdiv(length, KEYS)
        first = along * 0
        count = along
    down = gl.cdiv(length, GROUPS * 64)
    place = (begin, length, (tile - before) // down, (tile - before) % down * (GROUPS * 64))
    return (place, tile, first, count, along), (pair, segment, before, begin, length)


@gluon.jit
def _load_tiles(
    descs, rings, bounds_ptr, plan, HEADS: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr,
    STAGES: gl.constexpr, TOGETHER: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of all parts into the buffers; run by one warp."""
    q_desc, q_rest_desc, k_desc, k_rest_desc, v_desc, v_rest_desc = descs
    q_ring, k_ring, v_ring = rings
    queries, queries_rest, queries_ready, queries_free = q_ring
    MAIN: gl.constexpr = queries.shape[2]
    KEYS: gl.constexpr = k_ring[0].shape[1]
    step = 0
    at = _start(bounds_ptr, plan)
    for part in range(plan[0]):
        current, at = _next_part(at, part, bounds_ptr, plan, HEADS, KEYS, GROUPS, SHARES)
        place, _, first, count, _ = current
        begin, _, head, first_row = place
        column = head * (MAIN + REST)
        mbarrier.wait(queries_free.index(0), (part & 1) ^ 1)
        mbarrier.expect(queries_ready.index(0), GROUPS * 64 * (MAIN + REST) * 2)
        for group in gl.static_range(GROUPS):
            row = begin + first_row + group * 64
            tma_load(q_desc, [row, column], queries_ready.index(0), queries.index(group))
            if REST > 0:
                tma_load(q_rest_desc, [row, column + MAIN], queries_ready.index(0), queries_rest.index(group))
        for index in range(count):
            key = begin + (first + count - 1 - index) * KEYS
            _load_tile(k_desc, k_rest_desc, k_ring, step, key, column, REST, STAGES, 2 if TOGETHER else 1)
            _load_tile(v_desc, v_rest_desc, v_ring, step, key, column, REST, STAGES, 0 if TOGETHER else 1)
            step += 1


@gluon.jit
def _load_tile(
    desc, rest_desc, ring, step, row, column, REST: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr
):  # fmt: skip
    """Load a tile of keys or values once its buffer is free.

    Args:
        TILES: that the buffer's barrier waits for; 0 for one that an earlier call has counted.
    """
    tiles, tiles_rest, ready, free = ring
    MAIN: gl.constexpr = tiles.shape[2]
    stage = step % STAGES
    if TILES > 0:
        # Before its first phase a barrier counts as having completed the phase before.
        mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), TILES * tiles.shape[1] * (MAIN + REST) * 2)
    tma_load(desc, [row, column], ready.index(stage), tiles.index(stage))
    if REST > 0:
        tma_load(rest_desc, [row, column + MAIN], ready.index(stage), tiles_rest.index(stage))


@gluon.jit
def _attend(
    group: gl.constexpr, work, HEADS: gl.constexpr, REST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    TOGETHER: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of each part; run by one compute group (four warps)."""
    rings, bounds_ptr, plan, out, scale, turns = work
    KEYS: gl.constexpr = rings[1][0].shape[1]
    step = 0
    at = _start(bounds_ptr, plan)
    for part in range(plan[0]):
        current, at = _next_part(at, part, bounds_ptr, plan, HEADS, KEYS, GROUPS, SHARES)
        place, count = current[0], current[3]
        if place[3] + group * 64 < place[1]:
            _attend_part(
                group, rings, out, scale, turns, plan[3], part, step, current, HEADS, REST, GROUPS, STAGES, TOGETHER,
                SHARES,
            )  # fmt: skip
        else:
            _skip_part(group, rings, turns, part, step, count, GROUPS, STAGES, TOGETHER)
        step += count


@gluon.jit
def _skip_part(
    group: gl.constexpr, rings, turns, part, step, count, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    TOGETHER: gl.constexpr,
):  # fmt: skip
    """Pass over a part whose rows are all beyond the end of the image."""
    q_ring, k_ring, v_ring = rings
    mbarrier.wait(q_ring[2].index(0), part & 1)
    mbarrier.arrive(q_ring[3].index(0), count=1)
    for now in range(step, step + count):
        _take_turn(group, turns, now)
        _pass_turn(group, turns, GROUPS)
        if not TOGETHER:
            mbarrier.wait(k_ring[2].index(now % STAGES), now // STAGES & 1)
            mbarrier.arrive(k_ring[3].index(now % STAGES), count=1)
        mbarrier.wait(v_ring[2].index(now % STAGES), now // STAGES & 1)
        mbarrier.arrive(v_ring[3].index(now % STAGES), count=1)


@gluon.jit
def _take_turn(group: gl.constexpr, turns, step):
    """Wait until the group before has started its products of this step; the first, until the last has started those
    of the step before."""
    mbarrier.wait(turns.index(group), (step & 1) ^ (1 if group == 0 else 0))


@gluon.jit
def _pass_turn(group: gl.constexpr, turns, GROUPS: gl.constexpr):
    mbarrier.arrive(turns.index((group + 1) % GROUPS), count=1)


@gluon.jit
def _copy_queries(ring, group: gl.constexpr, layout: gl.constexpr, REST: gl.constexpr):
    """Copy a group's queries to registers, as operands, and let their buffers go.

    So those of the next part are there when it begins, and products read less shared memory.
    """
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    q = ring[0].index(group).load(operand)
    q_rest = q
    if REST > 0:
        q_rest = ring[1].index(group).load(operand)
    mbarrier.arrive(ring[3].index(0), count=1)
    return q, q_rest


@gluon.jit
def _attend_part(
    group: gl.constexpr, rings, out, scale, turns, total, part, step, current, HEADS: gl.constexpr, REST: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """Compute 64 rows of a part."""
    place, tile, first, count, along = current
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
    acc = gl.zeros([64, MAIN], gl.float32, acc_layout)
    acc_rest = gl.zeros([64, RIGHT], gl.float32, rest_layout)
    row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    sums = gl.zeros([64, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
    mbarrier.wait(queries_ready.index(0), part & 1)
    if TOGETHER:
        q, q_rest = _copy_queries(q_ring, group, layout, REST)
    else:
        q = queries.index(group)
        q_rest = queries_rest.index(group)
    _take_turn(group, turns, step)
    # The last tile of keys comes first. It alone may end beyond the image.
    scores = _scores(q, q_rest, k_ring, step, zero, REST, STAGES)
    _pass_turn(group, turns, GROUPS)
    scores = warpgroup_mma_wait(0, deps=[scores])
    if not TOGETHER:
        mbarrier.arrive(keys_free.index(step % STAGES), count=1)
    left = place[1] - (first + count - 1) * KEYS
    key = gl.arange(0, KEYS, gl.SliceLayout(0, layout))
    scores = gl.where((key < left)[None, :], scores, float("-inf"))
    probs, row_max, sums, decay = _softmax(scores, row_max, sums, scale, values.dtype, acc_layout)
    if left < KEYS:
        mbarrier.wait(values_ready.index(step % STAGES), step // STAGES & 1)
        clear_tail(values.index(step % STAGES), left)
        if REST > 0:
            clear_tail(values_rest.index(step % STAGES), left)
    for now in range(step + 1, step + count):
        _take_turn(group, turns, now)
        scores = _scores(q, q_rest, k_ring, now, zero, REST, STAGES)
        acc, acc_rest = _add_values(probs, acc, acc_rest, v_ring, now - 1, REST, STAGES, TOGETHER)
        _pass_turn(group, turns, GROUPS)
        scores = warpgroup_mma_wait(2 if REST > 0 else 1, deps=[scores])
        if not TOGETHER:
            mbarrier.arrive(keys_free.index(now % STAGES), count=1)
        next_probs, row_max, sums, decay = _softmax(scores, row_max, sums, scale, values.dtype, acc_layout)
        # ptxas moves the next wait before the softmax, but not across the branch of this one, which waits no longer.
        mbarrier.wait(values_ready.index((now - 1) % STAGES), (now - 1) // STAGES & 1)
        acc, acc_rest, probs = warpgroup_mma_wait(0, deps=[acc, acc_rest, probs])
        mbarrier.arrive(values_free.index((now - 1) % STAGES), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
        if REST > 0:
            acc_rest = acc_rest * gl.convert_layout(decay, gl.SliceLayout(1, rest_layout))[:, None]
        probs = next_probs
    if not TOGETHER:
        mbarrier.arrive(queries_free.index(0), count=1)
    last = step + count - 1
    acc, acc_rest = _add_values(probs, acc, acc_rest, v_ring, last, REST, STAGES, TOGETHER)
    acc, acc_rest, probs = warpgroup_mma_wait(0, deps=[acc, acc_rest, probs])
    mbarrier.arrive(values_free.index(last % STAGES), count=1)
    row_sum = gl.convert_layout(gl.sum(sums, axis=1), gl.SliceLayout(1, layout))
    here = (place[0], place[1], place[2], place[3] + group * 64)
    if SHARES:
        if count == along:
            _store(acc, acc_rest, row_sum, out[0], here, HEADS, REST)
        else:
            _merge(group, acc, acc_rest, row_max, row_sum, out, here, tile, first, total, along, HEADS, REST)
    else:
        _store(acc, acc_rest, row_sum, out[0], here, HEADS, REST)


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
def _add_values(
    probs, acc, acc_rest, ring, step, REST: gl.constexpr, STAGES: gl.constexpr, TOGETHER: gl.constexpr
):  # fmt: skip
    """Start to add a tile of values; with TOGETHER they came with their keys."""
    values, values_rest, ready = ring[0], ring[1], ring[2]
    stage = step % STAGES
    if not TOGETHER:
        mbarrier.wait(ready.index(stage), step // STAGES & 1)
    acc = warpgroup_mma(probs, values.index(stage), acc, is_async=True)
    if REST > 0:
        rest_layout: gl.constexpr = gl.DotOperandLayout(0, acc_rest.type.layout, 2)
        acc_rest = warpgroup_mma(
            gl.convert_layout(probs, rest_layout), values_rest.index(stage), acc_rest, is_async=True
        )
    return acc, acc_rest


@gluon.jit
def _softmax(scores, row_max, sums, scale, dtype: gl.constexpr, acc_layout: gl.constexpr):
    """Add a tile of scores to the online softmax.

    A thread has two columns of every eight, and adds up its own weights of a row: ``sums`` ``(64, 8)``. So there are
    more chains of dependent instructions, shorter ones than reductions of whole rows have.

    Returns:
        The tile's weights as an operand of the product with values, the new maxima and sums, and the factors by which
        earlier sums of values shrink.
    """
    KEYS: gl.constexpr = scores.shape[1]
    best = gl.max(gl.max(scores.reshape([64, KEYS // 8, 8]), axis=1), axis=1)
    new_max = gl.maximum(row_max, gl.convert_layout(best, row_max.type.layout) * scale)
    probs = gl.exp2(scores * scale - new_max[:, None])
    decay = gl.exp2(row_max - new_max)
    more = gl.convert_layout(gl.sum(probs.reshape([64, KEYS // 8, 8]), axis=1), sums.type.layout)
    sums = sums * gl.convert_layout(decay, gl.SliceLayout(1, sums.type.layout))[:, None] + more
    operand: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    return gl.convert_layout(probs.to(dtype), operand), new_max, sums, decay


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
