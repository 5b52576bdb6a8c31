"""Tokens that the KV cache holds with blocks behind sliding windows given back, and with all blocks kept.

    python -m benchmarks.windows [--contexts 1000,8192,32768,131072] [--gib 64]

Contexts of one length arrive until all that run generate tokens and one more has to wait. The scheduler is
the engine's own; nothing is computed, so the figures are exact and no model is needed. The numbers of layers
are those of Gemma 3, of which five in six have a window of 1024 tokens.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from engine.layers.decoder_config import DecoderConfig, RopeConfig
from engine.layers.layer_groups import LayerGroups
from engine.request import Request
from engine.runner.kv_storage import block_bytes
from engine.sampling_params import SamplingParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.encoder_ledger import EncoderLedger
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.scheduler import Scheduler

BLOCK, STEP_TOKENS, ANSWER = 16, 8192, 4096
#: Layers, KV heads and numbers per head.
SHAPES = {"4B": (34, 4, 256), "12B": (48, 8, 256), "27B": (62, 16, 128)}


def decoder_of(shape: str) -> DecoderConfig:
    layers, heads, dim = SHAPES[shape]
    return DecoderConfig(
        vocab_size=16,
        hidden_size=heads * dim,
        intermediate_size=16,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        max_position=131072 + ANSWER,
        windows=tuple(None if layer % 6 == 5 else 1024 for layer in range(layers)),
    )


def tokens_held(decoder: DecoderConfig, groups: LayerGroups, context: int, memory: int) -> int:
    """Tokens of the contexts that run at once, answers so far included; 0 if not even one can run.

    Args:
        context: tokens of each.
        memory: bytes of the KV cache.
    """
    num_blocks = memory // block_bytes(groups, BLOCK, torch.bfloat16)
    kv = KVManager(BlockPool(num_blocks), None, BLOCK, windows=groups.windows, step_tokens=STEP_TOKENS)
    scheduler = Scheduler(
        kv,
        EncoderLedger(1),
        max_num_seqs=1000,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=decoder.max_position,
    )
    ids, params = [1] * context, SamplingParams(max_tokens=ANSWER)
    if scheduler.max_model_len < context + ANSWER:
        return 0
    slots, waits = scheduler.slots, False
    while not waits:
        if not scheduler.num_waiting:
            scheduler.add(Request("", ids, context, params, context + ANSWER, frozenset()))
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, np.ones(len(batch.sampling_slots), np.int64))
        waits = not batch.prefills
    assert not scheduler.stats.finished and not scheduler.stats.preempted
    return int(slots.computed[[request.slot for request in scheduler.running]].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--contexts", default="1000,8192,32768,131072")
    parser.add_argument("--gib", type=int, default=64)
    options = parser.parse_args()
    print("  ".join(f"{name:>10}" for name in ("layers of", "context", "kept", "given back", "ratio")))
    for shape in SHAPES:
        decoder = decoder_of(shape)
        for context in map(int, options.contexts.split(",")):
            groups = LayerGroups.single(decoder), LayerGroups.of(decoder, decoder.max_position)
            kept, given_back = (tokens_held(decoder, g, context, options.gib << 30) for g in groups)
            ratio = given_back / kept if kept else float("inf")
            print(f"{shape:>10}  {context:10}  {kept:10}  {given_back:10}  {ratio:10.2f}")


if __name__ == "__main__":
    main()
