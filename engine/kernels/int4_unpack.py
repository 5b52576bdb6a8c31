"""Unpacks weights in 4 bits with instructions of their own, two numbers at a time.

Two neighbouring words are one register. A shift and one logical instruction put a number of each into the lowest
bits of the mantissas of 128 in bfloat16, 1024 in float16, and one addition takes that and the zero point away: three
instructions for two weights. The result is exact. A float's bits become those of a number with a wrong exponent, and
one multiplication corrects it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.knobs import runtime


def unpacks(x: torch.Tensor) -> bool:
    """Return whether kernels over the rows of ``x`` unpack weights so: of 16 bits, not in Triton's interpreter."""
    return x.element_size() == 2 and not runtime.interpret


def _integer(i: int, dtype: str, one: str, base: str) -> str:
    """Assembly that makes ``$0`` the ``i``-th numbers of the words ``$1``, plus ``$2``.

    Args:
        dtype: of two numbers, in the instruction's name.
        one: 1, twice.
        base: the number whose lowest bits of the mantissa count ones, twice.
    """
    return f"""{{
        .reg .b32 one, bits;
        mov.b32 one, {one};
        shr.u32 bits, $1, {4 * i};
        lop3.b32 bits, bits, 0x000F000F, {base}, 0xEA;
        fma.rn.{dtype} $0, bits, one, $2;
    }}"""


def _float(i: int, dtype: str, place: int, factor: str) -> str:
    """Assembly that makes ``$0`` the ``i``-th floats of the words ``$1``.

    Args:
        place: of the lowest bit of the mantissa, of which there is one.
        factor: what the number is multiplied by for its exponent, twice.
    """
    shift = place - 4 * i
    return f"""{{
        .reg .b32 size, sign, factor, zero;
        mov.b32 factor, {factor};
        mov.b32 zero, 0x80008000;
        {"shl.b32" if shift > 0 else "shr.u32"} size, $1, {abs(shift)};
        shl.b32 sign, $1, {12 - 4 * i};
        and.b32 sign, sign, 0x80008000;
        lop3.b32 size, size, {7 << place | 7 << place + 16:#x}, sign, 0xEA;
        fma.rn.{dtype} $0, size, factor, zero;
    }}"""


_INTEGERS_BF16 = tl.constexpr(tuple(_integer(i, "bf16x2", "0x3F803F80", "0x43004300") for i in range(4)))
_INTEGERS_FP16 = tl.constexpr(tuple(_integer(i, "f16x2", "0x3C003C00", "0x64006400") for i in range(4)))
# Of bfloat16 there is no multiplication before sm_90 of PTX but this; -0 keeps the sign of a zero.
_FLOATS_BF16 = tl.constexpr(tuple(_float(i, "bf16x2", 6, "0x7E807E80") for i in range(4)))
_FLOATS_FP16 = tl.constexpr(tuple(_float(i, "f16x2", 9, "0x74007400") for i in range(4)))


@triton.jit
def minus_zero(zero, DTYPE: tl.constexpr):
    """Return what :func:`unpacked` adds for the zero points ``zero``, integers: the bits of -128 or -1024, to which a
    zero point adds ones; int16."""
    BITS: tl.constexpr = 0xC300 - 0x10000 if DTYPE == tl.bfloat16 else 0xE400 - 0x10000
    return zero.to(tl.int16) + BITS


@triton.jit
def unpacked(word, minus, i: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Return the ``i``-th number of each word, less its zero point, in ``DTYPE``; see :func:`minus_zero`.

    Args:
        word: int16; neighbours along the last dimension are in the same thread.
    """
    # The compiler takes no constant for the dtype of the result.
    if KIND == "int4":
        if DTYPE == tl.bfloat16:
            number = tl.inline_asm_elementwise(
                _INTEGERS_BF16[i], "=r,r,r", [word, minus], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            number = tl.inline_asm_elementwise(
                _INTEGERS_FP16[i], "=r,r,r", [word, minus], dtype=tl.float16, is_pure=True, pack=2
            )
    elif DTYPE == tl.bfloat16:
        number = tl.inline_asm_elementwise(
            _FLOATS_BF16[i], "=r,r", [word], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        number = tl.inline_asm_elementwise(
            _FLOATS_FP16[i], "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
        )
    return number
