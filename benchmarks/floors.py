"""The least time of a decode step: the bytes that it must move, over the rate of a large copy."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernels_timing import Clock, copy_rate
from engine.checkpoint.folder import Checkpoint
from engine.distributed.group import SingleProcessGroup
from engine.families.registry import resolve
from engine.layers.build import BuildContext
from engine.layers.decoder import Decoder
from engine.layers.experts import ExpertsMLP
from engine.layers.layer_groups import LayerGroups
from engine.layers.matrix_formats import Formats, Fp8Format
from engine.layers.rotary import Rotary
from engine.runner.kv_storage import block_bytes, state_bytes
from engine.weights.formats import stated_formats


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a decode step reads and writes, in bytes.

    Attributes:
        weights: of the language model without experts and without the table of embeddings, of which a step
            reads a few rows; with it if it is the output table too.
        experts: of all experts.
        share: of the experts that one token uses.
        token: keys and values of a token.
        states: recurrent states of a request, which a step reads and writes.
    """

    weights: int
    experts: int
    share: float
    token: int
    states: int

    @classmethod
    def of(cls, path: Path, *, fp8: bool = False, keys: torch.dtype = torch.bfloat16) -> StepBytes:
        """The bytes of the checkpoint at ``path`` in bfloat16, and in the format that its config.json states.

        Args:
            fp8: the matrices of the language model's layers are rounded to fp8.
            keys: dtype of keys and values.
        """
        checkpoint = Checkpoint.open(str(path))
        config = resolve(checkpoint).parse(checkpoint).decoder
        dtype = torch.bfloat16
        build = BuildContext(torch.device("meta"), dtype, SingleProcessGroup())
        formats = Formats(every=Fp8Format(None, "output")) if fp8 else stated_formats(checkpoint)
        decoder = Decoder(config, replace(build, formats=formats))
        of_experts = [layer.experts for layer in decoder.modules() if isinstance(layer, ExpertsMLP)]
        experts = sum(_bytes(layer) for layer in of_experts)
        rotary = sum(_bytes(layer) for layer in decoder.modules() if isinstance(layer, Rotary))
        table = 0 if config.tie_word_embeddings else _bytes(decoder.embed_tokens)
        router = None if config.experts is None else config.experts.router
        return cls(
            weights=_bytes(decoder) - experts - rotary - table,
            experts=experts,
            share=0.0 if router is None else router.top_k / router.num_experts,
            token=block_bytes(LayerGroups.single(config), 1, keys),
            states=state_bytes(config, dtype),
        )

    def step(self, requests: int, context: int) -> float:
        """Bytes of a step of ``requests`` tokens, each at a context of ``context`` tokens.

        The experts counted are those that tokens use on average if they choose independently.
        """
        experts = self.experts * (1 - (1 - self.share) ** requests)
        return self.weights + experts + requests * (context * self.token + 2 * self.states)


def measured_copy_rate() -> float:
    """Bytes per second, read and written together, of a copy: of 4 GiB on a GPU, of 4 MiB elsewhere.

    On a GPU a process of its own measures it: an engine leaves no memory for it, and starts without a CUDA
    context.
    """
    if not torch.cuda.is_available():
        return _copy_rate()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_copy_rate)


def _copy_rate() -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return copy_rate(Clock(device, 0.2), 4 << (30 if device.type == "cuda" else 20))


def _bytes(module: torch.nn.Module) -> int:
    """Bytes of a module's tensors; those of weights in 4 bits, which are not read yet, as a file has them."""
    tensors = [*module.parameters(), *module.buffers()]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for name, layer in module.named_modules():
        if getattr(layer, "packed", None):
            slots = layer.weight_slots(f"{name}.", ())
            targets = [
                target for slot in slots for _, target in slot.copies if not slot.source.endswith("bias")
            ]
            stored += sum(target.shape.numel() * target.dtype.itemsize for target in targets)
    return stored
