"""Captured forward passes over few tokens, so that short prompts don't wait for their kernels' launches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.graphs import Capture, Replay
from engine.kernels.paged import AttentionMetadata
from engine.kernels.step_inputs import StepInputs

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


class MediaRows(NamedTuple):
    """Rows of a step that stand for media.

    Attributes:
        places: int64 ``(E,)``, the rows.
        embeds: ``(E, width)``, in place of the embeddings of tokens.
        deepstack: ``(deepstack, E, width)``, added to the hidden states after some layers.
    """

    places: torch.Tensor
    embeds: torch.Tensor
    deepstack: torch.Tensor


Forward = Callable[[StepInputs, AttentionMetadata, torch.Tensor, torch.Tensor | None], torch.Tensor]


class ForwardGraphs:
    """Replays the decoder's forward pass over prompt chunks and decodes, padded to the next captured size.

    Padding rows write no keys and belong to no sequence; padding sequences have no tokens.

    Args:
        gather: fills the inputs of a pass from the arrays of the step.
        forward: inputs, metadata of the same tensors, the embedding rows of media ``(T, width)`` and what is
            added after some layers ``(deepstack, T, width)`` or None, to the hidden states of the
            sampling rows ``(R, width)``, or of all rows ``(T, width)``.
        capture: see :class:`engine.graphs.Capture`.
        sizes: numbers of tokens to capture, ascending.
        inputs: room for the inputs of the largest pass.
        step: int64, the arrays of the step, whose counts are zero until it is filled.
        width: of embeddings and hidden states.
        dtype: of embeddings and hidden states.
        deepstack: layers after which something is added.
        max_seq_len: longest sequence.
        all_rows: return the hidden states of all rows, else of at most one row per sequence.
        both_ways: batches have :attr:`~engine.kernels.paged.AttentionMetadata.key_ends`.
        gaps: they have :attr:`~engine.kernels.paged.AttentionMetadata.gaps`.

    Attributes:
        hidden: ``(sequences, width)``, the hidden states of the sampling rows of the last pass.
    """

    def __init__(
        self,
        gather: Callable[[StepInputs], None],
        forward: Forward,
        capture: Capture,
        *,
        sizes: list[int],
        inputs: StepInputs,
        step: torch.Tensor,
        width: int,
        dtype: torch.dtype,
        deepstack: int,
        max_seq_len: int,
        all_rows: bool,
        both_ways: bool,
        gaps: bool,
    ) -> None:
        self._gather, self._forward, self._capture = gather, forward, capture
        self._sizes, self._max_seq_len = sizes, max_seq_len
        self._inputs, self._step = inputs, step
        most, sequences, device = sizes[-1], len(inputs.seq_lens), step.device
        self._media = torch.zeros((most, width), dtype=dtype, device=device)
        # Zero beyond the first tokens; text adds zeros.
        self._deepstack = torch.zeros((deepstack, most, width), dtype=dtype, device=device)
        self._num_added = 0
        self._counts = sorted({min(FEW_SEQUENCES, sequences), sequences})
        self.all_rows, self._both_ways, self._gaps = all_rows, both_ways, gaps
        self.hidden = torch.zeros((sequences, width), dtype=dtype, device=device)
        self._replays: dict[tuple[int, int], Replay] = {}

    @property
    def rehearsed_sizes(self) -> list[int]:
        """The largest size, and the small ones, which differ in their kernels."""
        return [self._sizes[-1], *(size for size in self._sizes[:-1] if size <= TOKEN_STEP)]

    def rehearse(self) -> None:
        """Run the passes of :attr:`rehearsed_sizes` without capturing them."""
        for size in self.rehearsed_sizes:
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

    def replay(self, tokens: int, sequences: int, media: MediaRows | None) -> torch.Tensor | None:
        """Run the step whose arrays the device has; its hidden states are in :attr:`hidden` afterwards.

        Args:
            tokens: rows of the step.
            sequences: its sequences, or rows that sample, whichever are more.
            media: what stands in place of tokens; None for none.

        Returns:
            With ``all_rows`` all hidden states ``(T, width)``, a view that the next replay overwrites.
        """
        count = next(count for count in self._counts if count >= sequences)
        replay = self._get(self._sizes[bisect_left(self._sizes, tokens)], count)
        if self._num_added:
            self._deepstack[:, : self._num_added] = 0
            self._num_added = 0
        if media is not None:
            self._media.index_copy_(0, media.places, media.embeds)
            if len(media.deepstack):
                self._deepstack.index_copy_(1, media.places, media.deepstack)
                self._num_added = tokens
        hidden = replay()
        return hidden[:tokens] if self.all_rows else None

    def _get(self, size: int, count: int) -> Replay:
        if (size, count) not in self._replays:
            # The capture runs a step without any rows: none may write keys.
            saved = self._step.clone()
            self._step.zero_()
            self._replays[size, count] = self._capture(self._work(size, count))
            self._step.copy_(saved)
        return self._replays[size, count]

    def _work(self, size: int, count: int) -> Callable[[], torch.Tensor]:
        inputs = self._inputs.front(size, count)
        meta = inputs.metadata(
            max_query_len=size,
            max_seq_len=self._max_seq_len,
            both_ways=self._both_ways,
            gaps=self._gaps,
            many_sequences=count > FEW_SEQUENCES,
        )
        media = self._media[:size]
        deepstack = self._deepstack[:, :size] if len(self._deepstack) else None

        def work() -> torch.Tensor:
            self._gather(inputs)
            hidden = self._forward(inputs, meta, media, deepstack)
            return hidden if self.all_rows else self.hidden[:count].copy_(hidden)

        return work
