"""Measures the engine's distance from the float32 reference in another dtype, or on a GPU with its kernels.

Rounding decides between tokens that are nearly as likely, so answers are not equal. Two numbers say how good
they are: the share of tokens that are the reference's likeliest after the same tokens, and the distance of
log-probabilities from the reference's, as they are and as a share of how widely the reference's are spread.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import SamplingParams
from engine.errors import CheckpointError, ConfigError, InvalidRequest
from tests.engine.families.drawn.checkpoint import NotAModel, Unavailable
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.modes import Question, Session
from tests.engine.families.drawn.prompts import draw_prompts
from tests.engine.families.drawn.run import Case

#: Few sizes are captured, and nothing has to be measured.
_ON_A_GPU = {
    "num_kv_blocks": 400,
    "block_size": 16,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "gpu_memory_utilization": 0.5,
}


@dataclass
class Agreement:
    """Numbers of one case.

    Attributes:
        same: per token whether it is the reference's likeliest one.
        distances: per log-probability, how far it is from the reference's.
        spread: per log-probability, how far the reference's is from its mean.
        note: why there is nothing.
        crashed: an exception is the reason, other than a refusal.
    """

    case: Case
    outputs: int = 0
    same: list[bool] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    note: str = ""
    crashed: bool = False
    seconds: float = 0.0

    @property
    def relative(self) -> float:
        """Length of all distances over the length of the reference's spread."""
        return _length(self.distances) / (_length(self.spread) or 1.0)


def agree(case: Case) -> Agreement:
    """Run ``case``: all prompts in one call, whole prompts first, then from the cache."""
    found, started = Agreement(case), time.monotonic()
    draw = Draw(case.family.name, case.seed, case.without, coarse=True)
    with tempfile.TemporaryDirectory(prefix="drawn-") as folder:
        try:
            _agree(case, draw, Path(folder), found)
        except (NotAModel, Unavailable, CheckpointError, ConfigError, InvalidRequest) as error:
            found.note = f"{type(error).__name__}: {error}"
        except Exception as error:
            # One line of a long run's table; the others go on.
            found.note, found.crashed = f"CRASH {type(error).__name__}: {str(error)[:300]}", True
    found.seconds = time.monotonic() - started
    return found


def _agree(case: Case, draw: Draw, path: Path, found: Agreement) -> None:
    drawn = case.family.make(draw, path)
    options = {"max_model_len": drawn.tokens, **case.options}
    if options.get("device") == "cuda":
        options = {**_ON_A_GPU, **options}
    session = Session(draw, drawn, options)
    for number, prompt in enumerate(draw_prompts(draw, drawn.style, max(case.prompts) + 1)):
        if number in case.prompts:
            session.ask(number, prompt)
    llm = session.llm()
    for prompt_logprobs in (0, None, None):
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=question.expected.steps,
                ignore_eos=True,
                logprobs=0,
                prompt_logprobs=prompt_logprobs,
            )
            for question in session.questions
        ]
        entries = [question.prompt.entry for question in session.questions]
        outputs = llm.generate(entries, params, use_tqdm=False)
        for question, output in zip(session.questions, outputs, strict=True):
            _measure(found, question, output)
        llm.check_integrity()


def _measure(found: Agreement, question: Question, output: Any) -> None:
    expected = question.expected
    (completion,) = output.outputs
    tokens = completion.token_ids
    table = expected.table(tokens)
    found.outputs += 1
    found.same += (table.argmax(-1) == torch.tensor(tokens)).tolist()
    _compare(found, completion.logprobs, tokens, table)
    if output.prompt_logprobs is not None:
        known = [i for i, token in enumerate(expected.ids[1:]) if token is not None]
        rows = [output.prompt_logprobs[1:][i] for i in known]
        _compare(found, rows, [expected.ids[1:][i] for i in known], expected.prompt_table[:-1][known])


def _compare(
    found: Agreement, rows: Sequence[dict[int, Any]], tokens: Sequence[Any], table: torch.Tensor
) -> None:
    if not tokens:
        return
    theirs = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    ours = torch.tensor([row[token].logprob for row, token in zip(rows, tokens, strict=True)])
    found.distances += (ours - theirs).abs().tolist()
    found.spread += (theirs - theirs.mean()).tolist()


def _length(values: Sequence[float]) -> float:
    return sum(value * value for value in values) ** 0.5


def table(found: Sequence[Agreement]) -> str:
    """One line per family."""
    lines = [
        f"{'family':<18}{'cases':>6}{'outputs':>9}{'tokens':>8}{'greedy =':>10}"
        f"{'mean dist':>11}{'max dist':>10}{'relative':>10}{'seconds':>9}"
    ]
    for name in dict.fromkeys(one.case.family.name for one in found):
        mine = [one for one in found if one.case.family.name == name]
        same = [value for one in mine for value in one.same]
        distances = [value for one in mine for value in one.distances] or [0.0]
        whole = Agreement(mine[0].case, distances=distances, spread=[v for one in mine for v in one.spread])
        share = f"{100 * sum(same) / len(same):.1f} %" if same else "-"
        lines.append(
            f"{name:<18}{sum(bool(one.outputs) for one in mine):>6}{sum(one.outputs for one in mine):>9}"
            f"{len(same):>8}{share:>10}{sum(distances) / len(distances):>11.4f}{max(distances):>10.3f}"
            f"{whole.relative:>10.4f}{sum(one.seconds for one in mine):>9.1f}"
        )
    notes = dict.fromkeys(f"{one.case.family.name} {one.case.seed}: {one.note}" for one in found if one.note)
    return "\n".join([*lines, *notes])
