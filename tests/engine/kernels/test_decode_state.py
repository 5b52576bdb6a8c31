import pytest
import torch

from engine.kernels.decode_state import (
    advance_reference,
    advance_triton,
    gather_decode_inputs_reference,
    gather_decode_inputs_triton,
    write_changes_reference,
    write_changes_triton,
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


@pytest.mark.parametrize("count", [0, 1, 300, 2100])
@pytest.mark.parametrize("run", [write_changes_reference, write_changes_triton])
def test_write_changes(device, count, run):
    """Every other table entry gets another block, every slot another delta; nothing else changes."""
    tables, _, _, delta = state(device, 700)
    wanted_tables, wanted_delta = tables.clone(), delta.clone()
    targets = torch.arange(0, 2 * count, 2)
    # The last targets are slots.
    targets[-3:] = tables.numel() + torch.tensor([5, 0, 5])[-count:] if count else targets
    values = targets * 10 + 1
    for target, value in zip(targets.tolist(), values.tolist(), strict=True):
        if target < tables.numel():
            wanted_tables.view(-1)[target] = value
        else:
            wanted_delta[target - tables.numel()] = value
    packed = torch.cat([torch.full((9,), -1), targets, values, torch.tensor([count])])
    run(packed.to(device), tables, delta)
    assert torch.equal(tables, wanted_tables) and torch.equal(delta, wanted_delta)
