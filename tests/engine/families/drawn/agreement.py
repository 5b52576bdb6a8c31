"""Measures the engine's distance from the float32 reference in another dtype, or on a GPU with its kernels.

Rounding decides between tokens that are nearly as likely, so answers are not equal. Two numbers say how good
they are: the share of tokens that are the reference's likeliest after the same tokens, and the distance of
log-probabilities from the reference's, as they are and as a share of how widely the reference's are spread.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

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


def lost(case: Case) -> Agreement:
    """The result of a case that has ended its process."""
    return Agreement(case, note="CRASH: the process ended", crashed=True)


def _agree(case: Case, draw: Draw, path: Path, found: Agreement) -> None:
    drawn = case.family.make(draw, path)
    options = {"max_model_len": drawn.tokens, **case.options}
    if options.get("device") == "cuda":
        options = {**_ON_A_GPU, **options}
        options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], drawn.together)
    session = Session(draw, drawn, options)
    for number, prompt in enumerate(draw_prompts(draw, drawn.style, max(case.prompts) + 1)):
        if number in case.prompts:
            session.ask(number, prompt)
    llm = session.llm()
    if drawn.vectors:
        for _ in range(2):
            entries = [question.prompt.entry for question in session.questions]
            outputs = llm.embed(entries, pooling="all", use_tqdm=False)
            for question, output in zip(session.questions, outputs, strict=True):
                _measure_vectors(found, question, output)
            llm.check_integrity()
        return
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


def _measure_vectors(found: Agreement, question: Question, output: Any) -> None:
    theirs = question.expected.hidden
    ours = torch.as_tensor(output.token_embeddings).view(-1, theirs.shape[1])
    found.outputs += 1
    found.distances += (ours - theirs).abs().flatten().tolist()
    found.spread += (theirs - theirs.mean()).flatten().tolist()


def _compare(
    found: Agreement, rows: Sequence[dict[int, Any]], tokens: Sequence[Any], table: torch.Tensor
) -> None:
    if not tokens:
        return
    theirs = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    ours = torch.tensor([row[token].logprob for row, token in zip(rows, tokens, strict=True)])
    found.distances += (ours - theirs).abs().tolist()
    found.spread += (theirs - theirs.mean()).tolist()


def record(found: Agreement) -> dict[str, Any]:
    """A case's numbers in plain data: counts and sums, which can be added up over cases."""
    return {
        "family": found.case.family.name,
        "seed": found.case.seed,
        "status": "crashed" if found.crashed else "measured" if found.outputs else "skipped",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "options": dict(found.case.options),
        "outputs": found.outputs,
        "tokens": len(found.same),
        "same": sum(found.same),
        "numbers": len(found.distances),
        "distance": sum(found.distances),
        "greatest": max(found.distances, default=0.0),
        "squares": sum(value * value for value in found.distances),
        "spread": sum(value * value for value in found.spread),
        "note": found.note,
        "seconds": round(found.seconds, 2),
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per family.

    ``relative`` is the length of all distances over the length of the reference's spread.
    """
    lines = [
        f"{'family':<18}{'cases':>6}{'outputs':>9}{'tokens':>8}{'greedy =':>10}"
        f"{'mean dist':>11}{'max dist':>10}{'relative':>10}{'seconds':>9}"
    ]
    for name in dict.fromkeys(one["family"] for one in records):
        mine = [one for one in records if one["family"] == name]
        total = Counter[str]()
        for one in mine:
            total.update({key: value for key, value in one.items() if isinstance(value, int | float)})
        share = f"{100 * total['same'] / total['tokens']:.1f} %" if total["tokens"] else "-"
        lines.append(
            f"{name:<18}{sum(bool(one['outputs']) for one in mine):>6}{total['outputs']:>9}"
            f"{total['tokens']:>8}{share:>10}{total['distance'] / (total['numbers'] or 1):>11.4f}"
            f"{max(one['greatest'] for one in mine):>10.3f}"
            f"{(total['squares'] / (total['spread'] or 1.0)) ** 0.5:>10.4f}{total['seconds']:>9.1f}"
        )
    return "\n".join(
        [*lines, *(f"{one['family']} {one['seed']}: {one['note']}" for one in records if one["note"])]
    )
