"""Captured forward passes of a tower's blocks for small batches, padded to the next captured size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.graphs import Capture, Replay
from engine.transfers import download, staging
from engine.vision.segments import VisionSegments

#: Sizes that are captured, for one segment and for several: all multiples of the step, in tokens. Larger
#: batches keep the device busy for longer than the host needs to launch their kernels.
TOKEN_STEP = 128
MAX_TOKENS = 2048
MAX_SEGMENTS = 4
MAX_WINDOWS = 256

#: Further sizes, for several segments of up to ``MAX_TOKENS`` each: all multiples of the step. They are for a
#: host that is busy with the steps of a language model, too.
CROWD_STEP = 256
CROWD_TOKENS = 6656

#: A part of the blocks: from the previous stage's result, segments and windows to a structure of tensors.
Stage = Callable[[Any, VisionSegments, VisionSegments | None], Any]


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Makes a tower's tokens of a single image's bytes, within a graph.

    Attributes:
        memory: uint8 on the device; an image is written to its front. It holds one from the start.
        tokens: of the memory and a number of tokens ``N``, those of the image ``(N, width)``, padded.
        write: writes pixels to host memory of the size that :attr:`size` gives.
        size: bytes of an image of these pixels in the memory.
        room: bytes of the largest image of a number of tokens.
    """

    memory: torch.Tensor
    tokens: Callable[[torch.Tensor, int], torch.Tensor]
    write: Callable[[np.ndarray, np.ndarray], None]
    size: Callable[[np.ndarray], int]
    room: Callable[[int], int]


class TowerGraphs:
    """Replays a tower's blocks over static tensors. Padding tokens are in no segment.

    Args:
        stages: the parts of the blocks, each in a graph of its own: the device runs the first while the host
            launches the second. The first takes tokens ``(N, width)``, the last returns a list of outputs
            ``(N, width)``.
        capture: see :class:`engine.graphs.Capture`.
        width: of a token.
        angles: columns of the rotary tables; None without rotary embeddings.
        window_len: most tokens of a window; None if the tower has no windows.
        dtype: of the tokens.
        device: of all tensors.
        crowds: capture the sizes up to ``CROWD_TOKENS``, too.
        image: if given, graphs of one segment begin with it.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        capture: Capture,
        *,
        width: int,
        angles: int | None,
        window_len: int | None,
        dtype: torch.dtype,
        device: torch.device,
        crowds: bool = False,
        image: ImageSource | None = None,
    ) -> None:
        self._image = image
        # Graphs of one image begin by copying this memory to the device: enqueuing a copy of its own before
        # the launch takes the host longer than the copy takes.
        self._written = staging((0,), torch.uint8, device) if image is None else download(image.memory)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        self._stages, self._capture, self._window_len = stages, capture, window_len
        self._most = CROWD_TOKENS if crowds else MAX_TOKENS
        self._x = torch.zeros((self._most, width), dtype=dtype, device=device)
        self._cos, self._sin = torch.zeros((2, self._most, angles or 0), device=device)
        self._rotates = angles is not None
        self._bounds = torch.zeros(MAX_SEGMENTS + 1, dtype=torch.int32, device=device)
        self._window_bounds = torch.zeros(MAX_WINDOWS + 1, dtype=torch.int32, device=device)
        self._filled: tuple[VisionSegments, VisionSegments | None] | None = None
        self._replays: dict[tuple[int, int], list[Replay]] = {}

    def rehearse(self, encode: Callable[[], object]) -> None:
        """Run the largest and the smallest sizes and ``encode`` without capturing, to compile all kernels."""
        capture, self._capture = self._capture, lambda work: work
        for size, count in [(self._most, MAX_SEGMENTS), (MAX_TOKENS, MAX_SEGMENTS), (MAX_TOKENS, 1)]:
            self._get(size, count)
        for count in (MAX_SEGMENTS, 1):
            self._get(TOKEN_STEP, count)
        encode()
        self._capture = capture
        self._replays.clear()

    def capture_all(self) -> None:
        """Capture every size."""
        for size in range(self._most, MAX_TOKENS, -CROWD_STEP):
            self._get(size, MAX_SEGMENTS)
        for size in range(MAX_TOKENS, 0, -TOKEN_STEP):
            for count in (MAX_SEGMENTS, 1):
                self._get(size, count)

    def fits(self, x: torch.Tensor, segments: VisionSegments, windows: VisionSegments | None) -> bool:
        """True if a batch is small enough for :meth:`replay`."""
        few_windows = windows is None or len(windows.cu_seqlens) <= MAX_WINDOWS + 1
        few = len(segments.cu_seqlens) <= MAX_SEGMENTS + 1 and few_windows
        return few and 0 < len(x) <= self._most and segments.max_len <= MAX_TOKENS

    def replay(
        self,
        x: torch.Tensor,
        segments: VisionSegments,
        windows: VisionSegments | None,
        pause: Callable[[], None] = lambda: None,
    ) -> list[torch.Tensor]:
        """The last stage's outputs, as views that the next replay overwrites.

        ``pause`` is called between two stages.

        Segments and windows must not change afterwards: if the next replay gets the same objects, it doesn't
        copy them again.
        """
        tokens = len(x)
        count = 1 if len(segments.cu_seqlens) == 2 and self._image is None else MAX_SEGMENTS
        step = TOKEN_STEP if tokens <= MAX_TOKENS else CROWD_STEP
        replays = self._get(-(-tokens // step) * step, count)
        self._x[:tokens] = x
        return self._run(replays, tokens, segments, windows, pause)

    def fits_image(self, tokens: int) -> bool:
        """True if :meth:`replay_image` takes an image of so many tokens."""
        return self._image is not None and 0 < tokens <= MAX_TOKENS

    def replay_image(
        self, pixels: np.ndarray, tokens: int, segments: VisionSegments, pause: Callable[[], None]
    ) -> list[torch.Tensor]:
        """:meth:`replay` for one image that is one segment of ``tokens``, from its pixels on."""
        assert self._image is not None
        replays = self._get(-(-tokens // TOKEN_STEP) * TOKEN_STEP, 1)
        if self._sent is not None:
            # The last image must have left the memory.
            self._sent.synchronize()
        self._image.write(self._written[: self._image.size(pixels)].numpy(), pixels)
        return self._run(replays, tokens, segments, None, pause, written=True)

    def _run(
        self,
        replays: Sequence[Replay],
        tokens: int,
        segments: VisionSegments,
        windows: VisionSegments | None,
        pause: Callable[[], None],
        *,
        written: bool = False,
    ) -> list[torch.Tensor]:
        """With ``written`` the first stage reads the written memory."""
        if self._filled is None or self._filled[0] is not segments or self._filled[1] is not windows:
            # If copying fails half-way, the next replay copies again.
            self._filled = None
            self._copy(segments, windows, tokens)
            self._filled = segments, windows
        outputs = replays[0]()
        if written:
            self._note_sent()
        for replay in replays[1:]:
            pause()
            outputs = replay()
        return [out[:tokens] for out in outputs]

    def _copy(self, segments: VisionSegments, windows: VisionSegments | None, tokens: int) -> None:
        if segments.cos is not None and segments.sin is not None:
            self._cos[:tokens], self._sin[:tokens] = segments.cos, segments.sin
        _fill(self._bounds, segments.cu_seqlens, tokens)
        if windows is not None:
            _fill(self._window_bounds, windows.cu_seqlens, tokens)

    def _get(self, size: int, count: int) -> list[Replay]:
        if (size, count) not in self._replays:
            self._replays[size, count] = self._stage_by_stage(size, count, self._capture)
        return self._replays[size, count]

    def _stage_by_stage(self, size: int, count: int, capture: Capture) -> list[Replay]:
        """Capture each stage on the static results of the previous one."""
        # Capturing runs the stages. Segments of an earlier batch may end beyond this size, and the kernels
        # would read there. Every replay of other segments fills the bounds again.
        self._bounds.zero_()
        self._window_bounds.zero_()
        self._filled = None
        cos, sin = (self._cos[:size], self._sin[:size]) if self._rotates else (None, None)
        longest = min(size, MAX_TOKENS)
        segments, windows = VisionSegments(self._bounds[: count + 1], longest, cos, sin), None
        if self._window_len is not None:
            windows = VisionSegments(self._window_bounds, min(longest, self._window_len), cos, sin)
        stages = list(self._stages)
        if self._image is not None and count == 1:
            stages[0] = partial(self._from_image, self._image, size)
        replays: list[Replay] = []
        given: Any = self._x[:size]
        for stage in stages:
            replays.append(capture(partial(stage, given, segments, windows)))
            given = replays[-1]()
        self._note_sent()
        return replays

    def _note_sent(self) -> None:
        """Note that what is enqueued so far reads the written memory."""
        if self._sent is not None:
            self._sent.record()

    def _from_image(self, image: ImageSource, size: int, _: torch.Tensor, *rest: Any) -> Any:
        """Run the first stage on an image's tokens."""
        room = image.room(size)
        image.memory[:room].copy_(self._written[:room], non_blocking=True)
        return self._stages[0](image.tokens(image.memory, size), *rest)


def _fill(bounds: torch.Tensor, given: torch.Tensor, end: int) -> None:
    """Write ``given`` to the front of ``bounds``; the segments after it are empty."""
    bounds[: len(given)] = given
    bounds[len(given) :] = end
