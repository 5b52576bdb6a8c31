"""Configurations of public models, for the table of sizes in k8s/README.md."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SHAPES
from benchmarks.shapes_qwen3 import QWEN3, QWEN3_5_TEXT, QWEN3_TEXT, QWEN3_VISION
from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup
from engine.families.registry import resolve
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from engine.layers.layer_groups import LayerGroups
from engine.layers.matrix_formats import Formats, Fp8Format
from engine.runner.kv_storage import block_bytes, state_bytes

_QWEN2_VL = SHAPES["qwen2-vl-7b"].config
#: config.json of each model.
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2-VL-2B": SHAPES["qwen2-vl-2b"].config,
    "Qwen2-VL-7B": _QWEN2_VL,
    "Qwen2-VL-72B": {
        **_QWEN2_VL,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
        "vision_config": {**_QWEN2_VL["vision_config"], "hidden_size": 8192},
    },
    "LLaVA-1.5-7B": SHAPES["llava-1.5-7b"].config,
    "Qwen3-VL-8B": {
        **QWEN3,
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            **QWEN3_TEXT,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision_config": {**QWEN3_VISION, "out_hidden_size": 4096},
    },
    "Qwen3-VL-30B-A3B": SHAPES["qwen3-vl-30b-a3b"].config,
    "Qwen3.5-9B": {
        **QWEN3,
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {**QWEN3_5_TEXT, "hidden_size": 4096, "intermediate_size": 12288},
        "vision_config": {**QWEN3_VISION, "out_hidden_size": 4096, "deepstack_visual_indexes": []},
    },
}


@dataclass(frozen=True, slots=True)
class Size:
    """The memory that a model takes, in bytes.

    Attributes:
        language: weights of the language model.
        vision: weights of the vision part.
        token: keys and values of a token.
        states: recurrent states of a running request.
        layers, kv_heads, head_dim: what ``token`` follows from; layers with attention only.
    """

    language: int
    vision: int
    token: int
    states: int
    layers: int
    kv_heads: int
    head_dim: int


def measure(name: str, folder: Path, fp8: bool = False) -> Size:
    """The size in bfloat16 of the model ``name``, of the modules that the engine builds for it.

    Args:
        folder: for its configuration.
        fp8: the matrices of the language model's layers in fp8.
    """
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    checkpoint = Checkpoint.open(str(folder))
    family = resolve(checkpoint)
    model = family.parse(checkpoint)
    build = BuildContext(torch.device("meta"), torch.bfloat16, SingleProcessGroup())
    formats = Formats(every=Fp8Format(None, "output")) if fp8 else None
    decoder, encoder = (
        Decoder(model.decoder, replace(build, formats=formats)),
        family.build_encoder(model, build),
    )
    assert isinstance(encoder, torch.nn.Module)
    groups = LayerGroups.single(model.decoder)
    return Size(
        language=_bytes(decoder),
        vision=_bytes(encoder),
        token=block_bytes(groups, 1, torch.bfloat16),
        states=state_bytes(model.decoder, torch.bfloat16),
        layers=groups.size,
        kv_heads=model.decoder.num_kv_heads,
        head_dim=model.decoder.head_dim,
    )


def _bytes(module: torch.nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
