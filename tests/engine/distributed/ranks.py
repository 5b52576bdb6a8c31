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


def compute(rank: int, size: int, addresses: Sequence[str], paths: Sequence[Path], out: Path) -> None:
    """Join the group of each of ``addresses``, exchange tensors, and save the logits of ``paths``."""
    torch.set_num_threads(1)
    for number, address in enumerate(addresses):
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
