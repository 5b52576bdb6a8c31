"""Captured passes of a tower over a few images of one fixed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from engine.graphs import Capture, Replay

#: A part of a pass: from the result of the part before, or from patches, to a structure of tensors.
Stage = Callable[[Any], Any]


class ViewGraphs:
    """A pass over images of one size in stages, replayed where it was captured for so many images.

    Args:
        stages: the parts of the pass. The first takes patches ``(images * patches, patch_dim)``.
        patches: of an image.
        pause: called between two stages.
    """

    def __init__(self, stages: Sequence[Stage], *, patches: int, pause: Callable[[], None]) -> None:
        self._stages, self._patches, self._pause = stages, patches, pause
        self._given: torch.Tensor | None = None
        self._replays: dict[int, list[Replay]] = {}

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """The last stage's result. The next call may overwrite it."""
        images = len(patches) // self._patches
        if self._given is None or images not in self._replays:
            return self._eager(patches)
        self._given[: len(patches)] = patches
        first, *rest = self._replays[images]
        result = first()
        for replay in rest:
            self._pause()
            result = replay()
        return result

    def _eager(self, patches: torch.Tensor) -> Any:
        first, *rest = self._stages
        result = first(patches)
        for stage in rest:
            self._pause()
            result = stage(result)
        return result

    def capture(self, capture: Capture, most: int, patch_dim: int, like: torch.Tensor) -> None:
        """Capture the passes over 1 to ``most`` images.

        Args:
            like: a tensor of the patches' dtype and device.
        """
        given = like.new_zeros(most * self._patches, patch_dim)
        for images in range(most, 0, -1):
            replays: list[Replay] = []
            state: Any = given[: images * self._patches]
            for stage in self._stages:
                replays.append(capture(partial(stage, state)))
                state = replays[-1]()
            self._replays[images] = replays
        self._given = given
