"""Matrices whose numbers of 4 bits are packed into words: integers and floats."""

from __future__ import annotations

from engine.layers.build import BuildContext
from engine.layers.fp4 import Fp4Matrix
from engine.layers.int4 import Int4Matrix
from engine.layers.matrix_formats import Fp4Format, PackedFormat

PackedMatrix = Int4Matrix | Fp4Matrix


def packed_matrix(
    name: str, stored: PackedFormat, inputs: int, first: int, count: int, build: BuildContext
) -> PackedMatrix:
    """Make the reader of a rank's matrix; arguments and errors as :class:`~engine.layers.int4.Int4Matrix`."""
    if isinstance(stored, Fp4Format):
        return Fp4Matrix(name, stored, inputs, first, count, build)
    return Int4Matrix(name, stored, inputs, first, count, build)
