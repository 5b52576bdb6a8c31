"""Runs a decoder over whole prompts with scattered KV blocks, as an engine would."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.paged import AttentionMetadata, KVCache
from engine.kernels.recurrent_state import StateCache
from engine.layers.decoder import Decoder
from engine.layers.layer_groups import LayerGroups
from engine.runner.kv_storage import allocate_caches

BLOCK = 4


def poisoned_caches(decoder: Decoder, num_blocks: int, num_states: int) -> list[KVCache | StateCache]:
    """Caches full of NaN: whatever is read without having been written spoils the result."""
    caches = allocate_caches(
        decoder.config,
        LayerGroups.single(decoder.config),
        num_blocks,
        BLOCK,
        num_states,
        decoder.dtype,
        decoder.device,
    ).layers
    for cache in caches:
        tensors = (cache.keys, cache.values) if isinstance(cache, KVCache) else (cache.conv, cache.recurrent)
        for tensor in tensors:
            tensor.fill_(torch.nan)
    return caches


def metadata(
    starts: Sequence[int], lengths: Sequence[int], tables: Sequence[Sequence[int]]
) -> AttentionMetadata:
    """Sequences that have ``starts`` tokens in the cache and bring the rest of ``lengths`` in this batch."""
    new = [length - start for start, length in zip(starts, lengths, strict=True)]
    slots = [
        table[position // BLOCK] * BLOCK + position % BLOCK
        for start, length, table in zip(starts, lengths, tables, strict=True)
        for position in range(start, length)
    ]
    width = max(map(len, tables))
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return AttentionMetadata(
        block_tables=torch.tensor(padded, dtype=torch.int32),
        query_start=torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        max_query_len=max(new),
        max_seq_len=max(lengths),
        # Not in the order of the sequences.
        state_rows=torch.arange(len(lengths)).flip(0),
    )


@torch.inference_mode()
def prefill_logits(
    decoder: Decoder,
    embeds: Sequence[torch.Tensor],
    positions: Sequence[torch.Tensor],
    *,
    split: Sequence[int] | None = None,
    deepstack: Sequence[torch.Tensor] | None = None,
    ids: Sequence[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Logits at every token of several prompts in one batch.

    Args:
        embeds: ``(L, hidden)`` per prompt.
        positions: ``(L,)`` or ``(3, L)`` per prompt.
        split: where each prompt is cut in two steps; None runs it in one.
        ids: ``(L,)`` per prompt, for models with inputs of each layer.
    """
    lengths = [len(rows) for rows in embeds]
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).add(1).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    caches = poisoned_caches(decoder, sum(counts) + 1, len(lengths))
    cuts = list(split or lengths)
    steps = [([0] * len(lengths), cuts)]
    if split is not None:
        steps.append((cuts, lengths))
    pieces: list[list[torch.Tensor]] = [[] for _ in lengths]
    for starts, ends in steps:
        ranges = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        batch = torch.cat([rows[part] for rows, part in zip(embeds, ranges, strict=True)])
        where = torch.cat([p[..., part] for p, part in zip(positions, ranges, strict=True)], dim=-1)
        extra = None
        if deepstack is not None:
            extra = torch.cat([rows[:, part] for rows, part in zip(deepstack, ranges, strict=True)], dim=1)
        tokens = None
        if ids is not None:
            tokens = torch.cat([prompt[part] for prompt, part in zip(ids, ranges, strict=True)])
        meta = metadata(starts, ends, tables)
        logits = decoder.logits(decoder(batch, where, caches, meta, extra, ids=tokens))
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        for piece, rows in zip(pieces, logits.split(sizes), strict=True):
            piece.append(rows)
    return [torch.cat(piece) for piece in pieces]
