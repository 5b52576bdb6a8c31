"""Prints the report of a run of many cases: differences as they come, and a table at the end."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
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
        "seconds": round(result.seconds, 2),
    }


def read(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The records in ``files``; of a case that ran several times, the last one."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            one = json.loads(line)
            found[one["family"], one["seed"]] = one
    return list(found.values())


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per family: cases and outputs that are equal, cases refused or skipped, cases that differ."""
    head = f"{'family':<18}{'cases':>7}{'equal':>7}{'prompts':>9}{'outputs':>9}{'tokens':>9}{'ties':>6}"
    lines = [head + f"{'refused':>9}{'skipped':>9}{'different':>11}{'seconds':>9}"]
    for name in dict.fromkeys(one["family"] for one in records):
        mine = [one for one in records if one["family"] == name]
        statuses = Counter(one["status"] for one in mine)
        equal = [one for one in mine if one["status"] == "equal"]
        outputs = sum(sum(one["outputs"].values()) for one in equal)
        lines.append(
            f"{name:<18}{len(mine):>7}{statuses['equal']:>7}"
            f"{sum(one['prompts'] for one in equal):>9}{outputs:>9}"
            f"{sum(one['tokens'] for one in equal):>9}{sum(one['ties'] for one in equal):>6}"
            f"{statuses['refused']:>9}{statuses['skipped']:>9}{statuses['different']:>11}"
            f"{sum(one.get('seconds', 0.0) for one in mine):>9.0f}"
        )
    return "\n".join([*lines, *_reasons(records)])


def _reasons(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Refusals and what was left out, with how often, and each case that differs."""
    refused = Counter(
        (one["family"], cause_of(message) or message) for one in records for message in one["refused"]
    )
    skipped = Counter(
        (one["family"], re.sub(r"\d+", "N", reason)[:160]) for one in records for reason in one["skipped"]
    )
    return [
        *(f"refused {count:>5}  {name}: {why}" for (name, why), count in sorted(refused.items())),
        *(f"left out {count:>4}  {name}: {why}" for (name, why), count in sorted(skipped.items())),
        *(
            f"different {one['family']} {one['seed']}: {one['differences'][0][:200]}"
            for one in records
            if one["status"] == "different"
        ),
    ]
