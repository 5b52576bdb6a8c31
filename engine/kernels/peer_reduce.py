"""All-reduce and all-gather over peer memory: every rank writes into buffers of the others, which are GPUs of one host.

A collective of a few kilobytes is all latency. Here it is one launch and one trip over the link: a program
writes its share of the input into the buffer of every rank (its own too), waits until the shares of all ranks
are in its own buffer, and adds them up. Larger inputs take two trips, so that less is sent: each rank adds up
one part of every program's share, and writes the sum to all ranks. An all-gather is the first trip alone.

There are no flags and no fences. A place of a buffer that holds nothing holds negative zero; a number that is
sent as negative zero is sent as zero. Each number says by itself that it has arrived, however the hardware
splits or orders the writes. Who has read a place empties it again.

A place may be written again only when its reader has emptied it. Each program has a region of its own in the
buffers, with two halves that it uses in turn. Before a rank writes into a half for the second time, it has
seen numbers of the launch in between from every rank, and each of these launches began after the one before
it on its rank had ended, which emptied the half. The half in turn is kept on the device, so captured graphs
can be replayed.

All ranks add the same numbers in the same order with the same kernel: their sums are the same, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from engine.kernels.launch import launch
from engine.kernels.pdl import pdl_options, wait_for_previous

#: Most programs of a launch; each has a region of the buffers.
PROGRAMS = 128
#: Bytes of half a region.
HALF_BYTES = 128 << 10
#: Bytes of a rank's buffer.
BUFFER_BYTES = PROGRAMS * 2 * HALF_BYTES
#: Largest input, in bytes: larger ones are bound by the rate of the links.
MAX_BYTES = 7 << 20
#: The word of 16 bits in a place that holds nothing: negative zero.
EMPTY = -0x8000
#: Most numbers of :func:`sum_sent`.
MAX_SENT = 1 << 16
#: Up to so many bytes sent by a rank one trip is faster than two.
_ONE_TRIP_BYTES = 1 << 20
#: From so many bytes on, programs of more warps are faster.
_MANY_BYTES = 3 << 20
#: Numbers that a thread reads at once are in this many bytes.
_VECTOR = 16
#: Looks at a place that is still empty, some 10 ms, between two looks at the flag that ends the wait. It is in the
#: host's memory, and the looks of all warps take half a millisecond; the other ranks wait meanwhile.
_LOOKS = tl.constexpr(1 << 14)
_PROGRAMS = tl.constexpr(PROGRAMS)
_EMPTY = tl.constexpr(EMPTY)


@dataclass(frozen=True, slots=True)
class PeerBuffers:
    """What a rank needs to reach the buffers of all ranks.

    Attributes:
        addresses: of each rank's buffer of :data:`BUFFER_BYTES` in this rank's address space, multiples of
            16; first that of the next rank, last this rank's own. Buffers hold :data:`EMPTY` words at first.
        halves: int32 ``(PROGRAMS + 1,)`` on the device, zeros at first: the half in turn of each program, and
            whether a kernel has seen the end of waits.
        ended: int32 ``(1,)`` in the host's memory, readable from the device; 1 ends all waits, whose results are
            wrong then.
    """

    rank: int
    size: int
    addresses: tuple[int, ...]
    halves: torch.Tensor
    ended: torch.Tensor


def supports(x: torch.Tensor) -> bool:
    """Return whether :func:`peer_all_reduce` takes ``x``."""
    vector = _VECTOR // x.element_size()
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous()
        and 0 < x.nbytes <= MAX_BYTES
        and x.numel() % vector == 0
        and x.data_ptr() % _VECTOR == 0
    )


@dataclass(frozen=True, slots=True)
class ReduceTile:
    """How an all-reduce is split.

    Attributes:
        trips: over the links: 1 or 2.
        numbers: that a program handles at a time.
        warps: of a program.
        programs: how many.
        tiles: of a program; with two trips, of each rank's part of its share.
    """

    trips: int
    numbers: int
    warps: int
    programs: int
    tiles: int


def choose_tile(numel: int, itemsize: int, size: int, trips: int | None = None) -> ReduceTile:
    """Choose the split of an all-reduce of ``numel`` numbers over ``size`` ranks.

    Of 16 splits of each size it is the best or within 5 % of it on two H200, from 7 KiB to 7 MiB.
    """
    nbytes = numel * itemsize
    if trips is None:
        trips = 1 if nbytes * (size - 1) <= _ONE_TRIP_BYTES else 2
    if trips == 1:
        return _split(numel, 1, *((512, 2) if numel <= 512 * PROGRAMS else (1024, 4)))
    if nbytes > _MANY_BYTES:
        tile = _split(numel, size, 2048, 8)
        if 2 * size * tile.numbers * tile.tiles * itemsize <= HALF_BYTES:
            return tile
    return _split(numel, size, 1024, 4)


def _split(numel: int, parts: int, numbers: int, warps: int) -> ReduceTile:
    """Split numbers among programs of tiles of ``numbers``, with as many parts in a share."""
    tiles = triton.cdiv(numel, numbers * parts * PROGRAMS)
    programs = triton.cdiv(numel, numbers * parts * tiles)
    return ReduceTile(1 if parts == 1 else 2, numbers, warps, programs, tiles)


def peer_all_reduce(x: torch.Tensor, peers: PeerBuffers, tile: ReduceTile | None = None) -> None:
    """Overwrite ``x`` with its sum over all ranks, which make this call with equally shaped tensors.

    Numbers are added in float32 and the sum is rounded once (with two trips once more, to the same number).

    Args:
        x: see :func:`supports`.
        tile: the same on all ranks; None chooses it.
    """
    numel, itemsize = x.numel(), x.element_size()
    tile = tile or choose_tile(numel, itemsize, peers.size)
    half = HALF_BYTES // itemsize
    share = tile.numbers * tile.tiles
    assert tile.programs <= PROGRAMS
    assert numel <= tile.programs * share * (1 if tile.trips == 1 else peers.size)
    assert (share * peers.size if tile.trips == 1 else 2 * share * peers.size) <= half
    if tile.trips == 1:
        _launch(_one_trip_kernel, x, peers, tile, SENT=False)
    else:
        _launch(_two_trips_kernel, x, peers, tile)


def _launch(kernel: Any, x: torch.Tensor, peers: PeerBuffers, tile: ReduceTile, **constants: bool) -> None:
    vector = _VECTOR // x.element_size()
    launch(
        kernel, (tile.programs,),
        x_ptr=x, addresses=peers.addresses, halves_ptr=peers.halves, ended_ptr=peers.ended,
        vectors=x.numel() // vector, tiles=tile.tiles, rank=peers.rank,
        HALF=HALF_BYTES // x.element_size(), SIZE=peers.size, RANKS=triton.next_power_of_2(peers.size),
        TILE=tile.numbers, VECTOR=vector, **constants, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip


def send_arguments(x: torch.Tensor, tile: ReduceTile, peers: PeerBuffers) -> dict[str, Any]:
    """Arguments of a kernel that calls :func:`send` with numbers of the dtype of ``x``."""
    return {
        "addresses": peers.addresses,
        "halves_ptr": peers.halves,
        "share": tile.numbers * tile.tiles,
        "rank": peers.rank,
        "HALF": HALF_BYTES // x.element_size(),
        "SIZE": peers.size,
    }


def sum_sent(out: torch.Tensor, peers: PeerBuffers, tile: ReduceTile) -> None:
    """Write to ``out`` the sums of numbers that the kernels before this one send, on all ranks.

    Args:
        tile: that of :func:`send_arguments`, with one trip.
    """
    assert tile.trips == 1 and out.numel() <= tile.programs * tile.numbers * tile.tiles
    _launch(_one_trip_kernel, out, peers, tile, SENT=True)


def supports_gather(x: torch.Tensor, size: int) -> bool:
    """Return whether :func:`peer_all_gather` takes the matrix ``x`` of each of ``size`` ranks."""
    vector = _VECTOR // x.element_size()
    most = MAX_BYTES // size
    return x.dim() == 2 and supports(x) and x.nbytes <= most and x.shape[1] % vector == 0


def peer_all_gather(x: torch.Tensor, peers: PeerBuffers) -> torch.Tensor:
    """Concatenate equally shaped matrices of all ranks along the last dimension, in the order of ranks.

    Args:
        x: ``(N, C)``; see :func:`supports_gather`.

    Returns:
        ``(N, size * C)``; negative zeros of ``x`` are zeros there.
    """
    rows, columns = x.shape
    out = torch.empty((rows, peers.size * columns), dtype=x.dtype, device=x.device)
    tile = choose_tile(x.numel(), x.element_size(), peers.size, trips=1)
    half, vector = HALF_BYTES // x.element_size(), _VECTOR // x.element_size()
    assert tile.numbers * tile.tiles * peers.size <= half
    launch(
        _gather_ranks_kernel, (tile.programs,),
        x_ptr=x, out_ptr=out, addresses=peers.addresses, halves_ptr=peers.halves, ended_ptr=peers.ended,
        vectors=x.numel() // vector, column_vectors=columns // vector, tiles=tile.tiles, rank=peers.rank,
        HALF=half, SIZE=peers.size, RANKS=triton.next_power_of_2(peers.size), TILE=tile.numbers,
        VECTOR=vector, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
    return out


@triton.jit
def _buffer(address):
    """A buffer as a pointer to words of 16 bits."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def _words(numbers):
    """The bits of numbers as they are sent: never those of negative zero."""
    words = numbers.to(tl.int16, bitcast=True)
    return tl.where(words == _EMPTY, 0, words).to(tl.int16)


@triton.jit
def _send(words, addresses, place, mask, SIZE: tl.constexpr):
    """Write words to a place of every rank's buffer."""
    for step in tl.static_range(SIZE):
        tl.store(_buffer(addresses[step]) + place, words, mask=mask)


@triton.jit
def send(
    numbers, index, mask, addresses, halves_ptr, share, rank, HALF: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Write numbers to all ranks, whose next launch of :func:`sum_sent` adds them up.

    Args:
        numbers: in the dtype of the sum.
        index: of each number among all that the ranks add up.
        addresses, halves_ptr, share, rank, HALF, SIZE: those of :func:`send_arguments`.
    """
    program = index // share
    half = tl.load(halves_ptr + program, mask=mask, other=0)
    place = (program * 2 + half) * HALF + rank * share + index % share
    _send(_words(numbers), addresses, place, mask, SIZE)


@triton.jit
def _await(places, mask, halves_ptr, ended_ptr):
    """Wait until no place is empty, and return the words there."""
    words = tl.load(places, mask=mask, other=0, volatile=True)
    seen_end = tl.load(halves_ptr + _PROGRAMS, volatile=True)
    missing = tl.max((words == _EMPTY).to(tl.int32)) * (1 - seen_end)
    looks = 0
    while missing > 0:
        words = tl.load(places, mask=mask, other=0, volatile=True)
        missing = tl.max((words == _EMPTY).to(tl.int32))
        looks += 1
        if looks % _LOOKS == 0:
            if tl.load(ended_ptr, volatile=True) == 1:
                tl.store(halves_ptr + _PROGRAMS, 1)
                missing = 0
    return words


@triton.jit
def _receive(places, mask, halves_ptr, ended_ptr):
    """Wait until no place is empty, return the words there, and empty the places."""
    words = _await(places, mask, halves_ptr, ended_ptr)
    _clear(places, mask)
    return words


@triton.jit
def _clear(places, mask):
    tl.store(places, tl.full(places.shape, _EMPTY, tl.int16), mask=mask)


# These differ between batches; specialising on them would compile the kernel again at start-up.
@triton.jit(do_not_specialize=["vectors", "tiles", "rank"])
def _one_trip_kernel(
    x_ptr, addresses, halves_ptr, ended_ptr, vectors, tiles, rank, HALF: tl.constexpr, SIZE: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, SENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``tiles`` tiles of ``x``. Half a region is ``(SIZE, tiles, TILE)``, by the sending rank.

    Args:
        SENT: the kernel before sends the numbers, and only their sums are written to ``x``. That one leaves the
            halves in turn as they are, so this kernel looks for the numbers while it still runs.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    source = tl.arange(0, RANKS)[:, None]
    own = _buffer(addresses[SIZE - 1])
    dtype = x_ptr.dtype.element_ty
    left = vectors * VECTOR - program * tiles * TILE
    x_ptr += program * tiles * TILE
    if not SENT:
        wait_for_previous(PDL)
    # Volatile: a cache of the SM may hold the value of before the last launch.
    half = tl.load(halves_ptr + program, volatile=True)
    region = (program * 2 + half) * HALF
    if not SENT:
        for tile in range(tiles):
            at = tile * TILE + lane
            words = _words(tl.load(x_ptr + at, mask=at < left, other=0.0))
            _send(words, addresses, region + rank * tiles * TILE + at, at < left, SIZE)
    for tile in range(tiles):
        at = tile * TILE + lane
        places = own + region + source * (tiles * TILE) + at[None, :]
        mask = (source < SIZE) & (at < left)[None, :]
        words = _await(places, mask, halves_ptr, ended_ptr)
        if SENT:
            wait_for_previous(PDL)
        _clear(places, mask)
        total = tl.sum(words.to(dtype, bitcast=True).to(tl.float32), axis=0)
        tl.store(x_ptr + at, total.to(dtype), mask=at < left)
    tl.store(halves_ptr + program, 1 - half)


@triton.jit(do_not_specialize=["vectors", "tiles", "rank"])
def _two_trips_kernel(
    x_ptr, addresses, halves_ptr, ended_ptr, vectors, tiles, rank, HALF: tl.constexpr, SIZE: tl.constexpr,
    RANKS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``SIZE * tiles`` tiles of ``x``, of which each rank adds up ``tiles``.

    Half a region is two times ``(SIZE, tiles, TILE)``: what the ranks send of this rank's part, and the sums
    of all parts.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    source = tl.arange(0, RANKS)[:, None]
    own = _buffer(addresses[SIZE - 1])
    dtype = x_ptr.dtype.element_ty
    part = tiles * TILE
    left = vectors * VECTOR - program * SIZE * part
    x_ptr += program * SIZE * part
    wait_for_previous(PDL)
    half = tl.load(halves_ptr + program)
    region = (program * 2 + half) * HALF
    sums = region + SIZE * part
    for step in tl.static_range(SIZE):
        to = (rank + 1 + step) % SIZE
        for tile in range(tiles):
            at = tile * TILE + lane
            mask = to * part + at < left
            words = _words(tl.load(x_ptr + to * part + at, mask=mask, other=0.0))
            tl.store(_buffer(addresses[step]) + region + rank * part + at, words, mask=mask)
    for tile in range(tiles):
        at = tile * TILE + lane
        mask = rank * part + at < left
        words = _receive(
            own + region + source * part + at[None, :], (source < SIZE) & mask[None, :], halves_ptr, ended_ptr
        )
        total = tl.sum(words.to(dtype, bitcast=True).to(tl.float32), axis=0)
        _send(_words(total.to(dtype)), addresses, sums + rank * part + at, mask, SIZE)
    for tile in range(SIZE * tiles):
        at = tile * TILE + lane
        words = _receive(own + sums + at, at < left, halves_ptr, ended_ptr)
        tl.store(x_ptr + at, words.to(dtype, bitcast=True), mask=at < left)
    tl.store(halves_ptr + program, 1 - half)


@triton.jit(do_not_specialize=["vectors", "column_vectors", "tiles", "rank"])
def _gather_ranks_kernel(
    x_ptr, out_ptr, addresses, halves_ptr, ended_ptr, vectors, column_vectors, tiles, rank, HALF: tl.constexpr,
    SIZE: tl.constexpr, RANKS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per ``tiles`` tiles of ``x``; half a region as in :func:`_one_trip_kernel`."""
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    source = tl.arange(0, RANKS)[:, None]
    own = _buffer(addresses[SIZE - 1])
    start = program * tiles * TILE
    left = vectors * VECTOR - start
    wait_for_previous(PDL)
    half = tl.load(halves_ptr + program)
    region = (program * 2 + half) * HALF
    for tile in range(tiles):
        at = tile * TILE + lane
        words = _words(tl.load(x_ptr + start + at, mask=at < left, other=0.0))
        _send(words, addresses, region + rank * tiles * TILE + at, at < left, SIZE)
    for tile in range(tiles):
        at = tile * TILE + lane
        mask = (source < SIZE) & (at < left)[None, :]
        words = _receive(own + region + source * (tiles * TILE) + at[None, :], mask, halves_ptr, ended_ptr)
        # Vectors don't cross rows.
        vector = (start + at) // VECTOR
        row, column = vector // column_vectors, vector % column_vectors
        place = ((row * SIZE)[None, :] + source) * column_vectors + column[None, :]
        place = place * VECTOR + (at % VECTOR)[None, :]
        tl.store(out_ptr + place, words.to(out_ptr.dtype.element_ty, bitcast=True), mask=mask)
    tl.store(halves_ptr + program, 1 - half)
