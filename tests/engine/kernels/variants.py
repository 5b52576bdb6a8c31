"""Counts the kernels that a model's start would compile on a Hopper GPU, where there is none.

    python -m tests.engine.kernels.variants

Prints two JSON objects: how often each kernel would be compiled beforehand, many at a time, and how often
later, while all that is recorded at a start is launched. Nothing is compiled and nothing runs: results are
whatever was in memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import engine.encoder
import engine.executor.rank
from benchmarks.shapes import write_checkpoint
from engine import LLM
from engine.graphs import rerun
from engine.kernels import dispatch, launch, overlap, tiling
from tests.engine.kernels.hopper import NoDevice


class Compiled:
    """Stands for a kernel."""

    def __getattr__(self, name: str) -> None:
        return None


def main() -> None:
    driver.set_active(NoDevice())
    dispatch._CHOICE = "triton"
    overlap._can_overlap = lambda device: True
    tiling._PROCESSORS_WITHOUT_GPU = 132
    engine.executor.rank.make_recorder = engine.encoder.make_recorder = lambda *_, **__: rerun
    # Ids that no kernel has sampled are of no vocabulary.
    functional.embedding = lambda ids, weight: weight[torch.zeros_like(ids)]
    beforehand: Counter[str] = Counter()
    later: Counter[str] = Counter()

    def compile_nothing(self: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Compiled:
        (beforehand if launch._compiling.get() else later)[self.__name__] += 1
        return self.device_caches[device][0].setdefault(key, Compiled())

    run = JITFunction.run
    JITFunction._do_compile = compile_nothing
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        LLM(
            str(write_checkpoint("tiny", Path(folder))),
            load_format="dummy",
            max_num_seqs=256,
            dtype="bfloat16",
        )
    print(json.dumps(beforehand))
    print(json.dumps(later))


if __name__ == "__main__":
    sys.exit(main())
