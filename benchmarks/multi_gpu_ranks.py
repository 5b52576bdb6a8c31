"""Tensor parallelism with dummy weights, which are the same model on any number of ranks.

Tokens: each model answers texts and images greedily. ``same`` counts the tokens of all answers up to each
one's first that is not the single GPU's. In bfloat16 the sums of several ranks round differently, and random
weights make near ties frequent, so after its prompt each model also reads the single GPU's answers: ``read
same`` counts the tokens that it would have chosen, and ``worst gap`` is the most by which another token's
log-probability was higher. The single GPU's own row shows what its prompt kernels differ from its decode
kernels. Speed: the workloads of :mod:`benchmarks.offline`; ``x`` is the ratio to one GPU.
"""

from __future__ import annotations

import random
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.multi_gpu_processes import Settings, apart, emit
from benchmarks.offline import Works, load
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams

#: Shapes in order of importance, and whether their speed is measured.
MODELS = {"qwen2-vl-7b": True, "qwen2-vl-2b": False, "llava-1.5-7b": False}
WORKS = ("w1", "w2", "w3", "w4")
#: On a CPU: the workloads, and what their sizes are divided by.
CPU_WORKS, CPU_SCALE = ("w1", "w2"), 128


def run(settings: Settings) -> None:
    models = MODELS if settings.on_gpu else {"tiny": True}
    sizes = [size for size in (1, 2, 4, 8) if size <= settings.gpus]
    for shape, timed in models.items():
        with tempfile.TemporaryDirectory() as folder:
            path = str(write_checkpoint(shape, Path(folder)))
            alone: dict[str, Any] = {}
            for size in sizes:
                try:
                    found = apart(_measure, shape, path, size, timed, settings.on_gpu, alone.get("answers"))
                except RuntimeError as error:
                    print(error, flush=True)
                    emit(f"{shape}, {size} ranks", failed=str(error).strip().splitlines()[-1][:200])
                    continue
                alone = alone or found
                emit(f"{shape}, {size} ranks, tokens", **found["tokens"])
                if timed:
                    emit(f"{shape}, {size} ranks, speed", **_with_ratios(found["speed"], alone["speed"]))


def _with_ratios(speed: dict[str, float], alone: dict[str, float]) -> dict[str, Any]:
    if speed is alone:
        return speed
    return {
        key: value
        for name in speed
        for key, value in ((name, speed[name]), (f"x {name}", speed[name] / alone[name]))
    }


def _measure(
    shape: str, path: str, size: int, timed: bool, on_gpu: bool, answers: list[list[int]] | None
) -> dict[str, Any]:
    """Tokens and speed on ``size`` ranks.

    Args:
        answers: those of one rank; this model's own if None.
    """
    llm = load(path, on_gpu, size)
    count, length = (16, 64) if on_gpu else (4, 8)
    prompts = _prompts(shape, path, count)
    greedy = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    own = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]
    answers = answers or own
    tokens: dict[str, Any] = {
        "tokens": count * length,
        "same": sum(map(_same_until, own, answers)),
        **_read(llm, prompts, answers),
    }
    works = Works(llm, shape, 1 if on_gpu else CPU_SCALE)
    speed: dict[str, float] = {}
    for name in (WORKS if on_gpu else CPU_WORKS) * timed:
        speed |= getattr(works, name)()
    return {"answers": own, "tokens": tokens, "speed": speed}


def _prompts(shape: str, path: str, count: int) -> list[dict[str, Any]]:
    """Texts of different lengths, and one image in every fourth prompt."""
    tokenizer = Tokenizer.from_file(f"{path}/tokenizer.json")
    picture, side = SHAPES[shape].picture, SHAPES[shape].picture_size
    rng, prompts = random.Random(0), []
    for index in range(count):
        words = " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(8, 40)))
        shown = index % 4 == 3
        ids = tokenizer.encode(picture * shown + words, add_special_tokens=False).ids
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if shown:
            prompt["multi_modal_data"] = {"image": unique_picture(side, index)}
        prompts.append(prompt)
    return prompts


def _same_until(own: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, other, strict=True)))


def _read(llm: LLM, prompts: list[dict[str, Any]], answers: list[list[int]]) -> dict[str, Any]:
    """How the model ranks the tokens of ``answers`` as it reads them after their prompts."""
    longer = [
        {**prompt, "prompt_token_ids": prompt["prompt_token_ids"] + answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    same, gaps = 0, [0.0]
    for output, answer in zip(llm.generate(longer, params, use_tqdm=False), answers, strict=True):
        assert output.prompt_logprobs is not None
        for token, found in zip(answer, output.prompt_logprobs[-len(answer) :], strict=True):
            assert found is not None
            gap = max(entry.logprob for entry in found.values()) - found[token].logprob
            same += gap == 0.0
            gaps.append(gap)
    return {"read same": same, "worst gap": max(gaps)}
