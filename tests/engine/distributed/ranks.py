"""The work of processes in the tests of groups. Nothing here imports Transformers: processes start sooner."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import TensorParallelGroup, TorchGroup
from engine.families.load import load_language_model
from engine.families.registry import resolve
from engine.graphs import CudaCapture
from tests.engine.decoding import prefill_logits

CPU = torch.device("cpu")


def logits(path: Path, group: TensorParallelGroup) -> torch.Tensor:
    """The logits ``(19, vocab_size)`` of a prompt, and behind them in each row the gap between the logits of
    two tokens, whose rows of the head are on different ranks."""
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    decoder = load_language_model(checkpoint, config, device=CPU, dtype=torch.float32, tp=group)
    ids = torch.randint(3, 320, (19,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeds = decoder.embed(ids)
        (made,) = prefill_logits(decoder, [embeds], [torch.arange(19)])
        rows = torch.randn(19, config.decoder.hidden_size, generator=torch.Generator().manual_seed(1))
        gap = decoder.logit_gap(rows, 5, 300)
        every = decoder.logits(rows)
    torch.testing.assert_close(gap[:, 0], every[:, 5] - every[:, 300], atol=1e-4, rtol=0)
    return torch.cat([made, gap], dim=1)


def compute(rank: int, size: int, groups: Sequence[tuple[str, Sequence[Path]]], out: Path) -> None:
    """Join the group of each address, exchange tensors, and save the logits of the checkpoints beside it."""
    torch.set_num_threads(1)
    for number, (address, paths) in enumerate(groups):
        group = TorchGroup.join(rank=rank, size=size, address=address, device=CPU, timeout_s=60)
        message = torch.full((3,), float(rank))
        assert group.broadcast(message.clone(), source=1).eq(1).all()
        assert group.all_gather(message[None], dim=0).tolist() == [[float(r)] * 3 for r in range(size)]
        assert group.all_gather(torch.zeros(0, 3)).shape == (0, 3 * size)
        assert group.all_reduce(message.clone()).eq(sum(range(size))).all()
        torch.save([logits(path, group) for path in paths], out / f"group{number}-rank{rank}.pt")
        group.close()


def stop_after_one(address: str) -> None:
    """Join as rank 1 of 2, take part in one sum, and stop without an end."""
    group = TorchGroup.join(rank=1, size=2, address=address, device=CPU, timeout_s=60)
    group.all_reduce(torch.ones(3))
    os.kill(os.getpid(), signal.SIGSTOP)


#: Shapes of sums between GPUs: of one trip, of two, of the backend, and one that is no multiple of a vector.
SHAPES = [(1, 3584), (3, 40), (64, 3584), (900, 3584), (2048, 3584), (1, 9)]


def sum_on_gpus(rank: int, size: int, address: str) -> None:
    """Sum tensors of bfloat16, eagerly and in a captured graph, and compare with sums of float64."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = TorchGroup.join(rank=rank, size=size, address=address, device=device, timeout_s=60)
    assert group.peers is not None
    generator = torch.Generator(device)

    def draw(shape: tuple[int, int], seed: int) -> list[torch.Tensor]:
        generator.manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, device=device)
            .bfloat16()
            .where(torch.rand(shape, generator=generator, device=device) < 0.9, -0.0)
            for _ in range(size)
        ]

    inputs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in SHAPES]

    def work() -> list[torch.Tensor]:
        return [group.all_reduce(x.clone()) for x in inputs]

    replay = CudaCapture(device)(work)
    for seed in range(30):
        drawn = [draw(shape, seed) for shape in SHAPES]
        for x, every in zip(inputs, drawn, strict=True):
            x.copy_(every[rank])
        for out, every in zip(replay() if seed % 2 else work(), drawn, strict=True):
            expected = torch.stack(every).double().sum(0)
            assert (out.double() - expected).norm() < 4e-3 * expected.norm()
            ranks = group.all_gather(out[None], dim=0).view(torch.int16)
            assert (ranks == ranks[0]).all()
    del replay
    group.close()


def wait_for_a_lost_rank(rank: int, address: str) -> None:
    """As rank 1 of 2, end after one sum; as rank 0, wait for it in a captured graph, and stop waiting."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = TorchGroup.join(rank=rank, size=2, address=address, device=device, timeout_s=60)
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    assert group.all_reduce(x.clone()).eq(2).all()
    replay = CudaCapture(device)(lambda: [group.all_reduce(x.clone()) for _ in range(60)])
    if rank == 1:
        os._exit(0)
    replay()
    group.abort()
    torch.cuda.synchronize()
    assert torch.ones(4, device=device).sum() == 4
    del replay
    group.close()
