"""Inputs of steps with chunks: the kernel and its reference against what each row and sequence must get."""

from dataclasses import fields

import pytest
import torch

from engine.kernels.step_inputs import (
    HEADER,
    StepInputs,
    StepLayout,
    StepState,
    gather_step_inputs_reference,
    gather_step_inputs_triton,
)

SLOTS, BLOCK = 7, 16


def state(device, groups, columns):
    tables = torch.arange(groups * (SLOTS + 1) * columns, dtype=torch.int32).view(groups, SLOTS + 1, columns)
    length = torch.tensor([0, 15, 16, 31, 40, 3, 0, 0])
    last, delta = torch.randint(0, 99, (SLOTS + 1,)), torch.randint(-9, 9, (SLOTS + 1,))
    tensors = [x.to(device) for x in (tables, last, length, delta)]
    return StepState(*tensors, block_size=BLOCK, padding_slot=SLOTS)


def arrays(layout, decodes, chunks):
    """The step's arrays; ``chunks`` are slot, count, start and the number of its sampling rows."""
    counts = [count for _, count, _, _ in chunks]
    tokens, ends = (
        sum(counts),
        torch.tensor([start + count for _, count, start, _ in chunks], dtype=torch.int64),
    )
    behind = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    sampling = [*decodes, *(slot for slot, _, _, rows in chunks for _ in range(rows))]
    rows = [
        len(decodes) + int(end) - back
        for end, (*_, r) in zip(behind, chunks, strict=True)
        for back in range(r, 0, -1)
    ]
    front = torch.full((HEADER + SLOTS,), SLOTS)
    front[:4] = torch.tensor([len(decodes), len(chunks), tokens, len(sampling)])
    front[HEADER : HEADER + len(sampling)] = torch.tensor(sampling)
    parts = {
        "slots": torch.tensor([slot for slot, *_ in chunks], dtype=torch.int64),
        "firsts": behind - torch.tensor(counts, dtype=torch.int64),
        "ends": ends,
        "counted": ends - torch.tensor([rows for *_, rows in chunks], dtype=torch.int64),
        "ids": torch.randint(-99, 99, (tokens,)),
        "positions": torch.randint(0, 999, (layout.axes, tokens)),
        "kv_slots": torch.randint(0, 999, (layout.groups, tokens)),
        "key_ends": torch.randint(0, 99, (tokens if layout.both_ways else 0,)),
        "rows": torch.tensor(rows, dtype=torch.int64),
    }
    spare = torch.randint(0, 99, (40,))
    step = torch.cat([front, *(part.reshape(-1).long() for part in parts.values()), spare])
    return step, parts, len(sampling)


STEPS = {
    "mixed": ([4, 1], [(3, 5, 12, 0), (0, 300, 0, 1)]),
    "prompts alone": ([], [(2, 17, 33, 1)]),
    "a draft": ([1], [(5, 3, 3, 3)]),
    "decodes alone": ([3, 4, 1], []),
    "nothing": ([], []),
}


@pytest.mark.parametrize("run", [gather_step_inputs_reference, gather_step_inputs_triton])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("groups", "axes", "both_ways", "columns"),
    [(1, 3, False, 20), (2, 1, True, 300)],
    ids=["mrope", "groups"],
)
def test_each_row_and_sequence_gets_its_own(device, run, step, groups, axes, both_ways, columns):
    decodes, chunks = STEPS[step]
    layout, before = StepLayout(SLOTS, groups, axes, both_ways), state(device, groups, columns)
    numbers, parts, sampling = arrays(layout, decodes, chunks)
    tokens, total = len(parts["ids"]), len(decodes) + len(parts["ids"])
    assert len(numbers) - 40 <= layout.size(tokens)
    room = StepInputs.zeros(layout, 400, SLOTS, SLOTS, columns, device)
    for field in fields(room):
        getattr(room, field.name).fill_(True if field.name == "is_media" else 77)
    found = room.front(max(total + 9, 16), SLOTS - 1)
    lengths = before.length.cpu().clone()
    run(numbers.to(device), layout, before, found)

    def equal(values, expected):
        assert values.tolist() == torch.as_tensor(expected).tolist()

    count, padded = len(decodes), len(found.ids) - total
    slots = torch.tensor([*decodes, *(slot for slot, *_ in chunks)], dtype=torch.int64)
    last, delta = before.last_token.cpu(), before.delta.cpu()
    computed = lengths[slots[:count]]
    equal(
        found.ids,
        [
            *last[slots[:count]].tolist(),
            *[max(token, -1 - token) for token in parts["ids"].tolist()],
            *[0] * padded,
        ],
    )
    equal(found.is_media, [*[False] * count, *(parts["ids"] < 0).tolist(), *[False] * padded])
    for axis in range(axes):
        equal(
            found.positions[axis, :total],
            [*(computed + delta[slots[:count]]).tolist(), *parts["positions"][axis].tolist()],
        )
    tables = before.block_tables.cpu()
    for group in range(groups):
        blocks = tables[group, slots[:count], computed // BLOCK]
        own = blocks * BLOCK + computed % BLOCK
        expected = [*own.tolist(), *parts["kv_slots"][group].tolist(), *[-1] * padded]
        equal(found.slot_mapping[group], expected)
    ends = [*(computed + 1).tolist(), *parts["ends"].tolist()]
    if both_ways:
        equal(found.key_ends[:total], [*(computed + 1).tolist(), *parts["key_ends"].tolist()])
    starts = [*range(count), *(parts["firsts"] + count).tolist()]
    idle = SLOTS - 1 - len(slots)
    equal(found.query_start, [*starts, *[total] * (idle + 1)])
    equal(found.seq_lens, [*ends, *[0] * idle])
    equal(found.state_rows, [*slots.tolist(), *[SLOTS] * idle])
    for group in range(groups):
        for row, (slot, end) in enumerate(zip(slots.tolist(), ends, strict=True)):
            used = -(-int(end) // BLOCK)
            equal(found.block_tables[group, row, :used], tables[group, slot, :used])
    rows = [*range(count), *parts["rows"].tolist()]
    equal(found.rows, [*rows, *[0] * (SLOTS - 1 - sampling)])
    lengths[slots[count:]] = parts["counted"]
    equal(before.length, lengths)
