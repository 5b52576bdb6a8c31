"""The device's own state of every running request, by slot.

Sampled tokens, lengths and block tables stay on the device, so that a decode step needs nothing from the
host: it reads them, computes, and advances them. The host only writes what changed: new rows, new blocks.
"""

from __future__ import annotations

import torch

from engine.kernels.decode_state import DecodeInputs, advance, gather_decode_inputs, write_changes
from engine.kernels.step_inputs import StepInputs, StepLayout, StepState, gather_step_inputs
from engine.runner.draft_rows import DraftRows


class DeviceState:
    """Rows ``0 .. num_slots - 1``, and row ``num_slots`` for the padding of captured graphs.

    Attributes:
        block_tables: int32 ``(groups, num_slots + 1, max_blocks)``, for each group of layers.
        last_token: int64 ``(num_slots + 1,)``, sampled last and not computed yet.
        length: int64 ``(num_slots + 1,)``, computed tokens.
        delta: int64 ``(num_slots + 1,)``, row of the rotary tables minus index, for tokens after the prompt.
    """

    def __init__(
        self, num_slots: int, num_groups: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        rows = num_slots + 1
        self.padding_slot = num_slots
        self.block_size = block_size
        self.block_tables = torch.zeros((num_groups, rows, max_blocks), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.delta = torch.zeros(rows, dtype=torch.int64, device=device)

    def decode_inputs(self, slots: torch.Tensor) -> DecodeInputs:
        """Gather what the requests in ``slots`` ``(D,)`` compute next, and where."""
        return gather_decode_inputs(
            slots, self.block_tables, self.last_token, self.length, self.delta, block_size=self.block_size
        )

    def write(self, changes: torch.Tensor) -> torch.Tensor:
        """Write ``changes``, see :func:`write_changes`, and return :attr:`delta`."""
        write_changes(changes, self.block_tables, self.delta)
        return self.delta

    def step_inputs(self, step: torch.Tensor, layout: StepLayout, inputs: StepInputs) -> None:
        """Fill the ``inputs`` of a step with chunks. Their tokens count as computed, but for those behind
        which one is sampled."""
        state = StepState(
            self.block_tables, self.last_token, self.length, self.delta, self.block_size, self.padding_slot
        )
        gather_step_inputs(step, layout, state, inputs)

    def advance(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """The tokens of rows ``(D,)`` that sample are computed; ``tokens`` come next."""
        advance(slots, tokens, self.last_token, self.length, padding_slot=self.padding_slot)

    def take(self, slots: torch.Tensor, tokens: torch.Tensor, drafts: DraftRows) -> None:
        """As :meth:`advance`, of ``tokens`` ``(R,)`` of which some may not hold, several of a slot."""
        held = drafts.held(tokens)
        self.length.index_add_(0, slots, held.long())
        slots = torch.where(drafts.last(held), slots, self.padding_slot)
        self.last_token.index_copy_(0, slots, tokens.clamp(min=0))
