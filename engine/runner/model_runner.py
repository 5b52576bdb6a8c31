"""Turns a scheduled batch into one forward pass and sampled tokens, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from engine.distributed.group import TensorParallelGroup
from engine.graphs import Capture
from engine.kernels.decode_state import DecodeInputs
from engine.kernels.device import use_triton
from engine.kernels.launch import compiling
from engine.kernels.paged import AttentionMetadata
from engine.layers.decoder import Decoder
from engine.request import Request, attributed_to
from engine.runner.cuda_graphs import DecodeGraphs
from engine.runner.device_state import DeviceState
from engine.runner.draft_rows import DraftRows
from engine.runner.embedding_rows import PendingRows
from engine.runner.forward_graphs import ForwardGraphs, captured_sizes
from engine.runner.kv_storage import Caches
from engine.runner.launched_step import LaunchedStep, PromptResults
from engine.runner.pooler import Pooler
from engine.runner.prompt_scorer import PromptScorer
from engine.runner.sampler import Sampler, SamplingPlan
from engine.runner.staging import staging, upload, upload_together
from engine.runner.step_arrays import ChunkArrays, StepArrays, chunk_rows, forced_tokens, to_device
from engine.scheduling.batch import PrefillChunk, ScheduledBatch
from engine.startup import StartTimes
from engine.structured.run_odds import ANY

#: Plans whose sampling is captured with the decode step. Others sample eagerly after a captured forward pass.
_CAPTURED_PLANS = (SamplingPlan(), SamplingPlan(random=True), SamplingPlan(random=True, truncates=True))

GrammarMask = Callable[[list[int], np.ndarray], list[list[int] | None]]


@dataclass(slots=True)
class PreparedStep:
    """A step whose data is on the device, but of which nothing is computed.

    Attributes:
        arrays: what the step needs, on the device.
        plan: how its rows are sampled.
    """

    batch: ScheduledBatch
    arrays: StepArrays[torch.Tensor]
    plan: SamplingPlan


class ModelRunner:
    """Runs one decoder on one device.

    Args:
        model: the decoder with its weights.
        caches: recurrent states have a row for each slot, one for padding, and then those of snapshots.
        block_size: tokens per KV block.
        num_slots: rows of requests.
        max_num_tokens: most tokens of a step.
        max_model_len: longest sequence.
        pooling: requests are for vectors, and want the hidden states of all their tokens.
        capture: captures decode steps and small forward passes; None runs every step eagerly.
        group: the ranks that compute with this one, of which 0 has the embeddings.

    Attributes:
        idle_waits, is_asynchronous: see :class:`engine.core.Runner`.
    """

    idle_waits = False

    def __init__(
        self,
        model: Decoder,
        caches: Caches,
        *,
        block_size: int,
        num_slots: int,
        max_num_tokens: int,
        max_model_len: int,
        pooling: bool,
        capture: Capture | None,
        group: TensorParallelGroup,
    ) -> None:
        self.model = model
        self._group = group
        self.device, self.dtype = model.device, model.dtype
        self.is_asynchronous = self.device.type == "cuda"
        self._caches = caches
        # Of recurrent states.
        self._first_snapshot = num_slots + 1
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._pooling = pooling
        self.vocab_size = model.config.vocab_size
        self._mrope = model.config.rope.mrope_section is not None
        self._both_ways = model.config.both_ways is not None
        model.rotary.reserve_prompt_rows(max_num_tokens)
        self._state = DeviceState(
            num_slots, caches.num_groups, -(-max_model_len // block_size), block_size, self.device
        )
        # query_start of a decode step: each sequence has one token.
        self._each = torch.arange(num_slots + 1, dtype=torch.int32, device=self.device)
        # Flash-decoding counters: one row per sequence of a decode step and one column per KV head.
        self._split_counters = torch.zeros(
            (num_slots, model.num_kv_heads), dtype=torch.int32, device=self.device
        )
        self.sampler = Sampler(num_slots, self.vocab_size, self.device)
        self._pooler = Pooler(model)
        self._scorer = PromptScorer(model)
        self._rows = PendingRows(self.dtype, self.device)
        self._slots_seen: np.ndarray | None = None
        self._slots = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._decodes: DecodeGraphs | None = None
        self._forwards: ForwardGraphs | None = None
        if capture is not None:
            self._decodes = DecodeGraphs(
                self._decode_logits,
                self._decode_sample,
                capture,
                num_slots=num_slots,
                padding_slot=self._state.padding_slot,
                device=self.device,
            )
            self._forwards = ForwardGraphs(
                lambda embeds, positions, *rest: model(embeds, positions, caches.layers, *rest),
                capture,
                sizes=captured_sizes(model.active_layer_parameters(), max_num_tokens),
                width=model.config.hidden_size,
                dtype=self.dtype,
                axes=3 if self._mrope else None,
                deepstack=model.config.num_deepstack,
                max_sequences=num_slots,
                num_groups=caches.num_groups,
                max_blocks=self._state.block_tables.shape[2],
                max_seq_len=max_model_len,
                padding_slot=self._state.padding_slot,
                all_rows=pooling,
                both_ways=self._both_ways,
                takes_ids=model.layer_inputs is not None,
                device=self.device,
            )

    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> LaunchedStep:
        """Enqueue a step.

        Args:
            batch: the step.
            grammar_mask: called after the forward pass was enqueued, with the slots of the sampling rows, to
                write int32 bit masks ``(R, ceil(V / 32))`` of the tokens allowed, and settle the expected
                chunks, see :data:`engine.core.GrammarMask`. Given iff some row has a grammar.

        Raises:
            RequestFault: the work for one request raised.
        """
        return self.compute(self.prepare(batch), grammar_mask)

    @torch.inference_mode()
    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """The part of :meth:`execute` that takes no other rank.

        If it raises, the step can be forgotten: its slots are written again when they are admitted again.
        """
        for slot in batch.released:
            self._release(slot)
        for admission in batch.admitted:
            with attributed_to(admission.request):
                self._admit(admission.request, admission.slot, admission.num_computed)
        self.sampler.flush()
        plan = self.sampler.plan(batch.sampling_slots.tolist())
        rotary = self.model.rotary
        arrays = StepArrays.changes(batch, rotary)
        if batch.prefills:
            arrays.chunks = ChunkArrays.of(
                batch,
                rotary,
                block_size=self._block_size,
                padding=self._padding(batch),
                both_ways=self._both_ways,
            )
        return PreparedStep(batch, to_device(arrays, self.device), plan)

    @torch.inference_mode()
    def compute(self, step: PreparedStep, grammar_mask: GrammarMask | None = None) -> LaunchedStep:
        """Enqueue a prepared step; arguments as for :meth:`execute`."""
        batch, plan = step.batch, step.plan
        self._write(step)
        prompts = PromptResults([], [], [])
        if step.arrays.chunks is not None:
            slots, tokens = step.arrays.chunks.sampling_slots, None
            logits = self._mixed_logits(batch, step.arrays.chunks, prompts)
            for chunk in batch.prefills:
                if chunk.snapshot is not None:
                    self._caches.copy_state(chunk.slot, self._first_snapshot + chunk.snapshot)
        else:
            slots = self._decode_slot_tensor(batch.decode_slots)
            captured = replace(plan, num_logprobs=-1)
            decode = self._decode if self._decodes is None else self._decodes.replay
            logits, tokens = decode(slots, captured if captured in _CAPTURED_PLANS else None)
        if tokens is None:
            mask = None
            forced = None if step.arrays.chunks is None else step.arrays.chunks.forced
            if grammar_mask is not None:
                rows = (len(batch.sampling_slots), -(-self.vocab_size // 32))
                mask = staging(rows, torch.int32, self.device)
                settled = grammar_mask(batch.sampling_slots.tolist(), mask.numpy())
                # A copy that waits would delay the launches of sampling until the forward pass has finished.
                mask = mask.to(self.device, non_blocking=True)
                if settled:
                    slots, forced = self._settle(batch, slots, settled)
            if forced is not None and forced.numel():
                self.sampler.count(forced[0], forced[1], plan)
            drafts = None
            if step.arrays.chunks is not None and step.arrays.chunks.drafts.numel():
                drafts = DraftRows(step.arrays.chunks.drafts)
            tokens = self.sampler.sample(logits, slots, plan, grammar_mask=mask, drafts=drafts)
            if batch.prefills:
                # The mixed pass has already advanced the lengths.
                self._state.take(slots, tokens, drafts)
            else:
                self._state.advance(slots, tokens)
        logprobs = self.sampler.logprobs(logits, tokens, plan)
        return LaunchedStep(tokens, logprobs, prompts, idle_wait=self.idle_waits)

    def _settle(
        self, batch: ScheduledBatch, slots: torch.Tensor, settled: list[list[int] | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the sequences of expected chunks that count for nothing as if the step had left them out.

        Args:
            slots: those that sample.
            settled: what each expected chunk computes behind its first token; None for nothing that counts.

        Returns:
            ``slots`` with the padding slot in place of theirs, and the forced tokens of all other chunks, as
            :class:`ChunkArrays` has them.
        """
        expected = batch.prefills[: len(settled)]
        tokens = [
            (chunk.slot, token) for chunk, run in zip(expected, settled, strict=True) for token in run or ()
        ]
        forced = np.array(tokens, np.int64).reshape(-1, 2).T
        forced = np.concatenate([forced, forced_tokens(batch.prefills)], axis=1)
        in_vain = [number for number, run in enumerate(settled) if run is None]
        if not in_vain:
            return slots, upload(forced, self.device)
        lengths = [(expected[number].slot, expected[number].start) for number in in_vain]
        sampling = batch.sampling_slots.copy()
        sampling[[len(batch.decode_slots) + number for number in in_vain]] = self._state.padding_slot
        slots, counted, (changed, length) = upload_together(
            [sampling, forced, np.array(lengths, np.int64).T], self.device
        )
        self._state.length.index_copy_(0, changed, length)
        return slots, counted

    def recover(self) -> None:
        """Get ready for the next step after one that raised.

        Raises:
            RuntimeError: the device computes no more.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def warm_up(self, times: StartTimes) -> None:
        """Capture all graphs, so that no request waits for a capture; ``times`` gets the phases."""
        with torch.inference_mode():
            if self._forwards is not None:
                with times.phase("graphs of prompts"):
                    self._forwards.capture_all()
            if self._decodes is not None:
                with times.phase("graphs of decode steps"):
                    self._decodes.capture_all(_CAPTURED_PLANS)

    @torch.inference_mode()
    def profile(self, num_tokens: int) -> None:
        """A forward pass over ``num_tokens`` rows that touches no KV block but 0, to measure peak memory."""
        device, zeros = self.device, torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        # No sequence may be longer than the row of its block table.
        longest = min(num_tokens, self._max_model_len)
        starts = torch.tensor([*range(0, num_tokens, longest), num_tokens], dtype=torch.int32, device=device)
        meta = AttentionMetadata(
            block_tables=self._state.block_tables[:, -1:].expand(-1, len(starts) - 1, -1),
            query_start=starts,
            seq_lens=starts.diff(),
            slot_mapping=(zeros - 1).expand(self._caches.num_groups, -1),
            max_query_len=longest,
            max_seq_len=longest,
            state_rows=torch.full((len(starts) - 1,), self._state.padding_slot, device=device),
        )
        positions = zeros.expand(3, -1) if self._mrope else zeros
        hidden = self.model(self.model.embed(zeros), positions, self._caches.layers, meta, ids=zeros)
        rows = hidden[: self._state.padding_slot]
        self.model.logits(rows).float().softmax(-1)

    def compile(self) -> None:
        """Compile the kernels of captured steps, many at a time instead of each at its first use.

        Other runners of the process use them, too.
        """
        if self._decodes is None or self._forwards is None or not use_triton(self._slots):
            return
        padding = self._state.padding_slot
        with torch.inference_mode(), compiling():
            # Powers of two plus the largest size cover every kernel variant.
            for size in {padding, *(1 << power for power in range(padding.bit_length()))}:
                slots = torch.full((size,), padding, dtype=torch.int64, device=self.device)
                inputs = self._state.decode_inputs(slots)
                # No kernel has filled them, and tables that are looked up without a kernel have an end.
                inputs.ids.zero_()
                inputs.positions.zero_()
                logits = self._decode_rows(inputs, slots)
                for plan in _CAPTURED_PLANS:
                    self._decode_sample(slots, logits, plan)
            mask = torch.zeros((len(slots), -(-self.vocab_size // 32)), dtype=torch.int32, device=self.device)
            for plan in _CAPTURED_PLANS:
                self.sampler.sample(logits, slots, replace(plan, grammar=True), grammar_mask=mask)
            self._forwards.rehearse()

    # State.

    def _release(self, slot: int) -> None:
        self._rows.release(slot)
        self._pooler.release(slot)
        self.sampler.release(slot)

    def _admit(self, request: Request, slot: int, num_computed: int) -> None:
        self._rows.admit(request, slot, num_computed)
        if request.pooling is None:
            prompt, output = (
                request.token_ids[: request.num_prompt],
                request.token_ids[request.num_prompt :],
            )
            self.sampler.admit(
                slot,
                request.params,
                prompt,
                output,
                seed=request.seed,
                stop_ids=request.stop_ids,
                max_total=request.max_total,
            )

    def _write(self, step: PreparedStep) -> None:
        """Write what a step changes to the state of its slots."""
        for admission in step.batch.admitted:
            for rows in self._rows.of(admission.slot):
                self._group.broadcast(rows)
            if admission.snapshot is not None:
                self._caches.copy_state(self._first_snapshot + admission.snapshot, admission.slot)
        if step.arrays.tables is not None:
            group, slot, column, block = step.arrays.tables
            self._state.block_tables[group, slot, column] = block.int()
        if step.arrays.chunks is not None and step.arrays.chunks.long_prompts.numel():
            self.model.rotary.write_prompt_rows(*step.arrays.chunks.long_prompts)
        if step.arrays.deltas is not None:
            slot, delta = step.arrays.deltas
            self._state.delta.index_copy_(0, slot, delta)

    def _decode_slot_tensor(self, slots: np.ndarray) -> torch.Tensor:
        """The decoding slots on the device, copied only when the set has changed."""
        if slots is not self._slots_seen:
            self._slots = upload(slots, self.device)
            self._slots_seen = slots
        return self._slots

    # Decode steps: all on the device.

    def _decode(self, slots: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the last token of each row and sample the next; with ``plan`` None stop at the logits."""
        logits = self._decode_logits(slots)
        return logits, None if plan is None else self._decode_sample(slots, logits, plan)

    def _decode_logits(self, slots: torch.Tensor) -> torch.Tensor:
        return self._decode_rows(self._state.decode_inputs(slots), slots)

    def _decode_rows(self, inputs: DecodeInputs, slots: torch.Tensor) -> torch.Tensor:
        meta = AttentionMetadata(
            block_tables=inputs.tables,
            query_start=self._each[: len(inputs.ids) + 1],
            seq_lens=inputs.seq_lens,
            slot_mapping=inputs.kv_slots,
            max_query_len=1,
            max_seq_len=self._max_model_len,
            split_counters=self._split_counters,
            state_rows=slots,
        )
        positions = inputs.positions.expand(3, -1) if self._mrope else inputs.positions
        embeds = self.model.embed(inputs.ids)
        hidden = self.model(embeds, positions, self._caches.layers, meta, ids=inputs.ids)
        return self.model.logits(hidden)

    def _decode_sample(self, slots: torch.Tensor, logits: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
        tokens = self.sampler.sample(logits, slots, plan, grammar_mask=None)
        self._state.advance(slots, tokens)
        return tokens

    # Mixed steps: decodes first, then prompt chunks.

    def _padding(self, batch: ScheduledBatch) -> int:
        """Rows that pad the sampling rows to a captured batch size.

        Kernels of other sizes would be loaded at their first use, which takes the host tens of milliseconds.
        """
        count = len(batch.sampling_slots)
        if self._pooling:
            return 0
        return (max(1, count) if self._decodes is None else self._decodes.size_for(count)) - count

    def _mixed_logits(
        self, batch: ScheduledBatch, chunks: ChunkArrays[torch.Tensor], prompts: PromptResults
    ) -> torch.Tensor:
        """Logits ``(R, V)`` of the rows that sample; the other results of prompts go to ``prompts``."""
        if _wants_all_rows(batch):
            hidden = self._mixed(batch, chunks, None)
            self._read_prompts(batch, hidden, prompts)
            hidden = hidden.index_select(0, chunks.sampling_rows)
        else:
            hidden = self._mixed(batch, chunks, chunks.sampling_rows)
        return self.model.logits(hidden)[: len(chunks.sampling_slots)]

    def _mixed(
        self, batch: ScheduledBatch, chunks: ChunkArrays[torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """One forward pass over decodes and chunks: the hidden states ``(R, H)`` of ``rows``, or of all rows,
        which the next pass may overwrite."""
        state, decodes = self._state, len(batch.decode_slots)
        slots, ids, positions = chunks.slots, chunks.ids, chunks.positions
        lengths, kv_slots = chunks.ends, chunks.kv_slots
        settled = self._choose(chunks, ids, decodes) if chunks.in_flight.numel() else None
        key_ends = chunks.key_ends if self._both_ways else None
        tables = state.block_tables.index_select(1, slots)
        if decodes:
            decoding = state.decode_inputs(slots[:decodes])
            decode_positions = decoding.positions.expand(3, -1) if self._mrope else decoding.positions
            ids = torch.cat([decoding.ids, ids])
            positions = torch.cat([decode_positions, positions], dim=-1)
            lengths = torch.cat([decoding.seq_lens, lengths])
            if key_ends is not None:
                key_ends = torch.cat([decoding.seq_lens, key_ends])
            kv_slots = torch.cat([decoding.kv_slots, kv_slots], dim=1)
        meta = AttentionMetadata(
            block_tables=tables,
            query_start=chunks.query_start.int(),
            seq_lens=lengths.int(),
            slot_mapping=kv_slots,
            max_query_len=max(c.count for c in batch.prefills),
            max_seq_len=self._max_model_len if decodes else max(c.start + c.count for c in batch.prefills),
            key_ends=None if key_ends is None else key_ends.int(),
            state_rows=slots,
        )
        embeds, deepstack = self._embed(batch, ids, chunks.embedded_rows)
        graphs = self._forwards
        if graphs is not None and graphs.all_rows == (rows is None) and graphs.fits(len(embeds), len(slots)):
            hidden = graphs.replay(embeds, positions, meta, deepstack, rows, ids)
        else:
            hidden = self.model(embeds, positions, self._caches.layers, meta, deepstack, rows, ids)
        state.length.index_copy_(0, slots, lengths)
        if settled is not None:
            state.length.index_copy_(0, *settled)
        return hidden

    def _choose(
        self, chunks: ChunkArrays[torch.Tensor], ids: torch.Tensor, decodes: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens of expected chunks to ``ids``, and the rows that sample behind them; return their
        slots, and the lengths of the sequences with them, both ``(E,)``."""
        firsts, slots, lengths = chunks.in_flight
        tokens = self._state.last_token.index_select(0, slots)
        choices, run_lengths = chunks.choices
        # The first choice that fits.
        choice = ((choices == tokens) | (choices == ANY)).int().argmax(dim=0)
        run_length = run_lengths.gather(0, choice[None])[0]
        places, owners = chunks.run_places
        ids.index_copy_(0, firsts, tokens)
        ids.index_copy_(0, places, chunks.runs.gather(0, choice.index_select(0, owners)[None])[0])
        # Expected chunks are the first ones.
        chunks.sampling_rows[decodes : decodes + len(slots)] = decodes + firsts + run_length
        return slots, lengths + run_length

    def _embed(
        self, batch: ScheduledBatch, ids: torch.Tensor, embedded_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings ``(T, H)`` of a step's tokens and media, and the deepstack layers ``(L, T, H)`` of its
        media, if there are any."""
        embeds = self.model.embed(ids)
        parts = self._rows.take(batch)
        if not parts:
            return embeds, None
        media, width = parts[0] if len(parts) == 1 else torch.cat(parts), embeds.shape[1]
        embeds.index_copy_(0, embedded_rows, self.model.scaled_rows(media[:, :width]))
        if media.shape[1] == width:
            return embeds, None
        deepstack = embeds.new_zeros((media.shape[1] // width - 1, *embeds.shape))
        deepstack.index_copy_(1, embedded_rows, media[:, width:].unflatten(1, (-1, width)).transpose(0, 1))
        return embeds, deepstack

    def _read_prompts(self, batch: ScheduledBatch, hidden: torch.Tensor, prompts: PromptResults) -> None:
        """Pool and score the chunks of a step from their hidden states."""
        for chunk, row in chunk_rows(batch):
            request, rows = chunk.request, hidden[row : row + chunk.count]
            try:
                if request.pooling is not None:
                    vector = self._pooler.add(chunk, rows)
                    if vector is not None:
                        prompts.pooled.append((request, vector))
                elif _is_scored(chunk):
                    scores = self._scorer.score(chunk, rows)
                    prompts.scores += [(request, start, values) for start, values in scores]
            except Exception as error:
                if self._group.size > 1:
                    # The other ranks may wait for the logits that this one leaves out.
                    raise
                prompts.failed.append((request, error))

    def check_health(self) -> None:
        """Do nothing: a failure of this process's device shows in its steps."""

    def close(self) -> None:
        """Free the captured graphs; all other memory goes with this object."""
        self._decodes = self._forwards = None

    def check_idle(self, released: Collection[int]) -> None:
        """Raise AssertionError unless all that is held belongs to the slots ``released`` by the next step."""
        assert set(self._rows.slots) <= set(released), "embedding rows of ended requests are still held"
        assert self._pooler.slots <= set(released), "hidden states of ended requests are still held"


def _wants_all_rows(batch: ScheduledBatch) -> bool:
    """Return True if rows that don't sample need their hidden states too."""
    return any(chunk.request.pooling is not None or _is_scored(chunk) for chunk in batch.prefills)


def _is_scored(chunk: PrefillChunk) -> bool:
    """Return True if log-probabilities of the chunk's tokens, which are a prompt's, are wanted."""
    return chunk.answer is None and chunk.request.scores_prompt
