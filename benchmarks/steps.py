"""Fewer steps than tokens: answers under a JSON schema, and guesses of next tokens; with dummy weights.

    python -m benchmarks.steps --shape qwen2-vl-7b [--works schema,guesses] [--prompt-lookup 8] [--json FILE]

Works:
    schema   answers of eight fields: names, a date, a number, a truth value, and two words from lists, all of
             lengths that differ. Tokens per second of 1 and of 64 requests; the same with each token sampled;
             without a schema. "share" is that of the tokens that the schema alone decides
    guesses  ms per token of one request alone. Dummy weights copy nothing, so what comes next is decided by
             ``logit_bias``: "repeating" answers are one token again and again, of which every guess holds;
             "random" ones are drawn from few tokens, of which most guesses fail; "free" ones have no bias.
             Without --prompt-lookup nothing is guessed: run both, and compare.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline import timed, versions
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams
from engine.sampling_params import StructuredSpec

#: Fields of an answer. Tokens of the dummy vocabulary are bytes. What stands between two values, with a key
#: of two bytes, takes ten of them; with a key of two words it takes six tokens of a real vocabulary. Values
#: are longer than real ones by about the same factor.
FIELDS: dict[str, dict[str, Any]] = {
    "id": {"type": "string", "pattern": "^[a-z]{6,10}$"},
    "on": {"type": "string", "format": "date"},
    "is": {"type": "boolean"},
    "in": {"enum": ["germany", "france", "spain", "poland", "austria"]},
    "by": {"type": "string", "pattern": "^[a-z]{5,11}$"},
    "no": {"type": "string", "pattern": "^[0-9]{3,7}$"},
    "to": {"type": "string", "pattern": "^[a-z]{4,10}$"},
    "at": {"enum": ["cash", "card", "cheque", "transfer"]},
}
#: Of each measurement on a GPU; the median is taken.
REPEATS = 3
#: Tokens of an answer without a schema; about those of one with it.
_TOKENS = 144


class Works:
    """The works on one loaded model. ``scale`` divides counts and lengths, for machines without a GPU."""

    def __init__(self, llm: LLM, shape: str, scale: int) -> None:
        self.llm = llm
        self.scale = scale
        self._end = min(token for token in SHAPES[shape].specials.values() if token > 300)
        self._rng = random.Random(0)

    def prompts(self, count: int) -> list[dict]:
        length = max(8, 512 // self.scale)
        return [
            {"prompt_token_ids": [self._rng.randrange(256, self._end) for _ in range(length)]}
            for _ in range(count)
        ]

    def rate(self, count: int, **options: Any) -> tuple[float, float, list[list[int]]]:
        """Tokens per second of ``count`` requests together, steps per token of one, and the last answers."""
        steps = self.llm._engine.core.scheduler.stats.batches
        params = SamplingParams(**{"temperature": 0.0, "seed": 0, **options})
        # The grammar is compiled then.
        self.llm.generate(self.prompts(1), params, use_tqdm=False)
        rates = []
        for _ in range(REPEATS if self.scale == 1 else 1):
            prompts = self.prompts(count)
            # The prompts are cached then.
            self.llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
            before = steps.snapshot()["count"]
            each = [replace(params, seed=seed) for seed in range(count)]
            seconds, outputs = timed(lambda p=prompts, e=each: self.llm.generate(p, e, use_tqdm=False))
            taken = steps.snapshot()["count"] - before
            answers = [output.outputs[0].token_ids for output in outputs]
            tokens = sum(map(len, answers))
            rates.append(tokens / seconds)
        return statistics.median(rates), taken * count / tokens, answers

    def schema(self) -> dict[str, float]:
        fields = dict(list(FIELDS.items())[: max(1, 32 // self.scale)])
        schema = {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
        spec = StructuredSpec(kind="json_schema", text=json.dumps(schema))
        kinds: dict[str, dict[str, Any]] = {
            "forced appended": {"structured": spec, "max_tokens": 2 * _TOKENS},
            # With another field that could ban tokens, each token is sampled.
            "each sampled": {
                "structured": spec,
                "suppress_tokens": [self._end - 1],
                "max_tokens": 2 * _TOKENS,
            },
            "no schema": {"ignore_eos": True, "max_tokens": max(8, _TOKENS // self.scale)},
        }
        found = {}
        for count in (1, max(2, 64 // self.scale)):
            for kind, options in kinds.items():
                rate, steps, answers = self.rate(count, temperature=1.0, **options)
                found[f"schema x{count} {kind} tok/s"] = rate
                found[f"schema x{count} {kind} steps/tok"] = steps
                if kind == "forced appended":
                    found[f"schema x{count} forced share"] = self._forced_share(spec, answers)
        return found

    def _forced_share(self, spec: StructuredSpec, answers: Sequence[Sequence[int]]) -> float:
        """The share of the tokens of ``answers`` that the grammar of ``spec`` alone decides."""
        forced = 0
        for tokens in answers:
            matcher, done = self.llm._engine.grammars.compile(spec).matcher(), 0
            while done < len(tokens):
                found = len(matcher.force(len(tokens) - done, ()))
                forced, done = forced + found, done + found
                matcher.accept(tokens[done : done + 1])
                done += 1
        return forced / sum(map(len, answers))

    def guesses(self) -> dict[str, float]:
        few = dict.fromkeys(range(300, 303), 100.0)
        kinds: dict[str, dict[str, Any]] = {
            "repeating": {"logit_bias": {300: 100.0}},
            "random": {"logit_bias": few, "temperature": 1.0},
            "free": {},
        }
        found = {}
        for kind, options in kinds.items():
            rate, steps, _ = self.rate(1, max_tokens=max(16, 256 // self.scale), ignore_eos=True, **options)
            found[f"guesses {kind} ms/tok"] = 1e3 / rate
            found[f"guesses {kind} steps/tok"] = steps
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--works", default="schema,guesses")
    parser.add_argument("--prompt-lookup", type=int, default=0, help="most tokens of a guess")
    parser.add_argument("--scale", type=int, default=None, help="divides counts; 16 on a CPU, 1 on a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"shape": options.shape, "prompt lookup": options.prompt_lookup, **versions()}
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(write_checkpoint(options.shape, Path(folder))),
            load_format="dummy",
            max_model_len=2048,
            max_num_seqs=64,
            speculation={"prompt_lookup": options.prompt_lookup},
        )
        works = Works(llm, options.shape, options.scale or (1 if torch.cuda.is_available() else 16))
        for name in options.works.split(","):
            results |= getattr(works, name)()
        llm.check_integrity()
    for key, value in results.items():
        print(f"{key:40} {value:10.3f}" if isinstance(value, float) else f"{key:40} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
