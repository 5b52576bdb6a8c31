"""Loads quantised checkpoints, and computes what Transformers makes of their dequantised weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from engine import LLM, SamplingParams
from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup
from engine.errors import CheckpointError
from engine.families.load import check_tensors, load_language_model
from engine.families.registry import resolve
from engine.outputs import RequestOutput
from tests.engine.decoding import prefill_logits
from tests.engine.tiny import picture, rewrite_json

CPU = torch.device("cpu")
#: The prompt of :func:`logits` and :func:`reference`.
IDS = torch.arange(3, 33) * 7 % 300 + 10


class Rank(SingleProcessGroup):
    """A rank whose results are not added up."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def load(path: Path, tp: SingleProcessGroup | None = None, **options):
    """Load a checkpoint's language model in float32; ``options`` as of ``load_language_model``."""
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    if options.get("load_format") != "dummy":
        check_tensors(checkpoint, config)
    return load_language_model(checkpoint, config, device=CPU, dtype=torch.float32, tp=tp, **options)


def logits(decoder) -> torch.Tensor:
    """Compute the logits ``(len(IDS), vocabulary)`` of the loaded model."""
    return prefill_logits(decoder, [decoder.embed(IDS)], [torch.arange(len(IDS))])[0]


def reference(path: Path, exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the same logits with Transformers' model and the tensors ``exact``."""
    plain = _plain(path, exact)
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


def answers(path: Path, exact: dict[str, torch.Tensor]) -> list[RequestOutput]:
    """Answer a question about an image with a checkpoint, then with one of the tensors ``exact``."""
    prompt = {
        "prompt": "<|vision_start|><|image_pad|><|vision_end|>describe",
        "multi_modal_data": {"image": picture(40, 32)},
    }
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=2)
    outputs = []
    for folder in (path, _plain(path, exact)):
        llm = LLM(str(folder), max_num_batched_tokens=16, block_size=4, kv_cache_bytes=1 << 20)
        outputs += llm.generate([prompt], params, use_tqdm=False)
    return outputs


def check_outputs_are_split(whole, ranks, matrix: Callable) -> None:
    """Check that ranks have their outputs of a fused matrix; ``matrix`` reads a layer in float32."""
    gate_up = [matrix(decoder.layers[1].mlp.gate_up_proj) for decoder in (whole, *ranks)]
    shards = [part.unflatten(0, (2, -1)) for part in gate_up[1:]]
    assert torch.equal(torch.cat(shards, dim=1).flatten(0, 1), gate_up[0])


def check_inputs_are_split(whole, ranks, matrix: Callable) -> None:
    """Check that ranks have their inputs of a matrix; ``matrix`` as above."""
    down = [matrix(decoder.layers[1].mlp.down_proj) for decoder in (whole, *ranks)]
    assert torch.equal(torch.cat(down[1:], dim=1), down[0])


def refusal(path: Path, quantization_config: object) -> str:
    """The message that refuses a checkpoint for its ``quantization_config``."""
    rewrite_json(path / "config.json", {"quantization_config": quantization_config})
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.param == "quantization_config"
    return caught.value.message


def _plain(path: Path, exact: dict[str, torch.Tensor]) -> Path:
    plain = path.with_name("plain")
    shutil.copytree(path, plain)
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    rewrite_json(plain / "config.json", {"quantization_config": None})
    return plain
