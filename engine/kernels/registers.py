"""Layouts of numbers in registers, for Gluon: what a thread holds is ordered anew, which takes no instruction."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def interleaved(first, second, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Return the numbers of ``first`` and ``second`` by turns along ``AXIS``, in LAYOUT.

    Args:
        first, second: ``(N, K)`` or ``(W, N, K)``; with three axes ``AXIS`` may be 1 in place of the last one.
    """
    both = gl.join(first, second)
    if len(first.shape) == 2:
        both = gl.reshape(both, [first.shape[0], 2 * first.shape[1]])
    elif AXIS == 1:
        both = gl.permute(both, (0, 1, 3, 2))
        both = gl.reshape(both, [first.shape[0], 2 * first.shape[1], first.shape[2]])
    else:
        both = gl.reshape(both, [first.shape[0], first.shape[1], 2 * first.shape[2]])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def halves(pairs, LAYOUT: gl.constexpr, AXIS: gl.constexpr):
    """Return both halves of 32 bits along ``AXIS``, the lower one first: int16 in LAYOUT; see :func:`interleaved`."""
    return interleaved(pairs.to(gl.int16), (pairs >> 16).to(gl.int16), LAYOUT, AXIS)
