"""Prints the report of a run of many cases: differences as they come, and a table at the end."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from tests.engine.families.drawn.modes import MODES
from tests.engine.families.drawn.refusals import cause_of
from tests.engine.families.drawn.run import PROMPTS, Case, Result

_COMMAND = "python -m tests.engine.families.drawn"


def command(case: Case) -> str:
    """The command line that runs ``case`` again."""
    words = [*_COMMAND.split(), "--family", case.family.name, "--seed", str(case.seed), "-n", "1"]
    if case.modes != tuple(MODES):
        words += ["--modes", *(case.modes or ("alone",))]
    if case.prompts != tuple(range(PROMPTS)):
        words += ["--prompts", *map(str, case.prompts)]
    if case.without:
        words += ["--without", *case.without]
    return shlex.join(words)


def difference(result: Result, simple: Result) -> str:
    """A case that differs, how to run it again, and its simplest form."""
    lines = [f"DIFFERENT {result.case.family.name} seed {result.case.seed}", f"  {command(result.case)}"]
    lines += [f"    {line}" for line in result.differences[:6]]
    if simple is not result:
        lines += [f"  simpler: {command(simple.case)}", f"    {simple.differences[0]}"]
    return "\n".join([*lines, f"  varied: {', '.join(simple.varied) or 'nothing'}"])


def record(result: Result) -> dict[str, Any]:
    """A case's result in plain data: what was compared in which mode, and why some of it wasn't."""
    return {
        "family": result.case.family.name,
        "seed": result.case.seed,
        "status": result.status,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "prompts": result.prompts,
        "outputs": {mode: tally.outputs for mode, tally in result.tallies.items()},
        "tokens": sum(tally.tokens for tally in result.tallies.values()),
        "ties": sum(tally.ties for tally in result.tallies.values()),
        "differences": result.differences,
        "refused": result.refused,
        "skipped": result.skipped,
        "varied": result.varied,
    }


def table(results: Sequence[Result]) -> str:
    """One line per family: cases and outputs that are equal, cases refused or skipped, cases that differ."""
    names = list(dict.fromkeys(result.case.family.name for result in results))
    head = f"{'family':<18}{'cases':>7}{'equal':>7}{'prompts':>9}{'outputs':>9}{'tokens':>9}{'ties':>6}"
    lines = [head + f"{'refused':>9}{'skipped':>9}{'different':>11}"]
    for name in names:
        mine = [result for result in results if result.case.family.name == name]
        statuses = Counter(result.status for result in mine)
        tallies = [tally for result in mine if result.status == "equal" for tally in result.tallies.values()]
        lines.append(
            f"{name:<18}{len(mine):>7}{statuses['equal']:>7}"
            f"{sum(r.prompts for r in mine if r.status == 'equal'):>9}{sum(t.outputs for t in tallies):>9}"
            f"{sum(t.tokens for t in tallies):>9}{sum(t.ties for t in tallies):>6}"
            f"{statuses['refused']:>9}{statuses['skipped']:>9}{statuses['different']:>11}"
        )
    return "\n".join([*lines, *_reasons(results)])


def _reasons(results: Sequence[Result]) -> list[str]:
    """Refusals and what was left out, with how often."""
    refused = Counter(
        (result.case.family.name, cause_of(message) or message)
        for result in results
        for message in result.refused
    )
    skipped = Counter(
        (result.case.family.name, re.sub(r"\d+", "N", reason)[:160])
        for result in results
        for reason in result.skipped
    )
    return [
        *(f"refused {count:>5}  {name}: {why}" for (name, why), count in sorted(refused.items())),
        *(f"left out {count:>4}  {name}: {why}" for (name, why), count in sorted(skipped.items())),
    ]
