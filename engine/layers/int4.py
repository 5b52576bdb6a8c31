"""Matrices of linear layers in int4, and the checkpoint tensors that fill them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from engine.errors import CheckpointError, ConfigError
from engine.kernels.int4 import MIDDLE, Int4Scale, pack
from engine.layers.build import BuildContext, Region, Target, WeightSlot, whole
from engine.layers.matrix_formats import INT4_NAMES, Int4Format

#: Numbers of a word of 32 bits.
_PER_WORD = 8
#: The places of eight consecutive outputs in a word of AWQ, which stores outputs 0, 2, 4, 6, 1, 3, 5, 7.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: Adds one to each number of a word.
_ONES = 0x11111111


@dataclass(slots=True)
class _Shard:
    """The rank's outputs of one stored matrix, as they are in the file."""

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    index: torch.Tensor | None


class Int4Matrix:
    """Reads a rank's matrix, which may be several stored ones, one after the other.

    Args:
        name: of the layer, for messages.
        inputs: of the whole matrix.
        first, count: the rank's inputs.
        shuffles: inputs of a group may be apart.
    """

    def __init__(
        self,
        name: str,
        stored: Int4Format,
        inputs: int,
        first: int,
        count: int,
        build: BuildContext,
        *,
        shuffles: bool = True,
    ) -> None:
        self.stored, self._name, self._device = stored, name.removesuffix("."), build.device
        self._inputs, self._first, self._count = inputs, first, count
        self._group = inputs if stored.group is None else stored.group
        self._shuffles = shuffles
        self.gathers = stored.shuffled and count < inputs
        self._shards: list[_Shard] = []
        cut = self._group if self._group < inputs else _PER_WORD
        if count < inputs and (count % cut or first % cut):
            raise ConfigError(
                f"tensor_parallel_size {inputs // count} cuts a group of {cut} inputs of the int4 weights of "
                f"{self._name}: each rank would have {count} of {inputs}",
                param="tensor_parallel_size",
            )

    def slots(self, stem: str, total: int, ranges: list[tuple[int, int]]) -> list[WeightSlot]:
        """Allocate memory for a stored matrix, and describe its tensors.

        Args:
            stem: the beginning of the tensors' names.
            total: outputs of the stored matrix.
            ranges: the rank's outputs of it: the first one of each range, and their number.

        Raises:
            ConfigError: a range cuts a word.
        """
        names, zeros, indexed = INT4_NAMES[self.stored.layout], self.stored.zeros, self.stored.indexed
        groups = -(-self._inputs // self._group)
        words, scale, zero = (WeightSlot(stem + name, ()) for name in (names[0], names[2], names[1]))
        index = torch.empty(self._inputs, dtype=torch.int32, device=self._device) if indexed else None
        # A rank needs all inputs until it knows which are its own.
        first, count = (0, self._inputs) if self.gathers else (self._first, self._count)
        own = slice(first // self._group, -(-(first + count) // self._group))
        for start, size in ranges:
            outputs, packed = slice(start, start + size), self._packed(start, size, total)
            words.shape, region = self._words(total, outputs, packed, slice(first, first + count))
            numbers = self._add(words, region, torch.int32)
            scale.shape, region = self._by_group((total, groups), outputs, own)
            scales = self._add(scale, region, self.stored.scale_dtype)
            points = None
            if zeros:
                zero.shape, region = self._by_group((-(-total // _PER_WORD), groups), packed, own)
                points = self._add(zero, region, torch.int32)
            self._shards.append(_Shard(numbers, scales, points, index))
        slots = [words, scale, *([zero] if zeros else [])]
        if index is not None:
            slots.append(WeightSlot(stem + names[3], (self._inputs,), [(whole((self._inputs,)), index)]))
        return slots

    def _packed(self, start: int, size: int, total: int) -> slice:
        """The words that hold a number of each of these outputs."""
        if start % _PER_WORD or (size % _PER_WORD and start + size < total):
            raise ConfigError(
                f"a rank's outputs {start} to {start + size - 1} of {self._name} cut a word of eight int4 "
                "numbers; choose another tensor_parallel_size",
                param="tensor_parallel_size",
            )
        return slice(start // _PER_WORD, -(-(start + size) // _PER_WORD))

    def _words(
        self, total: int, outputs: slice, packed: slice, inputs: slice
    ) -> tuple[tuple[int, int], tuple[slice, slice]]:
        """The shape of the stored words, and the rank's region."""
        in_words = slice(inputs.start // _PER_WORD, -(-inputs.stop // _PER_WORD))
        if self.stored.layout == "awq":
            return (self._inputs, -(-total // _PER_WORD)), (inputs, packed)
        both = -(-self._inputs // _PER_WORD), total
        if self.stored.layout == "gptq":
            return both, (in_words, outputs)
        return (both[1], both[0]), (outputs, in_words)

    def _by_group(
        self, shape: tuple[int, int], rows: slice, groups: slice
    ) -> tuple[tuple[int, int], tuple[slice, slice]]:
        """The shape of a stored tensor with ``shape`` outputs and groups, and the rank's region."""
        if self.stored.layout == "packed":
            return shape, (rows, groups)
        return (shape[1], shape[0]), (groups, rows)

    def _add(self, slot: WeightSlot, region: tuple[slice, slice], dtype: torch.dtype) -> torch.Tensor:
        """Allocate the rank's region of a tensor, and have it filled."""
        sizes = [side.stop - side.start for side in region]
        values = torch.empty(sizes, dtype=dtype, device=self._device)
        entry: tuple[Region, Target] = (region, values)
        slot.copies.append(entry)
        return values

    def finish(self) -> tuple[torch.Tensor, Int4Scale]:
        """Put the tensors, which were read, into the order of the kernels: words and scales.

        Raises:
            CheckpointError: the groups of inputs can't be used.
        """
        shards, self._shards = self._shards, []
        order, numbers, scales, zeros = self._order(shards), [], [], []
        for shard in shards:
            values = shard.scales if self.stored.layout == "packed" else shard.scales.t()
            read = self._numbers(shard)[: len(values)]
            numbers.append(read if order is None else read[:, order])
            scales.append(values)
            if shard.zeros is not None:
                zeros.append(self._zeros(shard.zeros)[: len(values)])
        scale = Int4Scale(
            self._count,
            torch.cat(scales).contiguous(),
            self._group,
            torch.cat(zeros).contiguous() if zeros and any(part.ne(MIDDLE).any() for part in zeros) else None,
            order,
        )
        return pack(torch.cat(numbers)), self._own_groups(scale)

    def _own_groups(self, scale: Int4Scale) -> Int4Scale:
        """Without the groups of other ranks, if all were read."""
        if not self.gathers or scale.values.shape[1] == 1:
            return scale
        own = slice(self._first // self._group, (self._first + self._count) // self._group)
        zeros = None if scale.zeros is None else scale.zeros[:, own].contiguous()
        return replace(scale, values=scale.values[:, own].contiguous(), zeros=zeros)

    def _order(self, shards: list[_Shard]) -> torch.Tensor | None:
        """The rank's inputs in ascending order of their groups; None if they are so already."""
        index = shards[0].index
        if index is None:
            return None
        if any(not torch.equal(index, shard.index) for shard in shards if shard.index is not None):
            raise CheckpointError(f"the projections of {self._name} have their inputs in different orders")
        expected = torch.arange(self._inputs, device=index.device) // self._group
        order = index.long().argsort(stable=True)
        if not torch.equal(index.long()[order], expected):
            raise CheckpointError(f"{self._name}: g_idx has groups of other sizes than {self._group} inputs")
        if torch.equal(index.long(), expected) and not self.gathers:
            return None
        if not self._shuffles or (self._count < self._inputs and not self.gathers):
            raise CheckpointError(
                f"{self._name}: inputs of a group are apart, but config.json doesn't say so (desc_act)"
            )
        return order[self._first : self._first + self._count]

    def _numbers(self, shard: _Shard) -> torch.Tensor:
        """The numbers ``(outputs, inputs)`` uint8 of a shard."""
        count = self._inputs if self.gathers else self._count
        if self.stored.layout == "awq":
            return _of_awq(shard.words).t()
        words = shard.words.t() if self.stored.layout == "gptq" else shard.words
        return _numbers_of_words(words)[:, :count]

    def _zeros(self, words: torch.Tensor) -> torch.Tensor:
        """The zero points ``(outputs, groups)`` uint8."""
        if self.stored.layout == "awq":
            return _of_awq(words).t()
        if self.stored.layout == "packed":
            return _numbers_of_words(words.t()).t()
        # The one was subtracted from whole words: there may be a borrow between numbers.
        return _numbers_of_words(words + _ONES if self.stored.less_one else words).t()


def _numbers_of_words(words: torch.Tensor) -> torch.Tensor:
    """The eight numbers of each word, the lowest bits first: ``(A, B)`` int32 to ``(A, 8 * B)`` uint8."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=2).flatten(1)


def _of_awq(words: torch.Tensor) -> torch.Tensor:
    """The same of AWQ's words."""
    places = torch.tensor(_AWQ_PLACES, device=words.device)
    return _numbers_of_words(words).unflatten(1, (-1, _PER_WORD))[:, :, places].flatten(1)
