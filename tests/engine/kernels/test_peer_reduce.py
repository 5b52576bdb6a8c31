"""Collectives over peer memory, in processes that share files in place of the memory of GPUs."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.peer_reduce import HALF_BYTES, MAX_BYTES, PROGRAMS, ReduceTile, choose_tile
from tests.engine import forked
from tests.engine.kernels.peer_ranks import make_buffers, take_part

pytestmark = pytest.mark.processes

#: Rows and columns of an input, and how it is split. Some end within a tile, or within a rank's part.
CALLS = [
    ((1, 96), ReduceTile(trips=1, numbers=32, warps=1, programs=3, tiles=1)),
    ((3, 40), ReduceTile(trips=1, numbers=32, warps=1, programs=2, tiles=2)),
    ((5, 40), ReduceTile(trips=2, numbers=16, warps=1, programs=2, tiles=4)),
    ((1, 96), ReduceTile(trips=1, numbers=32, warps=1, programs=3, tiles=1)),
    ((1, 8), ReduceTile(trips=2, numbers=16, warps=1, programs=1, tiles=1)),
    ((2, 96), ReduceTile(trips=2, numbers=32, warps=1, programs=2, tiles=1)),
]


def test_all_ranks_get_the_same_and_leave_nothing_behind(tmp_path, monkeypatch):
    # With a GPU, too, these ranks compute on the CPU.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    size = 3
    inputs = [torch.randn(size, *shape).half() for shape, _ in CALLS]
    # Negative zeros stand for empty places, and are numbers too.
    inputs[0][:, 0, ::2] = -0.0
    inputs[2][:, 1] = float("nan")
    inputs[3][0, 0, 5] = float("-inf")
    calls = [(given, tile) for given, (_, tile) in zip(inputs, CALLS, strict=True)]
    parts, weight = torch.randn(size, 3, 16).half(), torch.randn(40, 16).half()
    make_buffers(tmp_path, size)
    context, ranks = forked.context(), []
    for rank in range(size):
        ours, theirs = context.Pipe()
        arguments = (theirs, rank, size, tmp_path, calls, parts, weight)
        process = context.Process(target=take_part, args=arguments, daemon=True)
        process.start()
        ranks.append((process, ours))
    results = []
    for _, connection in ranks:
        assert connection.poll(120), "a rank waits for numbers that don't come"
        results.append(connection.recv())
    for process, connection in ranks:
        connection.send(None)
        assert connection.recv(), "a place that was read is not empty"
        process.join()
    for own in results:
        product = parts[:, :1].double().sum(0) @ weight.double().t()
        torch.testing.assert_close(own.pop(), product.half(), atol=1e-2, rtol=1e-2)
        assert torch.equal(own.pop(), torch.cat(list(parts), dim=-1))
        for out, first, given in zip(own, results[0], inputs, strict=True):
            assert torch.equal(out.view(torch.int16), first.view(torch.int16))
            torch.testing.assert_close(out, given.float().sum(0).half(), equal_nan=True, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("size", range(2, 9))
def test_every_input_fits_into_the_regions_of_its_programs(size):
    for numel in (8, 3584, 3584 * 64, 3584 * 256, MAX_BYTES // 2):
        tile = choose_tile(numel, 2, size)
        part = tile.numbers * tile.tiles
        assert tile.programs <= PROGRAMS
        assert numel <= tile.programs * part * (1 if tile.trips == 1 else size)
        assert 2 * part * size * tile.trips <= HALF_BYTES
