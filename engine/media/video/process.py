"""A process of its own that decodes videos.

Hostile files make decoders use any amount of time and memory, or crash: a process can be killed for it.
Started as a script that imports little of the engine. Standard input is a Unix socket. Each message is a JSON
line, with a file descriptor beside some of them:

=====================================  ====================================================================
request                                answer
=====================================  ====================================================================
``{"open": most frames}`` and a file   ``{"frames", "fps", "size"}``
``{"indices": [...]}``                 ``{}``
``{"take": bytes}``                    ``{"count", "height", "width"}`` and a file of that number of frames:
                                       those that fit, and at least one; count 0 at the end
=====================================  ====================================================================

Any answer may be ``{"error": message}`` instead.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# The engine beside this file, wherever another one is installed.
sys.path.insert(0, str(Path(__file__).parents[3]))

from engine.media.video.container import UnreadableVideo, VideoFile

_LINE = 1 << 20


class Decoder:
    """The video that is open, and the frames that are still to be taken."""

    def __init__(self) -> None:
        self._video: VideoFile | None = None
        self._frames: Iterator[np.ndarray] = iter(())

    def open(self, descriptor: int, most: int) -> dict[str, Any]:
        self.close()
        self._video = VideoFile(os.fdopen(descriptor, "rb"), most)
        info = self._video.info
        return {"frames": info.frames, "fps": info.fps, "size": info.size}

    def choose(self, indices: list[int]) -> dict[str, Any]:
        assert self._video is not None
        self._frames = self._video.frames(indices)
        return {}

    def take(self, limit: int) -> tuple[dict[str, Any], list[int]]:
        taken: list[np.ndarray] = []
        room = limit
        for frame in self._frames:
            if taken and frame.shape != taken[0].shape:
                raise UnreadableVideo("its frames change in size")
            taken.append(frame)
            room -= frame.nbytes
            if room < frame.nbytes:
                break
        if not taken:
            return {"count": 0}, []
        height, width = taken[0].shape[:2]
        descriptor = os.memfd_create("frames")
        with os.fdopen(os.dup(descriptor), "wb") as file:
            for frame in taken:
                file.write(np.ascontiguousarray(frame).data)
        return {"count": len(taken), "height": height, "width": width}, [descriptor]

    def close(self) -> None:
        self._frames = iter(())
        if self._video is not None:
            self._video.close()
        self._video = None


def answer(decoder: Decoder, request: dict[str, Any], files: list[int]) -> tuple[dict[str, Any], list[int]]:
    try:
        if "open" in request:
            return decoder.open(files[0], request["open"]), []
        if "indices" in request:
            return decoder.choose(request["indices"]), []
        return decoder.take(request["take"])
    except UnreadableVideo as error:
        return {"error": str(error)}, []


def main() -> None:
    # Ctrl-C goes to the whole process group; this process ends with its parent's socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = int(sys.argv[1])
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
    decoder, line = Decoder(), b""
    with socket.socket(fileno=sys.stdin.fileno()) as parent:
        while True:
            data, files, _, _ = socket.recv_fds(parent, _LINE, 1)
            if not data:
                return
            line += data
            if not line.endswith(b"\n"):
                assert not files, "a file comes with the end of its line"
                continue
            reply, made = answer(decoder, json.loads(line), files)
            line = b""
            socket.send_fds(parent, [json.dumps(reply).encode() + b"\n"], made)
            for descriptor in made:
                os.close(descriptor)


if __name__ == "__main__":
    main()
