"""Two ranks over gloo compute what one does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from engine.distributed.group import SingleProcessGroup, TorchGroup
from engine.errors import ConfigError
from tests.engine import forked
from tests.engine.distributed.ranks import CPU, compute, logits, stop_after_one
from tests.engine.tiny import make_text
from tests.serving import free_port

pytestmark = pytest.mark.processes

KINDS = {
    "gqa": ("qwen3", {}),
    "one KV head": ("qwen2", {"num_key_value_heads": 1}),
    "fused, tied": ("phi3", {"tie_word_embeddings": True}),
    "biases": ("llama3", {}),
    "odd vocabulary": ("llama", {"vocab_size": 321}),
    "four norms, tied": ("gemma3", {}),
}


def by_port(folder: Path) -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def by_file(folder: Path) -> str:
    return f"file://{folder}/rendezvous"


def test_two_ranks_equal_one(tmp_path):
    paths = [make_text(tmp_path / name, kind, **options) for name, (kind, options) in KINDS.items()]
    # One after the other in the same two processes, as an engine that is loaded again joins anew.
    groups = [(by_port(tmp_path), paths), (by_file(tmp_path), paths[:1])]
    multiprocessing.start_processes(
        compute, (2, groups, tmp_path), nprocs=2, start_method=forked.start_method()
    )
    for number, (_, paths) in enumerate(groups):
        ranks = [torch.load(tmp_path / f"group{number}-rank{rank}.pt") for rank in range(2)]
        for path, first, second in zip(paths, *ranks, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, logits(path, SingleProcessGroup()), atol=1e-4, rtol=0)


def test_who_waits_for_a_silent_rank_can_be_freed(tmp_path):
    """Its connections stay open, as those of a host that is gone do."""
    address = by_file(tmp_path)
    peer = forked.context().Process(target=stop_after_one, args=(address,), daemon=True)
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
