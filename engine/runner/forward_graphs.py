"""Captured forward passes over few tokens, so that short prompts don't wait for their kernels' launches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import torch

from engine.graphs import Capture, Replay
from engine.kernels.paged import AttentionMetadata

#: Capture every multiple of TOKEN_STEP up to FINE_TOKENS. Small passes compute forced tokens and guesses, and
#: padding would be a large part of them: capture every half of a step up to four steps, and a quarter.
TOKEN_STEP = 64
FINE_TOKENS = 1024
#: Above that, while launching is slower than computing, capture every multiple of COARSE_STEP up to
#: MAX_TOKENS: 128 rows take a decoder of two billion parameters 0.6 ms.
COARSE_STEP = 256
MAX_TOKENS = 4096
#: Parameters of a layer that a token uses, times tokens, that a GPU computes while a slow host launches a
#: layer's ten kernels (six tenths of a millisecond).
_LAUNCH_WORK = 2e11
#: Each size is captured for this many sequences and for the most that there can be: kernels that search for
#: a row's sequence take longer with many.
FEW_SEQUENCES = 16


def captured_sizes(layer_parameters: int, max_tokens: int) -> list[int]:
    """Numbers of tokens to capture, ascending.

    Args:
        layer_parameters: parameters of one decoder layer on this rank that one token uses.
        max_tokens: most tokens of a step.
    """
    most = max(FINE_TOKENS, min(MAX_TOKENS, int(_LAUNCH_WORK / layer_parameters)))
    step = TOKEN_STEP
    sizes = [step // 4, *range(step // 2, 4 * step, step // 2), *range(4 * step, FINE_TOKENS + 1, step)]
    sizes = [size for size in sizes if size <= FINE_TOKENS]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + COARSE_STEP)
    return sizes[: bisect_left(sizes, max_tokens) + 1]


Forward = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        AttentionMetadata,
        torch.Tensor | None,
        torch.Tensor | None,
        torch.Tensor | None,
    ],
    torch.Tensor,
]


class ForwardGraphs:
    """Replays the decoder's forward pass over prompt chunks and decodes, padded to the next captured size.

    Padding rows write no keys and belong to no sequence; padding sequences have no tokens.

    Args:
        forward: embeddings ``(T, width)``, positions, metadata, what is added after the first layers
            ``(deepstack, T, width)`` or None, R row indices or None, and the tokens ``(T,)`` or None, to the
            hidden states ``(R, width)`` of these rows, or of all rows.
        capture: see :class:`engine.graphs.Capture`.
        sizes: numbers of tokens to capture, ascending.
        width: of embeddings and hidden states.
        dtype: of embeddings and hidden states.
        axes: axes of positions, 3 with M-RoPE; None for plain positions ``(T,)``.
        deepstack: layers after which something is added.
        max_sequences: most sequences of a batch.
        num_groups: groups of layers, each with its block tables.
        max_blocks: columns of block tables.
        max_seq_len: longest sequence.
        padding_slot: row of recurrent states for padding sequences.
        all_rows: return the hidden states of all rows, else of at most one row per sequence.
        both_ways: batches have :attr:`~engine.kernels.paged.AttentionMetadata.key_ends`.
        takes_ids: the pass takes the tokens.
        device: device of all tensors.
    """

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        *,
        sizes: list[int],
        width: int,
        dtype: torch.dtype,
        axes: int | None,
        deepstack: int,
        max_sequences: int,
        num_groups: int,
        max_blocks: int,
        max_seq_len: int,
        padding_slot: int,
        all_rows: bool,
        both_ways: bool,
        takes_ids: bool,
        device: torch.device,
    ) -> None:
        self._forward, self._capture = forward, capture
        self._sizes, self._max_seq_len = sizes, max_seq_len
        most = sizes[-1]
        self._embeds = torch.zeros((most, width), dtype=dtype, device=device)
        shape = (most,) if axes is None else (axes, most)
        self._positions = torch.zeros(shape, dtype=torch.int64, device=device)
        # Zero beyond the first tokens; text adds zeros.
        self._deepstack = torch.zeros((deepstack, most, width), dtype=dtype, device=device)
        self._num_added = 0
        self._slot_mapping = torch.full((num_groups, most), -1, dtype=torch.int64, device=device)
        self._key_ends = torch.zeros((most,), dtype=torch.int32, device=device) if both_ways else None
        self._ids = torch.zeros((most,), dtype=torch.int64, device=device) if takes_ids else None
        self._counts = sorted({min(FEW_SEQUENCES, max_sequences), max_sequences})
        tables = (num_groups, max_sequences, max_blocks)
        self._tables = torch.zeros(tables, dtype=torch.int32, device=device)
        self._starts = torch.zeros(max_sequences + 1, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._padding_slot = padding_slot
        self._states = torch.full((max_sequences,), padding_slot, dtype=torch.int64, device=device)
        self.all_rows = all_rows
        self._rows = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        # Leading entries of _rows that may not be zero.
        self._num_rows = 0
        self._replays: dict[tuple[int, int], Replay] = {}

    def rehearse(self) -> None:
        """Run the largest pass and the small ones, which differ in their kernels, without capturing them."""
        for size in (self._sizes[-1], *(size for size in self._sizes[:-1] if size <= TOKEN_STEP)):
            self._work(size, self._counts[-1])()

    def capture_all(self) -> None:
        """Capture every size, for as many sequences as it may hold."""
        for size in reversed(self._sizes):
            for count in reversed(self._counts):
                if count == self._counts[0] or size > self._counts[0]:
                    self._get(size, count)

    def fits(self, tokens: int, sequences: int) -> bool:
        """True if a batch is small enough for :meth:`replay`."""
        return 0 < tokens <= self._sizes[-1] and sequences <= self._counts[-1]

    def replay(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        meta: AttentionMetadata,
        deepstack: torch.Tensor | None,
        rows: torch.Tensor | None,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        """Hidden states ``(R, width)`` of ``rows``, or ``(T, width)`` with ``all_rows``.

        They are a view that the next replay overwrites.
        """
        assert (rows is None) == self.all_rows
        tokens, sequences = embeds.shape[0], meta.seq_lens.shape[0]
        num_rows = 0 if rows is None else rows.shape[0]
        count = next(count for count in self._counts if count >= max(sequences, num_rows))
        replay = self._get(self._sizes[bisect_left(self._sizes, tokens)], count)
        self._embeds[:tokens] = embeds
        self._positions[..., :tokens] = positions
        self._add(deepstack)
        self._slot_mapping[:, :tokens] = meta.slot_mapping
        self._slot_mapping[:, tokens:] = -1
        if self._key_ends is not None and meta.key_ends is not None:
            self._key_ends[:tokens] = meta.key_ends
        if self._ids is not None:
            self._ids[:tokens] = ids
        self._tables[:, :sequences] = meta.block_tables
        self._starts[: sequences + 1] = meta.query_start
        self._starts[sequences + 1 :] = tokens
        self._lengths[:sequences] = meta.seq_lens
        if meta.state_rows is not None:
            self._states[:sequences] = meta.state_rows
            self._states[sequences:] = self._padding_slot
        if rows is None:
            return replay()[:tokens]
        self._rows[:num_rows] = rows
        if self._num_rows > num_rows:
            # A row of a longer pass may be beyond the end of this one.
            self._rows[num_rows : self._num_rows] = 0
        self._num_rows = num_rows
        return replay()[:num_rows]

    def _add(self, deepstack: torch.Tensor | None) -> None:
        """Have the next replay add ``deepstack``, or nothing."""
        added = 0 if deepstack is None else deepstack.shape[1]
        if deepstack is not None:
            self._deepstack[:, :added] = deepstack
        if self._num_added > added:
            self._deepstack[:, added : self._num_added] = 0
        self._num_added = added

    def _get(self, size: int, count: int) -> Replay:
        if (size, count) not in self._replays:
            self._replays[size, count] = self._capture(self._work(size, count))
        return self._replays[size, count]

    def _work(self, size: int, count: int) -> Callable[[], torch.Tensor]:
        # No row may write keys during the capture. Every replay fills all buffers again.
        self._slot_mapping.fill_(-1)
        self._starts.zero_()
        self._rows.zero_()
        self._num_rows = 0
        meta = AttentionMetadata(
            block_tables=self._tables[:, :count],
            query_start=self._starts[: count + 1],
            seq_lens=self._lengths[:count],
            slot_mapping=self._slot_mapping[:, :size],
            max_query_len=size,
            max_seq_len=self._max_seq_len,
            key_ends=None if self._key_ends is None else self._key_ends[:size],
            state_rows=self._states[:count],
            many_sequences=count > FEW_SEQUENCES,
        )
        embeds, positions = self._embeds[:size], self._positions[..., :size]
        deepstack = self._deepstack[:, :size] if len(self._deepstack) else None
        rows = None if self.all_rows else self._rows[:count]
        ids = None if self._ids is None else self._ids[:size]
        return lambda: self._forward(embeds, positions, meta, deepstack, rows, ids)
