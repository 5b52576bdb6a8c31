"""Recorded forward passes over few tokens: what a short prompt needs is launched at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.graphs import Recorder, Replay
from engine.layers.metadata import AttentionMetadata

#: Every multiple of the step up to the most tokens is recorded. Beyond, launching keeps up with the device.
TOKEN_STEP = 64
MAX_TOKENS = 1024
MAX_SEQUENCES = 16

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionMetadata], torch.Tensor]


class ForwardGraphs:
    """Replays the decoder's forward pass over prompt chunks and decodes, padded to the next recorded size.

    Rows beyond the batch's tokens write no keys and belong to no sequence; sequences beyond the batch's have
    no tokens.

    Args:
        forward: embeddings ``(T, width)``, positions and metadata to hidden states ``(T, width)``.
        record: see :class:`engine.graphs.Recorder`.
        width: of embeddings and hidden states.
        dtype: theirs.
        axes: of positions, 3 with M-RoPE; None for plain ones.
        max_blocks: columns of block tables.
        max_seq_len: longest sequence.
        device: where all that is.
    """

    def __init__(
        self,
        forward: Forward,
        record: Recorder,
        *,
        width: int,
        dtype: torch.dtype,
        axes: int | None,
        max_blocks: int,
        max_seq_len: int,
        device: torch.device,
    ) -> None:
        self._forward, self._record = forward, record
        self._max_seq_len = max_seq_len
        self._embeds = torch.zeros((MAX_TOKENS, width), dtype=dtype, device=device)
        shape = (MAX_TOKENS,) if axes is None else (axes, MAX_TOKENS)
        self._positions = torch.zeros(shape, dtype=torch.int64, device=device)
        self._slot_mapping = torch.full((MAX_TOKENS,), -1, dtype=torch.int64, device=device)
        self._tables = torch.zeros((MAX_SEQUENCES, max_blocks), dtype=torch.int32, device=device)
        self._starts = torch.zeros(MAX_SEQUENCES + 1, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(MAX_SEQUENCES, dtype=torch.int32, device=device)
        self._replays: dict[int, Replay] = {}

    def rehearse(self) -> None:
        """Run the largest and the smallest pass without recording them."""
        for size in (MAX_TOKENS, TOKEN_STEP):
            self._work(size)()

    def capture(self) -> None:
        """Record every size."""
        for size in range(MAX_TOKENS, 0, -TOKEN_STEP):
            self._get(size)

    def fits(self, tokens: int, sequences: int) -> bool:
        """Whether a batch is small enough for :meth:`replay`."""
        return 0 < tokens <= MAX_TOKENS and sequences <= MAX_SEQUENCES

    def replay(self, embeds: torch.Tensor, positions: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        """Hidden states ``(T, width)``: a view that the next replay overwrites."""
        tokens, sequences = embeds.shape[0], meta.seq_lens.shape[0]
        replay = self._get(-(-tokens // TOKEN_STEP) * TOKEN_STEP)
        self._embeds[:tokens] = embeds
        self._positions[..., :tokens] = positions
        self._slot_mapping[:tokens] = meta.slot_mapping
        self._slot_mapping[tokens:] = -1
        self._tables[:sequences] = meta.block_tables
        self._starts[: sequences + 1] = meta.query_start
        self._starts[sequences + 1 :] = tokens
        self._lengths[:sequences] = meta.seq_lens
        return replay()[:tokens]

    def _get(self, size: int) -> Replay:
        if size not in self._replays:
            self._replays[size] = self._record(self._work(size))
        return self._replays[size]

    def _work(self, size: int) -> Callable[[], torch.Tensor]:
        # No row may write keys while it is recorded: what follows fills all buffers anew anyway.
        self._slot_mapping.fill_(-1)
        self._starts.zero_()
        meta = AttentionMetadata(
            block_tables=self._tables,
            query_start=self._starts,
            seq_lens=self._lengths,
            slot_mapping=self._slot_mapping[:size],
            max_query_len=size,
            max_seq_len=self._max_seq_len,
        )
        embeds, positions = self._embeds[:size], self._positions[..., :size]
        return lambda: self._forward(embeds, positions, meta)
