"""Runs one drawn case: makes the checkpoint, asks the reference, and holds each mode against it."""

from __future__ import annotations

import re
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers

from engine.errors import CheckpointError, ConfigError, InvalidRequest
from tests.engine.families.compare import Tally
from tests.engine.families.drawn.checkpoint import Family, NotAModel, Unavailable, read_json
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.modes import MODES, Session, alone
from tests.engine.families.drawn.prompts import draw_prompts
from tests.engine.families.drawn.refusals import cause_of

PROMPTS = 4
#: What a user may be told; any other exception is a fault of the engine.
_REFUSALS = (CheckpointError, ConfigError, InvalidRequest)


@dataclass(frozen=True)
class Case:
    """One case to run.

    Attributes:
        without: variations that are switched off.
        modes: names in ``MODES`` that are run after each prompt has been asked alone.
        prompts: numbers of the prompts that are asked.
        options: of every engine.
    """

    family: Family
    seed: int
    modes: tuple[str, ...] = tuple(MODES)
    without: tuple[str, ...] = ()
    prompts: tuple[int, ...] = tuple(range(PROMPTS))
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """Results of a case.

    Attributes:
        varied: the variations that the case has.
        prompts: number of prompts that were asked.
        tallies: what each mode has found.
        refused: messages of the engine, where it refuses a checkpoint, a mode or a prompt.
        skipped: why nothing or not everything could be compared.
        seconds: that the case took.
    """

    case: Case
    varied: list[str] = field(default_factory=list)
    prompts: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def outputs(self) -> int:
        return sum(tally.outputs for tally in self.tallies.values())

    @property
    def differences(self) -> list[str]:
        """All differences, and refusals that are not listed, each with the mode that showed it."""
        found = [f"{mode}: {d}" for mode, tally in self.tallies.items() for d in tally.differences]
        return found + [f"refused: {message}" for message in self.refused if cause_of(message) is None]

    @property
    def status(self) -> str:
        """``different``, ``equal``, ``refused`` or ``skipped``: the first that applies."""
        if self.differences:
            return "different"
        if self.outputs:
            return "equal"
        return "refused" if self.refused else "skipped"


def run(case: Case) -> Result:
    """Run ``case`` in a folder of its own."""
    draw = Draw(case.family.name, case.seed, case.without)
    result, started = Result(case), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drawn-") as folder:
        try:
            tally = result.tallies["checkpoint"] = Tally()
            with _Guard(tally, result):
                _run(case, draw, Path(folder), result)
        except (NotAModel, Unavailable) as error:
            result.skipped.append(f"{type(error).__name__}: {error}")
    result.varied, result.seconds = draw.varied, time.monotonic() - started
    return result


def lost(case: Case) -> Result:
    """The result of a case that has ended its process."""
    return Result(case, tallies={"checkpoint": Tally(differences=["crash: the process ended"])})


def _run(case: Case, draw: Draw, path: Path, result: Result) -> None:
    drawn = case.family.make(draw, path)
    (architecture,) = read_json(path / "config.json")["architectures"]
    result.tallies["checkpoint"].same("is declared", architecture in case.family.architectures, True)
    options = {"kv_cache_bytes": 64 << 20, "device": "cpu", "max_num_seqs": 16, **case.options}
    session = Session(draw, drawn, {"max_model_len": drawn.tokens, **options})
    for number, prompt in enumerate(draw_prompts(draw, drawn.style, max(case.prompts) + 1)):
        if number in case.prompts and (reason := session.ask(number, prompt)):
            result.skipped.append(reason)
    tally = result.tallies["alone"] = Tally()
    with _Guard(tally, result):
        for reason in alone(session, tally):
            result.refused.append(reason)
    result.prompts = len(session.questions)
    if not session.questions or (result.refused and not tally.outputs):
        return
    for mode in case.modes:
        tally = result.tallies[mode] = Tally()
        with _Guard(tally, result):
            MODES[mode](session, tally)


class _Guard:
    """Records refusals and crashes inside a mode, so that the run goes on."""

    def __init__(self, tally: Tally, result: Result) -> None:
        self._tally, self._result = tally, result

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, _REFUSALS):
            self._result.refused.append(str(error))
            return True
        if missing := _missing(error):
            raise Unavailable(missing) from error
        if isinstance(error, Exception) and not isinstance(error, NotAModel | Unavailable):
            where = traceback.extract_tb(trace)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            self._tally.differences.append(f"crash: {type(error).__name__}: {str(error)[:200]} ({place})")
            return True
        return False


def _missing(error: BaseException | None) -> str | None:
    """The name in Transformers that a reference needs and the installed release lacks; None if none does."""
    found = re.search(r"module '?transformers\S* has no attribute '?(\w+)", str(error))
    if found is None or not isinstance(error, AttributeError):
        return None
    return f"Transformers {transformers.__version__} has no {found[1]}"


def run_and_simplify(case: Case, as_is: bool = False) -> tuple[Result, Result]:
    """The result of ``case``, and that of a simpler case if it differs.

    Args:
        as_is: look for no simpler case.
    """
    result = run(case)
    return result, result if as_is or result.status != "different" else simplest(result)


def simplest(result: Result) -> Result:
    """A simpler case that differs in the same field: one mode and one prompt, and fewer variations."""
    mode, wanted, prompt = _first(result)
    narrow = replace(
        result.case,
        modes=tuple(name for name in result.case.modes if name == mode),
        prompts=result.case.prompts if prompt is None else (prompt,),
    )
    best = result
    for change in (None, *result.varied):
        case = narrow if change is None else replace(best.case, without=(*best.case.without, change))
        found = run(case)
        if found.differences and wanted in {_first(found)[1]}:
            best = found
    return best


def _first(result: Result) -> tuple[str, str, int | None]:
    """Mode, field and prompt of the first difference."""
    mode, *rest = result.differences[0].split(": ")
    prompt = int(rest.pop(0).removeprefix("prompt ")) if rest[0].startswith("prompt ") else None
    return mode, rest[0], prompt
