"""The device's own state of every running request, by slot.

Sampled tokens, lengths and block tables stay on the device, so that a decode step needs nothing from the
host: it reads them, computes, and advances them. The host only writes what changed: new rows, new blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.kernels.decode_state import DecodeInputs, advance, gather_decode_inputs
from engine.prompt import EmbeddedMedia, MediaSpan
from engine.scheduling.batch import PrefillChunk, ScheduledBatch


class DeviceState:
    """Rows ``0 .. num_slots - 1``, and row ``num_slots`` for the padding of captured graphs.

    Attributes:
        block_tables: int32 ``(num_slots + 1, max_blocks)``.
        last_token: int64 ``(num_slots + 1,)``, sampled last and not computed yet.
        length: int64 ``(num_slots + 1,)``, computed tokens.
        delta: int64 ``(num_slots + 1,)``, row of the rotary tables minus index, for tokens after the prompt.
    """

    def __init__(self, num_slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        rows = num_slots + 1
        self.padding_slot = num_slots
        self.block_size = block_size
        self.block_tables = torch.zeros((rows, max_blocks), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.delta = torch.zeros(rows, dtype=torch.int64, device=device)

    def decode_inputs(self, slots: torch.Tensor) -> DecodeInputs:
        """Gather what the requests in ``slots`` ``(D,)`` compute next, and where."""
        return gather_decode_inputs(
            slots, self.block_tables, self.last_token, self.length, self.delta, block_size=self.block_size
        )

    def advance(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """The last tokens of decoding rows ``(D,)`` are computed; ``tokens`` come next."""
        advance(slots, tokens, self.last_token, self.length, padding_slot=self.padding_slot)


@dataclass(slots=True)
class SlotInfo:
    """The host's record of an admitted request.

    Attributes:
        positions: rotary positions ``(3, prompt)`` of its prompt; None if a constant offset describes them.
        delta: see :class:`DeviceState`; holds for the prompt as well where ``positions`` is None.
        rows: embedding rows on the device by item hash.
    """

    positions: np.ndarray | None
    delta: int
    rows: dict[str, torch.Tensor]


def chunk_positions(info: SlotInfo, start: int, count: int, mrope: bool) -> np.ndarray:
    """Rows of the rotary tables ``(count,)``, or ``(3, count)`` with M-RoPE, of tokens ``start ..``."""
    plain = np.arange(start, start + count, dtype=np.int64)
    if info.positions is None:
        return np.broadcast_to(plain, (3, count)) if mrope else plain + info.delta
    inside = info.positions[:, start : start + count]
    beyond = plain[inside.shape[1] :] + info.delta
    return np.concatenate([inside, np.broadcast_to(beyond, (3, len(beyond)))], axis=1)


def long_prompt_rows(
    chunks: Sequence[PrefillChunk], positions: Sequence[np.ndarray], first_row: int
) -> np.ndarray:
    """Assign reserved rows of the rotary tables to prompt tokens whose frequencies depend on their prompt's
    length.

    Args:
        positions: of each chunk, from :func:`chunk_positions`; replaced in place by the assigned rows.
        first_row: the first reserved row.

    Returns:
        int64 ``(3, n)``: the rows, and the positions and prompt lengths to fill them for.
    """
    found = [np.zeros((3, 0), np.int64)]
    for chunk, where in zip(chunks, positions, strict=True):
        request = chunk.request
        count = min(request.num_prompt - chunk.start, chunk.count)
        if request.rope_variant and count > 0:
            rows = np.arange(first_row, first_row + count)
            found.append(np.stack([rows, where[:count], np.full(count, request.rope_variant)]))
            where[:count] = rows
            first_row += count
    return np.concatenate(found, axis=1)


def span_rows(span: MediaSpan, start: int, end: int) -> tuple[int, int, np.ndarray]:
    """Which embedding rows of ``span`` tokens ``[start, end)`` take: first, last + 1, and their indices
    relative to ``start``."""
    first, last = span.rows_before(start), span.rows_before(end)
    places = np.arange(first, last) if span.embed_index is None else span.embed_index[first:last]
    return first, last, places + span.offset - start


@dataclass(frozen=True, slots=True)
class AwaitedRows:
    """Encoder rows ``(num_tokens, width)`` that another rank of the group has."""

    shape: tuple[int, ...]

    @classmethod
    def like(cls, media: EmbeddedMedia | torch.Tensor) -> AwaitedRows:
        return cls(tuple(media.shape if isinstance(media, torch.Tensor) else media.rows.shape))


def embedding_tensor(
    media: EmbeddedMedia | AwaitedRows | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Encoder rows ``(num_tokens, width)`` on ``device``, contiguous; awaited ones hold nothing yet."""
    if isinstance(media, AwaitedRows):
        return torch.empty(media.shape, dtype=dtype, device=device)
    if isinstance(media, torch.Tensor):
        return media.to(device=device, dtype=dtype).contiguous()
    # Arrays from shared memory are read-only, which torch tensors can't express: copy.
    rows = torch.from_numpy(np.array(media.rows.view(np.int16) if media.dtype == "bfloat16" else media.rows))
    if media.dtype == "bfloat16":
        rows = rows.view(torch.bfloat16)
    return rows.to(device=device, dtype=dtype)


def chunk_kv_slots(chunk: PrefillChunk, block_size: int) -> np.ndarray:
    """int64 ``(count,)``: where the chunk's keys and values go."""
    index = np.arange(chunk.start, chunk.start + chunk.count)
    blocks = np.asarray(chunk.request.blocks, np.int64)
    return blocks[index // block_size] * block_size + index % block_size


def table_updates(batch: ScheduledBatch) -> np.ndarray:
    """int64 ``(3, n)`` rows of slot, column and block: everything that this step changes in the tables."""
    changes = [(u.slot, u.column, u.blocks) for u in batch.table_updates]
    changes += [(a.slot, 0, a.request.blocks) for a in batch.admitted]
    counts = [len(blocks) for _, _, blocks in changes]
    slots = np.repeat(np.array([slot for slot, _, _ in changes], np.int64), counts)
    columns = [np.arange(first, first + len(blocks)) for _, first, blocks in changes]
    blocks = [np.array(blocks, np.int64) for _, _, blocks in changes]
    return np.stack([slots, np.concatenate([*columns, slots[:0]]), np.concatenate([*blocks, slots[:0]])])
