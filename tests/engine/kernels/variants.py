"""Counts the kernels that a model would compile on a Hopper GPU, on a machine without one.

    python -m tests.engine.kernels.variants

It prints two JSON objects: how many variants of each kernel would be compiled in parallel at start-up, and
how many later, while graphs are captured and requests of various sizes are served. Nothing is compiled and
nothing runs: results are whatever was in memory.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from triton.runtime.jit import JITFunction

import engine.encoder
import engine.executor.rank
from benchmarks.shapes import write_checkpoint
from engine import LLM, SamplingParams
from engine.kernels import device, gemm_activation, launch
from engine.runner.sampler import Sampler
from engine.sampling_params import StructuredSpec
from tests.engine.kernels.hopper import Noted, prepare
from tests.engine.rerun import rerun


def main() -> None:
    prepare()
    device._BACKEND = "triton"
    device.compute_capability = lambda _: (9, 0)
    engine.executor.rank.make_capture = engine.encoder.make_capture = lambda *_, **__: rerun
    # Nothing has sampled the ids, so they may lie outside the vocabulary.
    functional.embedding = lambda ids, weight: weight[torch.zeros_like(ids)]
    # Products of torch's own take most of the time, and no result matters.
    functional.linear = lambda x, weight, bias=None: zeros(x.dtype, *x.shape[:-1], len(weight))
    sample = Sampler.sample
    Sampler.sample = lambda *args, **options: sample(*args, **options).zero_()
    beforehand: Counter[str] = Counter()
    later: Counter[str] = Counter()

    def compile_nothing(self: JITFunction, key: str, signature: Any, device: int, *_: Any) -> Noted:
        (beforehand if launch._compiling.get() else later)[self.__name__] += 1
        return self.device_caches[device][0].setdefault(key, Noted())

    run = JITFunction.run
    JITFunction._do_compile = compile_nothing
    JITFunction.run = lambda self, *args, warmup, **options: run(self, *args, warmup=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(write_checkpoint("tiny", Path(folder))),
            load_format="dummy",
            max_num_seqs=256,
            dtype="bfloat16",
        )
    # The tiny model's GEMMs are too small to choose this kernel.
    gemm_activation.fills_gpu = lambda *_: True
    serve(llm)
    print(json.dumps(beforehand))
    print(json.dumps(later))


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Zeros whose memory the system clears where it is read, if it is: torch would write them."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def serve(llm: LLM) -> None:
    """Serve steps and images of captured sizes and of others, alone and several at once."""
    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    drawn = SamplingParams(max_tokens=3, top_p=0.9, ignore_eos=True)
    word = StructuredSpec(kind="regex", text="[a-z]{3}")
    kinds = (greedy, drawn, replace(drawn, top_p=1.0))
    constrained = [replace(params, structured=word, ignore_eos=False) for params in kinds]
    for lengths in ([1], [47], [1531], [700, 911, 2], [2100, 5], [*range(1, 10)]):
        for params in (greedy, drawn, *constrained):
            prompts = [{"prompt_token_ids": [5] * length} for length in lengths]
            llm.generate(prompts, params, use_tqdm=False)
    for sides in ([28], [300], [1400], [500, 700, 900, 33], [2000] * 4):
        images = [Image.fromarray(np.full((side, side + 90, 3), side % 251, np.uint8)) for side in sides]
        placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
        llm.generate(
            [{"prompt": placeholder, "multi_modal_data": {"image": image}} for image in images],
            greedy,
            use_tqdm=False,
        )


if __name__ == "__main__":
    sys.exit(main())
