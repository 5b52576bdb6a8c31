"""Host time of a scheduler step in steady decode, without any model.

    python -m benchmarks.host [--requests 16,64,256]

The step loop runs against a runner that samples nothing and returns at once, so that what is timed is all
that the host does for a step: scheduling, growing block tables, taking in tokens. ``text`` is what the output
thread spends on a step, beside the step thread; ``text of 8`` where it turns eight steps into text together,
as offline and by a thread that is late.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Collection
from pathlib import Path

import numpy as np

from engine.core import EngineCore
from engine.metrics import EngineMetrics
from engine.offline import STEPS_TOGETHER
from engine.output_processor import OutputProcessor
from engine.request import Request
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, StepResult
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.encoder_ledger import EncoderLedger
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.prefix_cache import BlockHasher
from engine.scheduling.scheduler import Scheduler
from engine.text.tokenizer import Tokenizer

PROMPT, BLOCK = 64, 16
MODEL = Path(__file__).resolve().parent.parent / "models" / "pocket"


class _Done:
    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def result(self) -> StepResult:
        return StepResult(self._tokens)


class NullRunner:
    """Gives every row the same token at once."""

    vocab_size, is_asynchronous = 512, False

    def execute(self, batch: ScheduledBatch, grammar_mask=None) -> _Done:
        return _Done(np.full(len(batch.sampling_slots), 300, np.int64))

    def recover(self) -> None:
        pass

    def check_idle(self, released: Collection[int]) -> None:
        pass


def measure(count: int, steps: int) -> dict[str, float]:
    """Mean microseconds per step with ``count`` running requests."""
    length = PROMPT + steps + 64
    scheduler = Scheduler(
        KVManager(BlockPool(count * -(-length // BLOCK) + 8), BlockHasher(BLOCK, "model"), BLOCK),
        EncoderLedger(1024),
        max_num_seqs=count,
        max_num_batched_tokens=8192,
        max_model_len=length,
    )
    core = EngineCore(scheduler, NullRunner(), run_ahead=1)
    outputs = OutputProcessor(Tokenizer.load(MODEL), EngineMetrics())
    params = SamplingParams(temperature=0.0, max_tokens=length)
    for index in range(count):
        # Of different lengths, so that not all fill a block in the same step.
        count_of_ids = PROMPT - index % BLOCK
        ids = [(index * 7 + i) % 250 + 10 for i in range(count_of_ids)]
        request = Request(f"{index}/0", ids, count_of_ids, params, length, frozenset({2}))
        outputs.add(RequestGroup.of(str(index), [request], count_of_ids))
        core.add(request)
    stepping, made = [], []
    text: dict[int, list[float]] = {1: [], STEPS_TOGETHER: []}
    # What is kept here for later would send the garbage collector over it again and again.
    gc.disable()
    for _ in range(steps):
        start = time.perf_counter()
        made.append(core.step())
        stepping.append(time.perf_counter() - start)
    gc.enable()
    # Apart from the steps, as on its own thread: it would push the scheduler's data out of the cache.
    half = len(made) // 2
    for size, together in ((1, made[:half]), (STEPS_TOGETHER, made[half:])):
        for first in range(0, len(together), size):
            events = [event for step in together[first : first + size] for event in step]
            start = time.perf_counter()
            outputs.process(events)
            text[size].append((time.perf_counter() - start) / size)
    # The first steps hold the prompts.
    return {
        "requests": count,
        "step us": statistics.mean(stepping[20:]) * 1e6,
        "step p99 us": statistics.quantiles(stepping[20:], n=100)[98] * 1e6,
        "text us": statistics.mean(text[1][20:]) * 1e6,
        f"text of {STEPS_TOGETHER} us": statistics.mean(text[STEPS_TOGETHER][:-1]) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", default="16,64,256")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(int(count), options.steps) for count in options.requests.split(",")]
    print("  ".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:12.1f}" for value in row.values()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
