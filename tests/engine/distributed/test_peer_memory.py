"""Ranks on GPUs of one host write into each other's memory."""

import pytest
import torch
import torch.multiprocessing as multiprocessing

from tests.engine.distributed.ranks import sum_on_gpus, wait_for_a_lost_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs"),
]


def test_sums_are_right_and_the_same_on_all_ranks(tmp_path):
    size = torch.cuda.device_count()
    multiprocessing.spawn(sum_on_gpus, (size, f"file://{tmp_path}/rendezvous"), nprocs=size)


def test_who_waits_for_a_lost_rank_can_be_freed(tmp_path):
    multiprocessing.spawn(wait_for_a_lost_rank, (f"file://{tmp_path}/rendezvous",), nprocs=2)
