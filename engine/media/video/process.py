"""The helper process that decodes videos. It imports little of the engine.

=====================================  ====================================================================
message                                answer
=====================================  ====================================================================
``{"memory": bytes}``                  ``{}``; from now on the process takes no more than that
``{"open": most frames}`` and a file   ``{"frames", "fps", "size"}``
``{"indices": [...]}``                 ``{}``
``{"take": bytes}``                    ``{"count", "height", "width"}`` and a file of that number of frames:
                                       those that fit, and at least one; count 0 at the end
=====================================  ====================================================================

Any answer may be ``{"error": reason}`` instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The engine beside this file, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parents[3]))

from engine.helpers.child import guarded, serve
from engine.helpers.files import written
from engine.media.video.container import UnreadableVideo, VideoFile


class Decoder:
    """The video that is open, and the frames that are still to be taken."""

    def __init__(self) -> None:
        self._video: VideoFile | None = None
        self._frames: Iterator[np.ndarray] = iter(())

    def answer(self, message: dict[str, Any], files: list[int]) -> tuple[dict[str, Any], Sequence[int]]:
        """Answer one message of the table above."""
        if "open" in message:
            return self._open(files[0], message["open"]), []
        if "indices" in message:
            return self._choose(message["indices"]), []
        return self._take(message["take"])

    def _open(self, descriptor: int, most: int) -> dict[str, Any]:
        self._close()
        self._video = VideoFile(os.fdopen(descriptor, "rb"), most)
        info = self._video.info
        return {"frames": info.frames, "fps": info.fps, "size": info.size}

    def _choose(self, indices: list[int]) -> dict[str, Any]:
        assert self._video is not None
        self._frames = self._video.frames(indices)
        return {}

    def _take(self, limit: int) -> tuple[dict[str, Any], list[int]]:
        taken: list[np.ndarray] = []
        room = limit
        for frame in self._frames:
            if taken and frame.shape != taken[0].shape:
                raise UnreadableVideo("it has frames that change in size")
            taken.append(frame)
            room -= frame.nbytes
            if room < frame.nbytes:
                break
        if not taken:
            return {"count": 0}, []
        height, width = taken[0].shape[:2]
        return {"count": len(taken), "height": height, "width": width}, [written(taken)]

    def _close(self) -> None:
        self._frames = iter(())
        if self._video is not None:
            self._video.close()
        self._video = None


if __name__ == "__main__":
    serve(guarded(Decoder().answer, UnreadableVideo))
