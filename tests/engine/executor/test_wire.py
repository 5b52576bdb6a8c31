"""Messages to the other ranks hold all they need; in steady decode nearly nothing."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from engine.executor.wire import BatchReceiver, BatchSender, StepMessage
from engine.prompt import EmbeddedMedia, MediaItem, MediaSpan, PlaceholderRun
from engine.request import Request
from engine.runner.embedding_rows import AwaitedRows
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import Admission, PrefillChunk, ScheduledBatch, TableUpdate


def sent(sender: BatchSender, batch: ScheduledBatch) -> StepMessage:
    return pickle.loads(pickle.dumps(sender.message(batch, masked=False)))


def span(key: str, offset: int) -> MediaSpan:
    return MediaSpan(MediaItem("image", key, 4, (2, 2), (2, 2), (PlaceholderRun(1, 4, True),)), offset, 4)


@pytest.fixture
def request_() -> Request:
    params = SamplingParams(temperature=0.5, seed=3)
    spans = [span("consumed", 1), span("cut", 6), span("rows", 12)]
    embeddings = {
        "consumed": torch.ones(4, 8),
        "cut": torch.rand(4, 8),
        "rows": EmbeddedMedia("rows", np.ones((4, 8), np.float32), "float32"),
    }
    # A matcher is the scheduler's, and could not travel.
    return Request(
        "a",
        list(range(20)),
        20,
        params,
        40,
        frozenset({2}),
        spans,
        embeddings,
        seed=9,
        both_ways=[(6, 16)],
        one_way=[(10, 12)],
        rope_variant=1,
        num_preemptions=2,
        blocks=[[5, 3], [0, 4]],
        grammar=open,
    )


def test_requests_travel_when_they_are_admitted_and_chunks_name_them_by_slot(request_):
    sender, receiver = BatchSender(), BatchReceiver()
    empty = np.zeros(0, np.int64)
    first = ScheduledBatch(0, empty, [PrefillChunk(request_, 7, 8, 4, False)], [Admission(request_, 7, 8)])
    batch = receiver.batch(sent(sender, first))
    (admission,), (chunk,) = batch.admitted, batch.prefills
    assert replace(chunk, request=request_) == first.prefills[0] and chunk.request is admission.request
    copy = admission.request
    travels = {f.name for f in fields(Request)} - {"embeddings", "grammar"}
    assert all(getattr(copy, name) == getattr(request_, name) for name in travels) and copy.grammar is None
    # Their rows come from device to device, and those that were consumed are not needed.
    assert copy.embeddings == {"cut": AwaitedRows((4, 8)), "rows": AwaitedRows((4, 8))}
    chunk = PrefillChunk(request_, 7, 12, 8, True, answer=list(range(8)), num_drafted=3)
    later = ScheduledBatch(1, empty, [chunk])
    message = sent(sender, later)
    assert not message.admitted
    (chunk,) = receiver.batch(message).prefills
    assert replace(chunk, request=request_) == later.prefills[0] and chunk.request is copy


def test_a_slot_may_change_hands_within_one_step(request_):
    sender, receiver = BatchSender(), BatchReceiver()
    empty = np.zeros(0, np.int64)
    other = replace(request_, id="b", embeddings={}, spans=())
    receiver.batch(sent(sender, ScheduledBatch(0, empty, [], [Admission(request_, 7, 0)])))
    batch = ScheduledBatch(
        1, empty, [PrefillChunk(other, 7, 0, 4, False)], [Admission(other, 7, 0)], released=[7]
    )
    assert receiver.batch(sent(sender, batch)).prefills[0].request.id == "b"


def test_steady_decode_sends_only_what_changed_and_keeps_the_array(request_):
    """Whoever decodes knows by the array's identity that its slots are on the device already."""
    sender, receiver = BatchSender(), BatchReceiver()
    slots = np.arange(256)
    first = receiver.batch(sent(sender, ScheduledBatch(0, slots, admitted=[Admission(request_, 3, 8)])))
    message = sender.message(ScheduledBatch(1, slots, table_updates=[TableUpdate(3, 2, [77])]), False)
    assert len(pickle.dumps(message, pickle.HIGHEST_PROTOCOL)) < 300
    second = receiver.batch(pickle.loads(pickle.dumps(message)))
    assert second.decode_slots is first.decode_slots and second.table_updates == [TableUpdate(3, 2, [77])]
    third = receiver.batch(sent(sender, ScheduledBatch(2, slots[1:])))
    assert third.decode_slots.tolist() == slots[1:].tolist()


def test_other_ranks_know_which_blocks_a_prompt_gets_and_gives_back(request_):
    """Chunks find the places of their keys and values in the lists of blocks."""
    sender, receiver = BatchSender(), BatchReceiver()
    empty = np.zeros(0, np.int64)
    chunk = PrefillChunk(request_, 7, 8, 4, False)
    updates = [TableUpdate(7, 2, [6], 0), TableUpdate(7, 1, [0], 1), TableUpdate(7, 2, [8], 1)]
    batch = receiver.batch(sent(sender, ScheduledBatch(0, empty, [chunk], [Admission(request_, 7, 8)])))
    batch = receiver.batch(sent(sender, ScheduledBatch(1, empty, [chunk], table_updates=updates)))
    assert batch.prefills[0].request.blocks == [[5, 3, 6], [0, 0, 8]]
