"""Tensor parallelism with dummy weights, which are the same model on any number of ranks.

Tokens: each model answers texts and images greedily. ``same`` counts the tokens of all answers up to each
one's first that is not the single GPU's. In bfloat16 the sums of several ranks round differently, and random
weights make near ties frequent, so after its prompt each model also reads the single GPU's answers: ``read
same`` counts the tokens that it would have chosen, and ``worst gap`` is the most by which another token's
log-probability was higher. The single GPU's own row shows what its prompt kernels differ from its decode
kernels. Speed: the workloads of :mod:`benchmarks.offline`; ``x`` is the ratio to one GPU. Models that fit
beside each other run at the same time, on GPUs of their own.
"""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.multi_gpu_processes import Settings, answer_of, emit, reporting, start
from benchmarks.offline import Works, load
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams

#: Shapes in order of importance, and whether their speed is measured.
MODELS = {"qwen2-vl-7b": True, "qwen2-vl-2b": False, "llava-1.5-7b": False}
WORKS = ("w1", "w2", "w3", "w4")
#: The share of one GPU's time per token that so many ranks should take.
GOALS = {2: 0.62, 4: 0.42}
#: On a CPU: the workloads, and what their sizes are divided by.
CPU_WORKS, CPU_SCALE = ("w1", "w2"), 128


@dataclass(frozen=True, slots=True)
class Job:
    """A model on ``size`` ranks."""

    shape: str
    size: int
    timed: bool


def run(settings: Settings) -> None:
    models = MODELS if settings.on_gpu else {"tiny": True}
    sizes = [size for size in (1, 2, 4, 8) if size <= settings.gpus]
    jobs = [Job(shape, size, timed) for shape, timed in models.items() for size in sizes]
    alone: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {shape: str(write_checkpoint(shape, Path(folder) / shape)) for shape in models}
        for wave in waves(jobs, settings.gpus if settings.on_gpu else 1):
            _run_together(wave, paths, settings.on_gpu, alone)


def waves(jobs: list[Job], gpus: int) -> list[list[Job]]:
    """``jobs`` in order, those together that have room on ``gpus`` at the same time.

    Timed ones are together with timed ones alone. Without enough GPUs a job is by itself.
    """
    found: list[list[Job]] = []
    for job in jobs:
        last = found[-1] if found else []
        room = sum(other.size for other in last) + job.size <= gpus
        if last and room and last[-1].timed == job.timed:
            last.append(job)
        else:
            found.append([job])
    return found


def _run_together(wave: list[Job], paths: dict[str, str], on_gpu: bool, alone: dict[str, Any]) -> None:
    """Run jobs at the same time, each on GPUs of its own.

    Args:
        alone: what each shape gave on one rank; added to.
    """
    first, running = 0, []
    for job in wave:
        gpus = list(range(first, first + job.size)) if on_gpu else None
        running.append((job, *start(_rank_zero, paths[job.shape], job, gpus)))
        first += job.size
    for job, process, connection in running:
        try:
            own = answer_of(process, connection)
            connection.send(alone[job.shape]["answers"] if job.shape in alone else own)
            found = {"answers": own, **answer_of(process, connection)}
        except RuntimeError as error:
            print(error, flush=True)
            emit(f"{job.shape}, {job.size} ranks", failed=str(error).strip().splitlines()[-1][:200])
            continue
        finally:
            process.join()
        reference = alone.setdefault(job.shape, found)
        emit(f"{job.shape}, {job.size} ranks, tokens", **found["tokens"])
        if job.timed:
            emit(f"{job.shape}, {job.size} ranks, speed", **_with_ratios(found["speed"], reference["speed"]))


def _with_ratios(speed: dict[str, float], alone: dict[str, float]) -> dict[str, Any]:
    if speed is alone:
        return speed
    return {
        key: value
        for name in speed
        for key, value in ((name, speed[name]), (f"x {name}", speed[name] / alone[name]))
    }


def _rank_zero(connection: Connection, path: str, job: Job, gpus: list[int] | None) -> None:
    """Send this model's answers, receive those to be read, and send tokens and speed.

    Args:
        gpus: those to use; None for the CPU.
    """
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(max(gpus) + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
    with reporting(connection):
        llm = load(path, gpus is not None, job.size)
        count, length = (16, 64) if gpus is not None else (4, 8)
        prompts = _prompts(job.shape, path, count)
        greedy = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        own = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False)]
        works = Works(llm, job.shape, 1 if gpus is not None else CPU_SCALE)
        speed: dict[str, float] = {}
        for name in (WORKS if gpus is not None else CPU_WORKS) * job.timed:
            speed |= getattr(works, name)()
        connection.send(own)
        answers = connection.recv()
        tokens = {
            "tokens": count * length,
            "same": sum(map(_same_until, own, answers)),
            **_read(llm, prompts, answers),
        }
        connection.send({"tokens": tokens, "speed": speed})


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
