"""Throughput and latency of the engine in one process, with dummy weights in the shape of public models.

    python -m benchmarks.offline --shape qwen2-vl-2b [--works w1,w2,w3,w4,w5] [--tensor-parallel-size N]
        [--quantization fp8|int4] [--encoder-quantization fp8] [--requests N] [--json FILE]

Works:
    w1  256 requests or N, each one image of its own and 64 text tokens, 128 tokens out: requests per second
    w2  256 text requests of 512 tokens, 128 out: output tokens per second
    w3  one request alone: PIL image to first token, and time per further token
    w4  64 requests at a context of 1024: decode tokens per second
    w5  512 requests of 64 text tokens, half of them with an image, 64 tokens out: requests per second, the
        most that a server can get from the device

Beside w3 and w4 stands the floor of a decode step: weights, states, keys and values, over the rate of a copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.floors import StepBytes, measured_copy_rate
from benchmarks.pictures import unique_picture
from benchmarks.shapes import SHAPES, write_checkpoint
from engine import LLM, SamplingParams
from engine.kernels.fp8 import FP8


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall time, and the result; the device is idle before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Works:
    """The works on one loaded model.

    Args:
        scale: divides counts and lengths, for machines without a GPU.
        requests: of w1.
    """

    def __init__(self, llm: LLM, shape: str, scale: int, requests: int = 256) -> None:
        self.llm = llm
        self.shape = SHAPES[shape]
        self.scale = scale
        self.requests = requests
        self._seeds = iter(range(10**9))

    def params(self, tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def text_ids(self, count: int) -> list[int]:
        rng = random.Random(next(self._seeds))
        # Special tokens stand at the end of the vocabulary, but for the first few.
        end = min(token for token in self.shape.specials.values() if token > 1000)
        return [rng.randrange(1000, end) for _ in range(count)]

    def picture_prompts(self, count: int) -> list[dict]:
        """Images are drawn beforehand; turning them into model inputs is part of the work."""
        text = "describe " * 8
        prompts = []
        for _ in range(count):
            image = unique_picture(self.shape.picture_size, next(self._seeds))
            prompt = f"{self.shape.picture}{text[: 64 - 8]}{next(self._seeds):08d}"
            prompts.append({"prompt": prompt, "multi_modal_data": {"image": image}})
        return prompts

    def generate(self, prompts: list, tokens: int) -> int:
        outputs = self.llm.generate(prompts, self.params(tokens), use_tqdm=False)
        count = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert count == len(prompts) * tokens, f"{count} tokens where {len(prompts) * tokens} were asked for"
        return count

    def w1(self) -> dict[str, float]:
        count, tokens = self.requests // self.scale, max(2, 128 // self.scale)
        self.generate(self.picture_prompts(8), 4)
        prompts = self.picture_prompts(count)
        seconds, _ = timed(lambda: self.generate(prompts, tokens))
        return {"w1 req/s": count / seconds}

    def w2(self) -> dict[str, float]:
        count, tokens = 256 // self.scale, max(2, 128 // self.scale)
        prompts = [{"prompt_token_ids": self.text_ids(512 // self.scale)} for _ in range(count)]
        seconds, made = timed(lambda: self.generate(prompts, tokens))
        return {"w2 out tok/s": made / seconds}

    def w3(self) -> dict[str, float]:
        first, rest, tokens = [], [], max(4, 128 // self.scale)
        for repeat in range(7):
            prompts = self.picture_prompts(2)
            to_first, _ = timed(lambda p=prompts[:1]: self.generate(p, 1))
            to_all, _ = timed(lambda p=prompts[1:]: self.generate(p, tokens))
            if repeat >= 2:
                first.append(to_first * 1e3)
                rest.append((to_all - to_first) * 1e3 / (tokens - 1))
        return {"w3 first ms": statistics.median(first), "w3 ms/tok": statistics.median(rest)}

    def w4(self) -> dict[str, float]:
        count, context = max(2, 64 // self.scale), 1024 // self.scale
        short, long = 1, max(4, 256 // self.scale)
        prompts = [{"prompt_token_ids": self.text_ids(context)} for _ in range(count)]
        base, _ = timed(lambda: self.generate(prompts, short))
        # The prefixes are cached now: what is left is decoding, plus a step that is timed by itself.
        base, _ = timed(lambda: self.generate(prompts, short))
        total, _ = timed(lambda: self.generate(prompts, long))
        return {"w4 tok/s": count * (long - short) / (total - base)}

    def w5(self) -> dict[str, float]:
        count, tokens = 512 // self.scale, max(2, 64 // self.scale)
        images = self.picture_prompts(count // 2)
        texts = [{"prompt_token_ids": self.text_ids(64)} for _ in images]
        # As a server's queue has them: by turns.
        prompts = [prompt for pair in zip(images, texts, strict=True) for prompt in pair]
        seconds, _ = timed(lambda: self.generate(prompts, tokens))
        return {"w5 req/s": len(prompts) / seconds}

    def profile(self) -> None:
        """Print the operations that take most of a steady decode, and those of an image's prompt."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        prompts = [{"prompt_token_ids": self.text_ids(64)} for _ in range(max(2, 64 // self.scale))]
        quarter = max(2, 64 // self.scale)
        # Twice: each work runs once before it is traced, and nothing may come from the cache then.
        pictures = [self.picture_prompts(quarter) for _ in range(2)]
        texts = [
            [{"prompt_token_ids": self.text_ids(512 // self.scale)} for _ in range(quarter)] for _ in range(2)
        ]
        works = {
            f"decode, {len(prompts)} requests": lambda: self.generate(prompts, 33),
            "decode, 1 request": lambda: self.generate(prompts[:1], 65),
            "one picture": lambda: self.generate(self.picture_prompts(1), 1),
            "w1, a quarter": lambda: self.generate(pictures.pop(), 32),
            "w2, a quarter": lambda: self.generate(texts.pop(), 32),
        }
        for name, work in works.items():
            work()
            with torch.profiler.profile(activities=activities) as profiler:
                seconds, _ = timed(work)
            print(f"== {name}: {seconds * 1e3:.1f} ms")
            order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=16, max_name_column_width=60)
            lines = table.splitlines()
            print("\n".join(line for line in lines if not line.startswith("---")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=sorted(SHAPES))
    parser.add_argument("--works", default="w1,w2,w3,w4", help="see above")
    parser.add_argument("--scale", type=int, default=None, help="divides counts; 16 on a CPU, 1 on a GPU")
    parser.add_argument("--requests", type=int, default=256, help="of w1")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks, each on a GPU of its own")
    parser.add_argument(
        "--quantization",
        choices=["fp8", "int4"],
        help="fp8: round the decoder's matrices to 8-bit floats; int4: a checkpoint of AWQ",
    )
    parser.add_argument("--encoder-quantization", choices=["fp8"], help="the same for the tower's matrices")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--profile", action="store_true", help="also say which kernels a decode step spends")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gpu, ranks = torch.cuda.is_available(), options.tensor_parallel_size
    results: dict[str, Any] = {"shape": options.shape, "ranks": ranks, **versions()}
    if options.quantization:
        results["quantization"] = options.quantization
    if options.encoder_quantization:
        results["encoder"] = options.encoder_quantization
    results["keys"] = options.kv_cache_dtype
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(options.shape, Path(folder))
        if options.quantization == "int4":
            quantise_to_int4(path, 128 if gpu else 32)
        rate = measured_copy_rate() if ranks == 1 else 0.0
        formats = options.quantization, options.encoder_quantization, options.kv_cache_dtype
        seconds, llm = timed(lambda: load(str(path), gpu, ranks, *formats))
        results["load s"] = seconds
        works = Works(llm, options.shape, options.scale or (1 if gpu else 16), options.requests)
        runner = llm._engine.core.runner
        check_formats(getattr(runner, "_own", runner).model, options.quantization)
        if llm._encoder is not None:
            check_formats(llm._encoder._encoder.tower.blocks, options.encoder_quantization, "format")
        if ranks == 1:
            results |= floors(path, options, works, rate)
        results["first answer s"] = seconds + timed(lambda: works.generate(works.picture_prompts(1), 1))[0]
        for name in options.works.split(","):
            results |= getattr(works, name)()
            print({k: v for k, v in results.items() if k.startswith(name)}, flush=True)
        results |= beside_floors(results)
        if options.profile:
            works.profile()
        llm.check_integrity()
    for key, value in results.items():
        print(f"{key:16} {value:10.3f}" if isinstance(value, float) else f"{key:16} {value}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def floors(path: Path, options: argparse.Namespace, works: Works, rate: float) -> dict[str, float]:
    """The least ms per token of w3, and the most tokens per second of w4, by the bytes that a step moves at
    ``rate`` bytes per second."""
    keys = FP8 if options.kv_cache_dtype == "fp8" else torch.bfloat16
    scale, moved = works.scale, StepBytes.of(path, fp8=options.quantization == "fp8", keys=keys)
    (prompt,) = works.llm.generate(works.picture_prompts(1), works.params(1), use_tqdm=False)
    alone = moved.step(1, len(prompt.prompt_token_ids) + 64 // scale)
    count, context = max(2, 64 // scale), 1024 // scale + 128 // scale
    return {
        "copy TB/s": rate / 1e12,
        "active GB": (moved.weights + moved.experts * moved.share) / 1e9,
        "state MB": moved.states / 1e6,
        "floor w3 ms/tok": alone / rate * 1e3,
        "floor w4 tok/s": count * rate / moved.step(count, context),
    }


def beside_floors(results: dict[str, Any]) -> dict[str, float]:
    """How many times the least time a decode step takes, for each work that was run."""
    found = {}
    if "w3 ms/tok" in results and "floor w3 ms/tok" in results:
        found["w3 x floor"] = results["w3 ms/tok"] / results["floor w3 ms/tok"]
    if "w4 tok/s" in results and "floor w4 tok/s" in results:
        found["w4 x floor"] = results["floor w4 tok/s"] / results["w4 tok/s"]
    return found


def quantise_to_int4(path: Path, group: int) -> None:
    """Make the configuration at ``path`` that of AWQ: the decoder's matrices in int4 with zero points."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["visual", "vision_tower", "multi_modal_projector"],
    }
    file.write_text(json.dumps(config))


def load(
    path: str,
    gpu: bool,
    ranks: int = 1,
    quantization: str | None = None,
    encoder: str | None = None,
    keys: str = "auto",
) -> LLM:
    limits: dict[str, Any] = (
        {"max_num_seqs": 256, "max_num_batched_tokens": 8192} if gpu else {"max_num_seqs": 16}
    )
    # The configuration of a checkpoint in int4 says so itself.
    limits["quantization"] = None if quantization == "int4" else quantization
    limits["encoder_quantization"] = encoder
    limits["kv_cache_dtype"] = keys
    return LLM(path, load_format="dummy", max_model_len=4096, tensor_parallel_size=ranks, **limits)


def check_formats(part: torch.nn.Module, quantization: str | None, mark: str = "packed") -> None:
    """Check that a decoder's matrices, or those of a tower's blocks, are in the format that a reading is said
    to be of.

    Args:
        mark: an attribute of the layers that may be quantised, and of no others.

    Raises:
        SystemExit: naming those that are not.
    """
    layers = {name: layer for name, layer in part.named_modules() if hasattr(layer, mark)}
    names = {FP8: "fp8", torch.int16: "int4"}
    found = {name: names.get(layer.weight.dtype) for name, layer in layers.items()}
    wrong = [name for name, kind in found.items() if kind != quantization]
    if wrong or not found:
        raise SystemExit(f"these matrices are not in {quantization or 'the dtype of the model'}: {wrong[:5]}")


def versions() -> dict[str, str]:
    """Return the device and the library versions that the figures were measured with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"device": gpu, "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    main()
