"""Ranks on GPUs of one host write into each other's memory."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from engine.distributed.peer_memory import _all_agree, _listen, _receive_descriptors, _send_descriptor
from tests.engine.distributed.ranks import sum_on_gpus, wait_for_a_lost_rank

RANKS = 3

on_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")


def test_each_rank_gets_the_file_of_each_other_one(tmp_path):
    meeting, store = Path(tmp_path / "rendezvous"), dist.HashStore()

    def exchange(rank: int) -> dict[int, bytes]:
        own = os.memfd_create("memory")
        os.write(own, b"of rank %d" % rank)
        with _listen(meeting, rank, RANKS) as listener:
            assert _all_agree(store, "shared", rank, RANKS, "")
            _send_descriptor(own, meeting, rank, RANKS)
            os.close(own)
            found = _receive_descriptors(listener, RANKS - 1)
        contents = {other: os.pread(descriptor, 99, 0) for other, descriptor in found.items()}
        for descriptor in found.values():
            os.close(descriptor)
        return contents

    with ThreadPoolExecutor(RANKS) as pool:
        for rank, found in enumerate(pool.map(exchange, range(RANKS))):
            assert found == {other: b"of rank %d" % other for other in range(RANKS) if other != rank}


def test_if_one_rank_fails_none_shares_memory(caplog):
    store = dist.HashStore()
    with ThreadPoolExecutor(RANKS) as pool:
        ranks = range(RANKS)
        answers = pool.map(
            lambda rank: _all_agree(store, "shared", rank, RANKS, "no such call" if rank == 1 else ""), ranks
        )
        assert list(answers) == [False] * RANKS
    assert [record.message for record in caplog.records if "no such call" in record.message]


@on_gpus
@pytest.mark.gpu
@pytest.mark.processes
def test_sums_are_right_and_the_same_on_all_ranks(tmp_path):
    size = torch.cuda.device_count()
    multiprocessing.spawn(sum_on_gpus, (size, f"file://{tmp_path}/rendezvous"), nprocs=size)


@on_gpus
@pytest.mark.gpu
@pytest.mark.processes
def test_who_waits_for_a_lost_rank_can_be_freed(tmp_path):
    multiprocessing.spawn(wait_for_a_lost_rank, (f"file://{tmp_path}/rendezvous",), nprocs=2)
