"""Two ranks over gloo compute what one does."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup, TorchGroup
from engine.errors import ConfigError
from engine.families.load import load_language_model
from engine.families.registry import resolve
from tests.engine.decoding import prefill_logits
from tests.engine.tiny import make_text
from tests.serving import free_port

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
KINDS = {
    "gqa": ("qwen3", {}),
    "one KV head": ("qwen2", {"num_key_value_heads": 1}),
    "fused, tied": ("phi3", {"tie_word_embeddings": True}),
    "biases": ("llama3", {}),
    "odd vocabulary": ("llama", {"vocab_size": 321}),
    "four norms, tied": ("gemma3", {}),
}


def logits(path: Path, group) -> torch.Tensor:
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


def _rank(rank: int, size: int, address: str, paths: list[Path], out: Path) -> None:
    torch.set_num_threads(1)
    group = TorchGroup.join(rank=rank, size=size, address=address, device=CPU, timeout_s=60)
    message = torch.full((3,), float(rank))
    assert group.broadcast(message.clone(), source=1).eq(1).all()
    assert group.all_gather(message[None], dim=0).tolist() == [[float(r)] * 3 for r in range(size)]
    assert group.all_gather(torch.zeros(0, 3)).shape == (0, 3 * size)
    assert group.all_reduce(message.clone()).eq(sum(range(size))).all()
    torch.save([logits(path, group) for path in paths], out / f"rank{rank}.pt")
    group.close()


def by_port(folder: Path) -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def by_file(folder: Path) -> str:
    return f"file://{folder}/rendezvous"


@pytest.mark.parametrize("address", [by_port, by_file])
def test_two_ranks_equal_one(tmp_path, address):
    paths = [make_text(tmp_path / name, kind, **options) for name, (kind, options) in KINDS.items()]
    multiprocessing.spawn(_rank, (2, address(tmp_path), paths, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for path, first, second in zip(paths, *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, logits(path, SingleProcessGroup()), atol=1e-4, rtol=0)


def _stop_after_one(address: str) -> None:
    group = TorchGroup.join(rank=1, size=2, address=address, device=CPU, timeout_s=60)
    group.all_reduce(torch.ones(3))
    os.kill(os.getpid(), signal.SIGSTOP)


def test_who_waits_for_a_silent_rank_can_be_freed(tmp_path):
    """Its connections stay open, as those of a host that is gone do."""
    address = by_file(tmp_path)
    peer = multiprocessing.get_context("spawn").Process(target=_stop_after_one, args=(address,), daemon=True)
    peer.start()
    try:
        group = TorchGroup.join(rank=0, size=2, address=address, device=CPU, timeout_s=250)
        assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        found: list[BaseException] = []

        def wait_for_it() -> None:
            try:
                group.all_reduce(torch.ones(3))
            except RuntimeError as error:
                found.append(error)

        waiting = threading.Thread(target=wait_for_it)
        waiting.start()
        waiting.join(2.5)
        assert waiting.is_alive(), "a group that nobody has left goes on waiting"
        group.abort()
        waiting.join(60)
        assert len(found) == 1
        group.close()
    finally:
        peer.kill()
        peer.join()


class Imagined(SingleProcessGroup):
    size = 3


def test_a_size_that_does_not_divide_the_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tensor_parallel_size 3 does not divide") as error:
        logits(make_text(tmp_path, "llama"), Imagined())
    assert error.value.param == "tensor_parallel_size"
