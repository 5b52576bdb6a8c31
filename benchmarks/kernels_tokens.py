"""Cases of memory-bound kernels: norms, rotation, gates, cache writes, state and sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.kernels_timing import Case, Problem, Work, dtype_on
from engine.kernels.act_mul import act_mul, act_mul_reference
from engine.kernels.decode_state import DecodeInputs, gather_decode_inputs, gather_decode_inputs_reference
from engine.kernels.gumbel import gumbel_argmax, gumbel_argmax_reference
from engine.kernels.kv_write import rotary_kv_write, rotary_kv_write_reference
from engine.kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from engine.kernels.paged import KVCache
from engine.kernels.patchify import patchify, patchify_reference
from engine.kernels.quick_gelu import quick_gelu, quick_gelu_reference
from engine.kernels.rms_norm import rms_norm, rms_norm_reference
from engine.kernels.rotary import RotaryTable, rotary, rotary_reference
from engine.kernels.shard_rows import shard_rows, shard_rows_reference
from engine.kernels.sigmoid_gate import sigmoid_gate, sigmoid_gate_reference
from engine.kernels.step_inputs import (
    HEADER,
    StepInputs,
    StepLayout,
    StepState,
    gather_step_inputs,
    gather_step_inputs_reference,
)
from engine.kernels.truncation import truncation_threshold, truncation_threshold_reference

BLOCK = 16
#: (tokens, hidden size)
NORM = [(1, 1536), (64, 1536), (8192, 1536), (8192, 4096)]
TINY_NORM = [(3, 48)]
#: (tokens, query heads, KV heads, head size, M-RoPE sections)
ROTARY = [(tokens, 12, 2, 128, section) for tokens in (64, 8192) for section in (None, (16, 24, 24))]
TINY_ROTARY = [(3, 4, 2, 16, section) for section in (None, (2, 3, 3))]
#: (tokens, intermediate size)
ACT = [(1, 8960), (64, 8960), (8192, 8960)]
TINY_ACT = [(3, 40)]
#: Tokens, heads and their size: those of Qwen3.5-4B.
GATE, TINY_GATE = ((1, 16, 256), (2048, 16, 256)), ((3, 2, 8),)
#: (patches, width of the tower): Qwen2-VL with one image and with sixteen
VISION = [(1600, 1280), (25600, 1280)]
TINY_VISION = [(3, 24)]
#: (tokens, query heads, KV heads, head size)
WRITE = [(1, 12, 2, 128), (64, 12, 2, 128), (8192, 12, 2, 128), (8192, 32, 8, 128)]
TINY_WRITE = [(5, 4, 2, 16)]
#: (rows, vocabulary)
SAMPLING = [(rows, 151936) for rows in (1, 64, 256)]
TINY_SAMPLING = [(3, 1000)]
#: (request slots, blocks of a table)
STATE = [(1, 256), (64, 256)]
TINY_STATE = [(3, 5)]
#: (running answers, tokens of a prompt, blocks of a table)
STEP = [(1, 40, 256), (64, 464, 256), (256, 2048, 256)]
TINY_STEP = [(3, 20, 5)]


def cases(device: torch.device, tiny: bool) -> Iterator[Case]:
    for tokens, size in TINY_NORM if tiny else NORM:
        for residual in (False, True):
            label = f"{tokens}x{size}" + (" with residual" if residual else "")
            yield Case("rms_norm", label, partial(norm, device, tokens, size, residual))
    for sizes in TINY_ROTARY if tiny else ROTARY:
        tokens, heads, kv_heads, dim, section = sizes
        label = f"{tokens}, heads {heads}/{kv_heads}, D {dim}, {'M-RoPE' if section else '1-D'}"
        yield Case("rotary", label, partial(rotation, device, *sizes))
    for sizes in TINY_ACT if tiny else ACT:
        yield Case("act_mul", "{}x{}".format(*sizes), partial(gate, device, *sizes))
    for sizes in TINY_GATE if tiny else GATE:
        label = "{} tokens, {} heads, D {}".format(*sizes)
        yield Case("sigmoid_gate", label, partial(output_gate, device, *sizes))
    for tokens, size in TINY_VISION if tiny else VISION:
        yield Case("layer_norm", f"{tokens}x{size} with residual", partial(layer_norm, device, tokens, size))
        yield Case("quick_gelu", f"{tokens}x{4 * size}", partial(tower_gelu, device, tokens, 4 * size))
    for side in (56,) if tiny else (560, 1120):
        yield Case("patchify", f"{side}x{side}", partial(patches, device, side))
    for sizes in TINY_WRITE if tiny else WRITE:
        yield Case("kv_write", "{}, heads {}/{}, D {}".format(*sizes), partial(write, device, *sizes))
    for tokens, width in ((5, 24),) if tiny else ((64, 2048), (8192, 2048)):
        yield Case("shard_rows", f"{tokens}x{width}", partial(embeddings, device, tokens, width))
    for sizes in TINY_SAMPLING if tiny else SAMPLING:
        yield Case("gumbel", "{}x{}".format(*sizes), partial(sample, device, *sizes))
    for sizes in TINY_STATE if tiny else STATE:
        yield Case("decode_state", "{} slots of {} blocks".format(*sizes), partial(state, device, *sizes))
    for sizes in TINY_STEP if tiny else STEP:
        label = "{} answers, {} tokens, {} blocks".format(*sizes)
        yield Case("step_inputs", label, partial(step, device, *sizes))
    truncations = {"top-k 50": (50, 1.0, 0.0), "top-p 0.9": (0, 0.9, 0.0), "min-p 0.05": (0, 1.0, 0.05)}
    for sizes in TINY_SAMPLING if tiny else SAMPLING:
        for name, limits in truncations.items():
            label = "{}x{}, ".format(*sizes) + name
            yield Case("truncation", label, partial(truncate, device, *sizes, *limits))


def state(device, rows, blocks) -> Problem:
    slots = torch.arange(rows, device=device)
    tables = torch.arange(rows * blocks, dtype=torch.int32, device=device).view(1, rows, blocks)
    length = torch.randint(0, blocks * BLOCK, (rows,), device=device)
    arguments = (slots, tables, length, length, length)
    run = partial(gather_decode_inputs, *arguments, block_size=BLOCK)
    reference = partial(gather_decode_inputs_reference, *arguments, block_size=BLOCK)

    def flat(inputs: DecodeInputs) -> torch.Tensor:
        return torch.cat([part.float().flatten() for part in inputs])

    return Problem(
        run, lambda: (flat(run()), flat(reference())), 2 * tables.nbytes, peers={"torch": reference}
    )


def step(device, answers, tokens, blocks) -> Problem:
    layout, slots = StepLayout(answers + 1, 1, 3, both_ways=False), answers + 2
    tables = torch.arange(slots * blocks, dtype=torch.int32, device=device).view(1, slots, blocks)
    last, length = torch.randint(0, blocks * BLOCK - 1, (2, slots), device=device).unbind(0)
    state = StepState(tables, last, length, last, BLOCK, slots - 1)
    numbers = torch.randint(0, 99, (layout.size(tokens),), device=device)
    numbers[:4] = torch.tensor([answers, 1, tokens, answers + 1])
    numbers[HEADER : layout.chunks] = torch.arange(answers + 1)
    numbers[layout.chunks : layout.chunks + 4] = torch.tensor([answers, 0, tokens, tokens - 1])
    room = StepInputs.zeros(layout, answers + tokens, answers + 1, answers + 1, blocks, device)

    def found(gather: Callable[..., None]) -> torch.Tensor:
        gather(numbers, layout, state, room)
        parts = (room.ids, room.positions, room.slot_mapping, room.query_start, room.seq_lens, room.rows)
        return torch.cat([part.float().flatten() for part in parts])

    nbytes = 2 * tables.nbytes + 14 * 8 * tokens
    return Problem(
        partial(gather_step_inputs, numbers, layout, state, room),
        lambda: (found(gather_step_inputs), found(gather_step_inputs_reference)),
        nbytes,
        peers={"torch": partial(gather_step_inputs_reference, numbers, layout, state, room)},
    )


def norm(device, tokens, size, with_residual) -> Problem:
    x, residual = torch.randn((2, tokens, size), device=device, dtype=dtype_on(device)).unbind(0)
    weight = torch.randn(size, device=device, dtype=x.dtype)
    if not with_residual:
        run = partial(rms_norm, x, weight, 1e-6)
        peers: dict[str, Work] = {"torch": lambda: F.rms_norm(x, (size,), weight, 1e-6)}
        reference = partial(rms_norm_reference, x.float(), weight.float(), 1e-6)
        return Problem(run, lambda: (run(), reference()), 2 * x.nbytes + weight.nbytes, peers=peers)
    run = partial(rms_norm, x, weight, 1e-6, residual)
    peers = {"torch": lambda: F.rms_norm(x + residual, (size,), weight, 1e-6)}

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        # The sum is rounded before the norm; a reference in float32 would differ by more than the kernel.
        return torch.stack(run()), torch.stack(rms_norm_reference(x, weight, 1e-6, residual))

    return Problem(run, check, 4 * x.nbytes + weight.nbytes, peers=peers)


def rotation(device, tokens, heads, kv_heads, dim, section) -> Problem:
    fused = torch.randn((tokens, heads + 2 * kv_heads, dim), device=device, dtype=dtype_on(device))
    q, k = fused[:, :heads], fused[:, heads : heads + kv_heads]
    angles = torch.rand((4096, dim // 2), device=device) * 6.28
    table = RotaryTable(angles.cos(), angles.sin(), section)
    axes = (tokens,) if section is None else (3, tokens)
    positions = torch.randint(0, 4096, axes, device=device)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        results = []
        for rotate in (rotary, rotary_reference):
            pair = q.clone(), k.clone()
            rotate(*pair, positions, table)
            results.append(torch.cat(pair, dim=1))
        return results[0], results[1]

    peers: dict[str, Work] = {"reference": partial(rotary_reference, q, k, positions, table)}
    angle_bytes = 2 * tokens * (dim // 2) * angles.element_size()
    amount = 2 * (q.numel() + k.numel()) * q.element_size() + angle_bytes + positions.nbytes
    return Problem(partial(rotary, q, k, positions, table), check, amount, peers=peers)


def gate(device, tokens, size) -> Problem:
    x = torch.randn((tokens, 2 * size), device=device, dtype=dtype_on(device))
    run = partial(act_mul, x)
    peers: dict[str, Work] = {"reference": partial(act_mul_reference, x)}
    return Problem(run, lambda: (run(), act_mul_reference(x.float())), 1.5 * x.nbytes, peers=peers)


def output_gate(device, tokens, heads, dim) -> Problem:
    """Measure the gate of attention's output, which stands beside the queries of its head."""
    x = torch.randn((tokens, heads, dim), device=device, dtype=dtype_on(device))
    beside = torch.randn((tokens, 2 * heads, dim), device=device, dtype=x.dtype)[:, 1::2]
    run, apart = partial(sigmoid_gate, x, beside), partial(sigmoid_gate_reference, x, beside)
    exact = partial(sigmoid_gate_reference, x.float(), beside.float())
    return Problem(run, lambda: (run(), exact()), 3 * x.nbytes, peers={"torch": apart})


def layer_norm(device, tokens, size) -> Problem:
    x, residual = torch.randn((2, tokens, size), device=device, dtype=dtype_on(device)).unbind(0)
    weight, bias = torch.randn((2, size), device=device, dtype=x.dtype).unbind(0)
    run = partial(add_layer_norm, x, residual, weight, bias, 1e-6)
    reference = partial(add_layer_norm_reference, x, residual, weight, bias, 1e-6)
    peers: dict[str, Work] = {"torch": reference}
    return Problem(run, lambda: (torch.stack(run()), torch.stack(reference())), 4 * x.nbytes, peers=peers)


def tower_gelu(device, tokens, size) -> Problem:
    x = torch.randn((tokens, size), device=device, dtype=dtype_on(device))
    run = partial(quick_gelu, x)
    peers: dict[str, Work] = {"torch": partial(quick_gelu_reference, x)}
    return Problem(run, lambda: (run(), quick_gelu_reference(x)), 2 * x.nbytes, peers=peers)


def patches(device, side) -> Problem:
    pixels = torch.randint(0, 256, (side, side, 3), device=device, dtype=torch.uint8)
    table = torch.randn(3 * 256, device=device, dtype=dtype_on(device))
    cut = {"patch": 14, "merge": 2, "temporal": 2}
    run, reference = (partial(each, pixels, table, **cut) for each in (patchify, patchify_reference))
    peers: dict[str, Work] = {"torch": reference}
    moved = pixels.nbytes * (1 + 2 * table.element_size())
    return Problem(run, lambda: (run(), reference()), moved, peers=peers)


def write(device, tokens, heads, kv_heads, dim) -> Problem:
    fused = torch.randn((tokens, heads + 2 * kv_heads, dim), device=device, dtype=dtype_on(device))
    blocks = -(-tokens // BLOCK)
    cache = KVCache(*torch.zeros((2, blocks, kv_heads, BLOCK, dim), device=device, dtype=fused.dtype))
    slots = torch.randperm(blocks * BLOCK)[:tokens].to(device)
    angles = torch.rand((4096, dim // 2), device=device) * 6.28
    table = RotaryTable(angles.cos(), angles.sin())
    positions = torch.randint(0, 4096, (tokens,), device=device)

    def run(kernel: Callable[..., None] = rotary_kv_write, source: torch.Tensor = fused) -> None:
        q, k, v = source.split([heads, kv_heads, kv_heads], dim=1)
        kernel(q, k, v, positions, table, cache, slots)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        results = []
        for kernel in (rotary_kv_write, rotary_kv_write_reference):
            cache.keys.zero_()
            cache.values.zero_()
            copy = fused.clone()
            run(kernel, copy)
            parts = (copy[:, :heads], cache.keys, cache.values)
            results.append(torch.cat([part.flatten() for part in parts]))
        return results[0], results[1]

    amount = 2 * fused.nbytes + slots.nbytes + positions.nbytes
    return Problem(run, check, amount, peers={"reference": partial(run, rotary_kv_write_reference)})


def embeddings(device, tokens, width) -> Problem:
    """Measure the rows of a table of which another rank has half."""
    count = 32 if device.type == "cpu" else 1 << 16
    table = torch.randn((count, width), device=device, dtype=dtype_on(device))
    ids = torch.randint(0, 2 * count, (tokens,), device=device)
    run, reference = (
        partial(each, table, ids, count // 2, count) for each in (shard_rows, shard_rows_reference)
    )
    moved = 2 * tokens * width * table.element_size() + ids.nbytes
    return Problem(run, lambda: (run(), reference()), moved, peers={"torch": reference})


def likelihoods(device, rows, vocab) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random logits and temperatures."""
    logits = (torch.randn((rows, vocab), device=device) * 3).to(dtype_on(device))
    return logits, torch.full((rows,), 0.8, device=device)


def sample(device, rows, vocab) -> Problem:
    logits, temperature = likelihoods(device, rows, vocab)
    seeds, index = torch.arange(rows, device=device) * 7919, torch.arange(rows, device=device)
    arguments = (logits, temperature, seeds, index)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        differ = (gumbel_argmax(*arguments) != gumbel_argmax_reference(*arguments)).sum()
        return differ, torch.zeros_like(differ)

    peers: dict[str, Work] = {
        "argmax": lambda: logits.argmax(-1),
        "multinomial": lambda: (logits.float() / 0.8).softmax(-1).multinomial(1),
    }
    return Problem(partial(gumbel_argmax, *arguments), check, logits.nbytes, peers=peers)


def truncate(device, rows, vocab, top_k, top_p, min_p) -> Problem:
    logits, temperature = likelihoods(device, rows, vocab)
    limits = (
        torch.full((rows,), top_k, dtype=torch.int64, device=device),
        torch.full((rows,), top_p, device=device),
        torch.full((rows,), min_p, device=device),
    )
    run = partial(truncation_threshold, logits, temperature, *limits)
    reference = partial(truncation_threshold_reference, logits, temperature, *limits)

    def check() -> tuple[torch.Tensor, torch.Tensor]:
        # Thresholds between the same two logits are equivalent, so the numbers of kept tokens are compared.
        kept, expected = ((logits >= threshold[:, None]).sum(1) for threshold in (run(), reference()))
        return kept, expected

    return Problem(run, check, logits.nbytes, peers={"sort": reference})
