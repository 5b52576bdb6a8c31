"""Recorded passes through a tower's blocks for few pictures, padded to the next recorded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from engine.graphs import Recorder, Replay
from engine.vision.segments import VisionSegments

#: Every multiple of the step up to the most tokens is recorded, for one segment and for several. Beyond,
#: launching keeps up with the device.
TOKEN_STEP = 128
MAX_TOKENS = 2048
MAX_SEGMENTS = 4
MAX_WINDOWS = 256

#: Goes on from what the stage before it made, a structure of tensors.
Stage = Callable[[Any, VisionSegments, VisionSegments | None], Any]


class TowerGraphs:
    """Replays a tower's blocks. Tokens beyond the batch's are in no segment.

    Args:
        stages: the first takes tokens ``(N, width)``, segments and windows, the last gives a list of outputs
            ``(N, width)``. Each is launched by itself, and the device begins with the first while the host
            launches the next.
        record: see :class:`engine.graphs.Recorder`.
        width: of tokens.
        angles: columns of the rotary tables; None without rotary.
        window_len: most tokens of a window; None if the tower has no windows.
        dtype: of tokens.
        device: where all that is.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        record: Recorder,
        *,
        width: int,
        angles: int | None,
        window_len: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._stages, self._record, self._window_len = stages, record, window_len
        self._x = torch.zeros((MAX_TOKENS, width), dtype=dtype, device=device)
        self._cos, self._sin = torch.zeros((2, MAX_TOKENS, angles or 0), device=device)
        self._rotates = angles is not None
        self._bounds = torch.zeros(MAX_SEGMENTS + 1, dtype=torch.int32, device=device)
        self._window_bounds = torch.zeros(MAX_WINDOWS + 1, dtype=torch.int32, device=device)
        self._filled: tuple[VisionSegments, VisionSegments | None] | None = None
        self._replays: dict[tuple[int, int], list[Replay]] = {}

    def rehearse(self, encode: Callable[[], object]) -> None:
        """Run the largest and the smallest passes, and ``encode``, which leads here, without recording."""
        record, self._record = self._record, lambda work: work
        for size in (MAX_TOKENS, TOKEN_STEP):
            for count in (MAX_SEGMENTS, 1):
                self._get(size, count)
        encode()
        self._record = record
        self._replays.clear()

    def capture(self) -> None:
        """Record every size."""
        for size in range(MAX_TOKENS, 0, -TOKEN_STEP):
            for count in (MAX_SEGMENTS, 1):
                self._get(size, count)

    def fits(self, x: torch.Tensor, segments: VisionSegments, windows: VisionSegments | None) -> bool:
        """Whether a batch is small enough for :meth:`replay`."""
        few_windows = windows is None or len(windows.cu_seqlens) <= MAX_WINDOWS + 1
        return 0 < len(x) <= MAX_TOKENS and len(segments.cu_seqlens) <= MAX_SEGMENTS + 1 and few_windows

    def replay(
        self, x: torch.Tensor, segments: VisionSegments, windows: VisionSegments | None
    ) -> list[torch.Tensor]:
        """What ``blocks`` gives: views that the next replay overwrites.

        Segments and windows are not to be changed afterwards: those of the replay before, the same objects,
        are in their places already.
        """
        tokens = len(x)
        count = 1 if len(segments.cu_seqlens) == 2 else MAX_SEGMENTS
        replays = self._get(-(-tokens // TOKEN_STEP) * TOKEN_STEP, count)
        self._x[:tokens] = x
        if self._filled is None or self._filled[0] is not segments or self._filled[1] is not windows:
            # Until all is in its place nothing is.
            self._filled = None
            self._place(segments, windows, tokens)
            self._filled = segments, windows
        outputs = [replay() for replay in replays][-1]
        return [out[:tokens] for out in outputs]

    def _place(self, segments: VisionSegments, windows: VisionSegments | None, tokens: int) -> None:
        if segments.cos is not None and segments.sin is not None:
            self._cos[:tokens], self._sin[:tokens] = segments.cos, segments.sin
        _fill(self._bounds, segments.cu_seqlens, tokens)
        if windows is not None:
            _fill(self._window_bounds, windows.cu_seqlens, tokens)

    def _get(self, size: int, count: int) -> list[Replay]:
        if (size, count) not in self._replays:
            self._replays[size, count] = self._stage_by_stage(size, count, self._record)
        return self._replays[size, count]

    def _stage_by_stage(self, size: int, count: int, record: Recorder) -> list[Replay]:
        """Record each stage over what the one before it keeps its results in."""
        cos, sin = (self._cos[:size], self._sin[:size]) if self._rotates else (None, None)
        segments, windows = VisionSegments(self._bounds[: count + 1], size, cos, sin), None
        if self._window_len is not None:
            windows = VisionSegments(self._window_bounds, min(size, self._window_len), cos, sin)
        replays: list[Replay] = []
        given: Any = self._x[:size]
        for stage in self._stages:
            replays.append(record(partial(stage, given, segments, windows)))
            given = replays[-1]()
        return replays


def _fill(bounds: torch.Tensor, given: torch.Tensor, end: int) -> None:
    """Segments beyond the given ones are empty."""
    bounds[: len(given)] = given
    bounds[len(given) :] = end
