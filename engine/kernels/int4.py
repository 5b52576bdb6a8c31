"""Matrices of 4-bit integers (int4) or floats (e2m1) with scales, and zero points, by groups of inputs.

A weight is ``(number - zero) * scale``. A float's number is that of its four bits in :data:`E2M1`, and it has no
zero point. Four numbers are in one word of 16 bits. Whatever format a checkpoint has, the words are ordered for
the kernels: 128 consecutive inputs of an output are one chunk of 32 words, and bits ``4 * i`` to ``4 * i + 3`` of
word ``w`` are input ``32 * i + w`` of the chunk. Unpacking one number of each word so gives consecutive inputs,
of one group if groups are not smaller; and two neighbouring words become two neighbouring numbers of 16 bits in
the same register, by the same instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from engine.kernels.device import use_triton
from engine.kernels.launch import launch

#: Inputs of a chunk.
CHUNK = 128
#: Words of a chunk.
CHUNK_WORDS = 32
#: The zero point of symmetric weights.
MIDDLE = 8
#: The numbers of the 16 patterns of bits of a float of 4 bits: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: Twice the first eight of them, in four bits each.
_DOUBLED = tl.constexpr(0xC8643210 - (1 << 32))
#: Integers; floats with powers of two as scales; floats with scales in fp8 (e4m3) and a factor.
Kind = Literal["int4", "mxfp4", "nvfp4"]
#: Chunks of an output that a program dequantises: a thread has words of 16 bytes.
_TILE_CHUNKS = 32


@dataclass(frozen=True, slots=True)
class Int4Scale:
    """The scales and zero points of a weight ``(N, K)`` in 4 bits, whose words are ``(N, W)`` int16.

    Attributes:
        inputs: ``K``.
        values: ``(N, G)``: for each output and each of ``G`` groups of inputs. Of a floating dtype
            for int4; uint8 for floats: the bits of e8m0 (``mxfp4``) or of e4m3 (``nvfp4``).
        group: consecutive inputs of a group: 16, 32, 64, or a multiple of 128; any number if ``G`` is 1.
        zeros: ``(N, G)`` uint8; None if all are :data:`MIDDLE`.
        order: ``(K,)`` int64, the columns of the input that the weight's inputs are; None: ``0`` to ``K - 1``.
        kind: of the numbers.
        factors: ``(N,)`` float32, of ``nvfp4``: each output's scales are multiplied by one.
        pairs: ``(G, N)`` int32, see :meth:`paired`; None without.
    """

    inputs: int
    values: torch.Tensor
    group: int
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None
    kind: Kind = "int4"
    factors: torch.Tensor | None = None
    pairs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # In memory the values of a group are side by side: kernels load those of some outputs at a time.
        for name in ("values", "zeros"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, values.t().contiguous().t())

    def paired(self) -> Int4Scale:
        """Return the same with ``pairs`` for the kernels that copy them to shared memory, which takes 32 bits at least:
        the bits of a scale in the lower half, its zero point in the upper one. Only integers have them, with scales
        of 16 bits and groups of whole chunks."""
        chunks = self.values.shape[1] == 1 or self.group % CHUNK == 0
        if self.kind != "int4" or self.values.element_size() != 2 or not chunks:
            return self
        bits = self.values.t().contiguous().view(torch.int16)
        zeros = torch.full_like(bits, MIDDLE) if self.zeros is None else self.zeros.t().to(torch.int16)
        return replace(self, pairs=torch.stack((bits, zeros), dim=2).view(torch.int32).squeeze(2))

    def exact(self) -> torch.Tensor:
        """The scales ``(N, G)`` in float32."""
        if self.kind == "int4":
            return self.values.float()
        if self.kind == "mxfp4":
            return self.values.view(torch.float8_e8m0fnu).float()
        assert self.factors is not None
        return self.values.view(torch.float8_e4m3fn).float() * self.factors[:, None]


def supports_group(group: int) -> bool:
    """Return whether several groups of this many inputs are supported."""
    return group in (16, 32, 64) or (group > 0 and group % CHUNK == 0)


def pack(numbers: torch.Tensor) -> torch.Tensor:
    """Pack numbers from 0 to 15, ``(N, K)`` uint8, into words ``(N, W)`` int16; the last chunk is padded."""
    padded = F.pad(numbers, (0, -numbers.shape[1] % CHUNK))
    chunks = padded.unflatten(1, (-1, 4, CHUNK_WORDS))
    # Bytes of a word are in ascending order, each with its lower number first.
    pairs = chunks[:, :, 0::2] | (chunks[:, :, 1::2] << 4)
    return pairs.transpose(2, 3).contiguous().flatten(1).view(torch.int16)


def unpack(words: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return the numbers ``(N, inputs)`` uint8 of words ``(N, W)``."""
    pairs = words.contiguous().view(torch.uint8).unflatten(1, (-1, CHUNK_WORDS, 2)).transpose(2, 3)
    numbers = torch.stack((pairs & 15, pairs >> 4), dim=3)
    return numbers.flatten(1)[:, :inputs]


def dequantise_int4(words: torch.Tensor, scale: Int4Scale, dtype: torch.dtype) -> torch.Tensor:
    """Compute the weight in float32 and round it to ``dtype``; ``(N, K)`` contiguous."""
    run = dequantise_int4_triton if use_triton(words) else dequantise_int4_reference
    return run(words, scale, dtype)


def dequantise_int4_reference(words: torch.Tensor, scale: Int4Scale, dtype: torch.dtype) -> torch.Tensor:
    def of_inputs(values: torch.Tensor) -> torch.Tensor:
        if values.shape[1] == 1:
            return values.float()
        return values.float().repeat_interleave(scale.group, dim=1)[:, : scale.inputs]

    numbers, zeros = unpack(words, scale.inputs), MIDDLE if scale.zeros is None else of_inputs(scale.zeros)
    if scale.kind == "int4":
        exact = numbers.float() - zeros
    else:
        exact = torch.tensor(E2M1, device=words.device)[numbers.int()]
    return (exact * of_inputs(scale.exact())).to(dtype)


def int4_arguments(words: torch.Tensor, scale: Int4Scale) -> dict[str, Any]:
    """Arguments of a kernel for a weight in 4 bits. ``GROUP`` is 0 if an output has one scale."""
    groups = scale.values.shape[1]
    assert words.is_contiguous() and words.shape[1] == triton.cdiv(scale.inputs, CHUNK) * CHUNK_WORDS
    assert groups == 1 or supports_group(scale.group)
    assert scale.zeros is None or scale.zeros.shape == scale.values.shape
    assert (scale.kind == "int4") == scale.values.is_floating_point()
    assert (scale.kind == "nvfp4") == (scale.factors is not None)
    return {
        "weight_ptr": words, "scale_ptr": scale.values,
        "zero_ptr": words if scale.zeros is None else scale.zeros,
        "factor_ptr": words if scale.factors is None else scale.factors, "KIND": scale.kind,
        "inputs": scale.inputs, "words": words.shape[1], "groups": groups, "stride": len(words),
        "GROUP": 0 if groups == 1 else scale.group, "ZEROS": scale.zeros is not None,
    }  # fmt: skip


@triton.jit
def group_of(chunk, lane, i: tl.constexpr, GROUP: tl.constexpr):
    """Group of the ``i``-th number of word ``lane`` of a chunk."""
    if GROUP == 0:
        group = chunk * 0
    elif GROUP == 16:
        # A return here would give the function results of two shapes.
        group = chunk * 8 + i * 2 + lane // 16
    else:
        group = (chunk * 128 + i * 32) // GROUP
    return group


@triton.jit
def number_of(word, i: tl.constexpr, KIND: tl.constexpr):
    """The ``i``-th numbers of words in float32; of floats twice the number, which is an integer."""
    bits = (word.to(tl.int32) >> (4 * i)) & 15
    if KIND == "int4":
        return bits.to(tl.float32)
    doubled = ((tl.full(bits.shape, _DOUBLED, tl.int32) >> ((bits & 7) * 4)) & 15).to(tl.float32)
    return tl.where(bits > 7, -doubled, doubled)


@triton.jit
def scale_of(value, KIND: tl.constexpr):
    """The scales, from their values in memory, in float32; of floats halved, see :func:`number_of`."""
    if KIND == "int4":
        return value.to(tl.float32)
    bits = value.to(tl.int32)
    if KIND == "mxfp4":
        return (bits << 23).to(tl.float32, bitcast=True) * 0.5
    exponent = (bits >> 3) & 15
    mantissa = (bits & 7) + tl.where(exponent > 0, 8, 0)
    # Of e4m3: the mantissa counts eighths, the exponent is seven more, and less by one for subnormal numbers.
    power = (tl.maximum(exponent, 1) - 7 - 3 - 1 + 127) << 23
    size = mantissa.to(tl.float32) * power.to(tl.float32, bitcast=True)
    return tl.where(bits > 127, -size, size)


@triton.jit
def times_factors(sums, factor_ptr, row, mask, KIND: tl.constexpr):
    """Multiply the sums of outputs by the factors of the rows of a weight."""
    if KIND == "nvfp4":
        return sums * tl.load(factor_ptr + row, mask=mask, other=0.0)
    return sums


@triton.jit
def number_times_power(word, i: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr):
    """Return the ``i``-th number of words less ``ZERO``, times a power of 16, and what undoes this power.

    The 16 bits of a word are within the mantissa of ``2 ** 23``: no integer is converted, which takes longer.
    """
    if KIND != "int4":
        return number_of(word, i, KIND), 1.0
    bits = word.to(tl.int32) & (15 << (4 * i)) | 0x4B000000
    power: tl.constexpr = 16**i
    return bits.to(tl.float32, bitcast=True) - (8388608.0 + ZERO * power), 1.0 / power


def dequantise_int4_triton(words: torch.Tensor, scale: Int4Scale, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty((len(words), scale.inputs), dtype=dtype, device=words.device)
    chunks = words.shape[1] // CHUNK_WORDS
    tile = min(_TILE_CHUNKS, triton.next_power_of_2(chunks))
    launch(
        _dequantise_int4_kernel, (triton.cdiv(chunks, tile) * len(words),),
        out_ptr=out, **int4_arguments(words, scale), TILE=tile, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["groups"])
def _dequantise_int4_kernel(
    out_ptr, weight_ptr, scale_ptr, zero_ptr, factor_ptr, inputs, words, groups, stride, KIND: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per tile of chunks of one output."""
    tiles = tl.cdiv(words // 32, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    chunk = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)[:, None]
    lane = tl.arange(0, 32)[None, :]
    word = tl.load(weight_ptr + row * words + chunk * 32 + lane, mask=chunk * 32 < words, other=0)
    factor = times_factors(1.0, factor_ptr, row, row >= 0, KIND)
    for i in tl.static_range(4):
        first = chunk * 128 + i * 32
        if i == 0 or (GROUP > 0 and i * 32 % GROUP == 0):
            # Groups of 16 inputs are half of these numbers; groups beyond the last input have no numbers.
            known = first + (lane // 16 * 16 if GROUP == 16 else 0) < inputs
            group = row + group_of(chunk + lane * 0 if GROUP == 16 else chunk, lane, i, GROUP) * stride
            scale = scale_of(tl.load(scale_ptr + group, mask=known, other=0), KIND) * factor
            if ZEROS:
                zero = tl.load(zero_ptr + group, mask=known, other=0).to(tl.float32)
        number, inverse = number_times_power(word, i, 0 if ZEROS else 8, KIND)
        if ZEROS:
            number -= zero * (1.0 / inverse)
        result = number * (scale * inverse)
        tl.store(
            out_ptr + row * inputs + first + lane,
            result.to(out_ptr.dtype.element_ty),
            mask=first + lane < inputs,
        )
