"""Tries grammars out in processes that may be killed, before the engine compiles them itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.helpers.pool import Helper, HelperPool
from engine.structured.checks import GrammarRefused
from engine.structured.vocabulary import Vocabulary

LIMITS: dict[str, Any] = {"max_lexer_states": 30_000, "verbose_errors": False}
"""Of llguidance's parser, per grammar; a lexer state takes 1 to 2 kB."""

_PROBE_STEPS = 48
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
        setup = {**vocabulary.as_json(), "limits": LIMITS, "memory": memory}
        self._time_limit = time_limit
        self._pool = HelperPool(
            partial(_start, setup),
            processes,
            busy="Too many grammars are being compiled; try again later.",
            queue_limit=queue_limit,
        )

    def probe(self, kind: str, text: str) -> Probed:
        """A grammar that has compiled and been followed for some tokens.

        Raises:
            GrammarRefused: with a reason.
            Overloaded: all processes are busy with other grammars.
            Unavailable: no helper process can be started.
        """
        with self._pool.helper() as helper:
            found = helper.ask({"kind": kind, "text": text, "steps": _PROBE_STEPS}, self._time_limit)
            if found is None:
                raise GrammarRefused("it is too complex to compile; make it smaller or simpler")
            answer, _ = found
            if answer.get("rss", 0) > helper.started["rss"] + _RECYCLE_KIB:
                helper.kill()
        if "error" in answer:
            raise GrammarRefused(answer["error"])
        return Probed(answer["ok"], answer["lacks_escapes"])

    def close(self) -> None:
        """End the processes; grammars that are being tried out are waited for."""
        self._pool.close()


def _start(setup: dict[str, Any]) -> Helper:
    script = Path(__file__).with_name("probe_process.py")
    return Helper(script, setup, "compiles grammars", {"RAYON_NUM_THREADS": "1"})
