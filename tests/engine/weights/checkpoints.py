"""Loads quantised checkpoints, and computes what Transformers makes of their dequantised weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup
from engine.families.load import check_tensors, load_language_model
from engine.families.registry import resolve
from tests.engine.decoding import prefill_logits
from tests.engine.tiny import rewrite_json

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
    check_tensors(checkpoint, config)
    return load_language_model(checkpoint, config, device=CPU, dtype=torch.float32, tp=tp, **options)


def logits(decoder) -> torch.Tensor:
    """Compute the logits ``(len(IDS), vocabulary)`` of the loaded model."""
    return prefill_logits(decoder, [decoder.embed(IDS)], [torch.arange(len(IDS))])[0]


def reference(path: Path, exact: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the same logits with Transformers' model and the tensors ``exact``."""
    plain = path.with_name("plain")
    shutil.copytree(path, plain)
    save_file(exact, plain / "model.safetensors", metadata={"format": "pt"})
    rewrite_json(plain / "config.json", {"quantization_config": None})
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.inference_mode():
        return model(IDS[None]).logits[0]
