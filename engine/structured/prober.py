"""Tries grammars out in processes that may be killed, before the engine compiles them itself."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import Overloaded, Unavailable
from engine.structured.checks import GrammarRefused
from engine.structured.vocabulary import Vocabulary

LIMITS: dict[str, Any] = {"max_lexer_states": 30_000, "verbose_errors": False}
"""Of llguidance's parser, per grammar; a lexer state takes 1 to 2 kB."""

_PROBE_STEPS = 48
_START_SECONDS = 60.0
_RECYCLE_KIB = 96 << 10


@dataclass(frozen=True, slots=True)
class Probed:
    """A grammar that can be compiled.

    Attributes:
        text: llguidance's form of it.
        lacks_escapes: its JSON strings may hold some escapes, but not all.
    """

    text: str
    lacks_escapes: bool


class GrammarProber:
    """A small pool of helper processes, started when first needed and replaced when they die.

    Args:
        vocabulary: of the masks.
        processes: grammars tried out at once.
        time_limit: seconds for one grammar.
        memory: bytes that one grammar may take.
        queue_limit: seconds to wait for a free process.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        processes: int = 2,
        time_limit: float = 5.0,
        memory: int = 384 << 20,
        queue_limit: float = 30.0,
    ) -> None:
        self._setup = {**vocabulary.as_json(), "limits": LIMITS, "memory": memory}
        self._time_limit, self._queue_limit = time_limit, queue_limit
        # Last in, first out: a second process starts only when two grammars come at once.
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)
        self._count = processes

    def probe(self, kind: str, text: str) -> Probed:
        """A grammar that has compiled and been followed for some tokens.

        Raises:
            GrammarRefused: with a reason.
            Overloaded: all processes are busy with other grammars.
            Unavailable: no helper process can be started.
        """
        try:
            process = self._idle.get(timeout=self._queue_limit)
        except queue.Empty:
            raise Overloaded("Too many grammars are being compiled; try again later.") from None
        try:
            if process is None:
                process = _Process(self._setup)
            job = {"kind": kind, "text": text, "steps": _PROBE_STEPS}
            answer = process.ask(job, self._time_limit)
            if answer is None:
                process.kill()
                process = None
                raise GrammarRefused("it is too complex to compile; make it smaller or simpler")
            if answer.get("rss", 0) > process.baseline_rss + _RECYCLE_KIB:
                process.kill()
                process = None
        finally:
            self._idle.put(process)
        if "error" in answer:
            raise GrammarRefused(answer["error"])
        return Probed(answer["ok"], answer["lacks_escapes"])

    def close(self) -> None:
        """Ends the processes; grammars that are being tried out are waited for."""
        for _ in range(self._count):
            process = self._idle.get()
            if process is not None:
                process.kill()
        for _ in range(self._count):
            self._idle.put(None)


class _Process:
    def __init__(self, setup: dict[str, Any]) -> None:
        script = Path(__file__).with_name("probe_process.py")
        self._popen = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )
        answer = self.ask(setup, _START_SECONDS)
        if answer is None:
            self.kill()
            raise Unavailable("The process that compiles grammars could not be started.")
        self.baseline_rss: int = answer["rss"]

    def ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer; None if the process died or was too slow, and must be killed."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        try:
            self._popen.stdin.write(json.dumps(message).encode() + b"\n")
            self._popen.stdin.flush()
        except OSError:
            return None
        deadline, data = time.monotonic() + seconds, bytearray()
        descriptor = self._popen.stdout.fileno()
        while not data.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([descriptor], [], [], remaining)[0]:
                return None
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return None
            data += piece
        return json.loads(data)

    def kill(self) -> None:
        self._popen.kill()
        self._popen.communicate()
