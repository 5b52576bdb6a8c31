import pytest
import torch

from engine.kernels.decode_state import (
    advance_reference,
    advance_triton,
    gather_decode_inputs_reference,
    gather_decode_inputs_triton,
)

PADDING = 6


def state(device, columns, groups=1):
    tables = torch.arange(groups * 7 * columns, dtype=torch.int32).view(groups, 7, columns)
    length = torch.tensor([0, 15, 16, 31, 40, 3, 0])
    last, delta = torch.randint(0, 99, (7,)), torch.randint(-9, 9, (7,))
    return [x.to(device) for x in (tables, last, length, delta)]


@pytest.mark.parametrize("slots", [[4], [3, 0, 5], [1, 2, PADDING, PADDING], []])
@pytest.mark.parametrize(("columns", "groups"), [(5, 1), (1030, 1), (5, 3)])
def test_gather_decode_inputs(device, slots, columns, groups):
    slots = torch.tensor(slots, dtype=torch.int64, device=device)
    arguments = (slots, *state(device, columns, groups))
    result = gather_decode_inputs_triton(*arguments, block_size=16)
    expected = gather_decode_inputs_reference(*arguments, block_size=16)
    for name, one, other in zip(result._fields, result, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    if 4 in slots.tolist():
        # The 41st token of a sequence goes to offset 8 of its third block.
        blocks = [(7 * group + 4) * columns + 2 for group in range(groups)]
        assert result.kv_slots[:, 0].tolist() == [block * 16 + 8 for block in blocks]
        assert result.seq_lens[0] == 41


@pytest.mark.parametrize("slots", [[4], [3, 0, 5], [1, PADDING, 2, PADDING], []])
@pytest.mark.parametrize("run", [advance_reference, advance_triton])
def test_advance(device, slots, run):
    _, last, length, _ = state(device, 5)
    before, tokens = length.tolist(), [100 + slot for slot in slots]
    tensors = (torch.tensor(x, dtype=torch.int64, device=device) for x in (slots, tokens))
    run(*tensors, last, length, padding_slot=PADDING)
    for slot in range(PADDING):
        assert length[slot] == before[slot] + (slot in slots)
        assert (last[slot] == 100 + slot) == (slot in slots)
    assert length[PADDING] == 0
