"""Turns a scheduled batch into one forward pass and sampled tokens, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from engine.distributed.group import TensorParallelGroup
from engine.graphs import Capture
from engine.kernels.decode_state import DecodeInputs
from engine.kernels.device import use_triton
from engine.kernels.launch import compiling
from engine.kernels.paged import AttentionMetadata
from engine.kernels.step_inputs import HEADER, StepInputs, StepLayout
from engine.layers.decoder import Decoder
from engine.layers.split_experts import Modalities
from engine.logprobs import LogprobTensors
from engine.request import Request, attributed_to
from engine.runner.cuda_graphs import DecodeGraphs
from engine.runner.device_state import DeviceState
from engine.runner.draft_rows import DraftRows
from engine.runner.embedding_rows import PendingRows
from engine.runner.forward_graphs import ForwardGraphs, MediaRows, captured_sizes
from engine.runner.kv_storage import Caches
from engine.runner.launched_step import LaunchedStep, PromptResults
from engine.runner.pooler import Pooler
from engine.runner.prompt_scorer import PromptScorer
from engine.runner.sampler import Sampler, SamplingPlan
from engine.runner.step_arrays import StepArrays, chunk_rows, forced_tokens
from engine.runner.step_buffer import MOST_CHANGES, HostMemory, StepBuffer, packed_changes
from engine.scheduling.batch import PrefillChunk, ScheduledBatch
from engine.startup import StartTimes
from engine.structured.run_odds import ANY
from engine.transfers import staging, upload, upload_together

#: Plans whose sampling is captured with the decode step. Others sample eagerly after a captured forward pass.
_CAPTURED_PLANS = (SamplingPlan(), SamplingPlan(random=True), SamplingPlan(random=True, truncates=True))

GrammarMask = Callable[[list[int], np.ndarray], list[list[int] | None]]


@dataclass(slots=True)
class PreparedStep:
    """A step whose data is on the device, but of which nothing is computed.

    Attributes:
        others: its further arrays, see :class:`~engine.runner.step_arrays.StepArrays`.
        plan: how its rows are sampled.
        memory: of the host.
        changes: the buffer has changes of the state.
    """

    batch: ScheduledBatch
    others: dict[str, torch.Tensor]
    plan: SamplingPlan
    memory: HostMemory
    changes: bool


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
        rope = model.config.rope
        self._mrope, self._axes = rope.mrope_section is not None, rope.num_axes
        self._both_ways = model.config.both_ways is not None
        self._gaps = model.config.both_ways == "tokens"
        self._vision_tokens = model.config.vision_tokens
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
        self._layout = StepLayout(num_slots, caches.num_groups, self._axes, self._both_ways)
        self._buffer = StepBuffer(self._layout.size(max_num_tokens), num_slots, self.device)
        # Of the latest step: the scheduler's array of sampling slots, how they sample, and the device's
        # array, padded.
        self._slots_sent: np.ndarray | None = None
        self._plan = SamplingPlan()
        self._slots = self._buffer.numbers[HEADER : HEADER + num_slots]
        self._capture = capture
        self._write_changes: Callable[[], Any] = lambda: self._state.write(self._buffer.changes)
        self._decodes: DecodeGraphs | None = None
        self._forwards: ForwardGraphs | None = None
        if capture is not None:
            sizes = captured_sizes(model.active_layer_parameters(), max_num_tokens)
            self._forwards = ForwardGraphs(
                self._gather,
                self._forward,
                capture,
                sizes=sizes,
                inputs=self._room(sizes[-1], num_slots, num_slots),
                step=self._buffer.numbers,
                width=model.config.hidden_size,
                dtype=self.dtype,
                deepstack=len(model.config.deepstack_layers),
                max_seq_len=max_model_len,
                all_rows=pooling,
                both_ways=self._both_ways,
                gaps=self._gaps,
            )
            self._decodes = DecodeGraphs(
                self._decode_logits,
                model.logits,
                self._decode_sample,
                capture,
                slots=self._slots,
                hidden=self._forwards.hidden,
                padding_slot=self._state.padding_slot,
            )

    @torch.inference_mode()
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

    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """The part of :meth:`execute` that takes no other rank. The caller is in inference mode.

        If it raises, the step can be forgotten: its slots are written again when they are admitted again.
        """
        assert torch.is_inference_mode_enabled()
        for slot in batch.released:
            self._release(slot)
        for admission in batch.admitted:
            with attributed_to(admission.request):
                self._admit(admission.request, admission.slot, admission.num_computed)
        if batch.admitted:
            self.sampler.flush()
        # The set of decoding requests changes if one of them is released or admitted.
        slots_known = not batch.prefills and batch.decode_slots is self._slots_sent
        plan = self._plan if slots_known else self.sampler.plan(batch.sampling_slots.tolist())
        arrays = StepArrays.of(
            batch,
            self.model.rotary,
            self._layout,
            slots_known=slots_known,
            padding_slot=self._state.padding_slot,
            block_size=self._block_size,
            max_blocks=self._state.block_tables.shape[2],
            vision_tokens=self._vision_tokens,
        )
        # If it raises, the next step sends its slots again.
        self._slots_sent = None
        memory = self._buffer.host_memory()
        if arrays.changes.shape[1] > MOST_CHANGES:
            self._state.write(packed_changes(arrays.changes, self.device))
            arrays.changes = arrays.changes[:, :0]
        others = self._buffer.send(memory, arrays.changes, arrays.inputs, arrays.others)
        self._slots_sent, self._plan = batch.sampling_slots, plan
        return PreparedStep(batch, others, plan, memory, bool(arrays.changes.size))

    def compute(self, step: PreparedStep, grammar_mask: GrammarMask | None = None) -> LaunchedStep:
        """Enqueue a prepared step; arguments as for :meth:`execute`. The caller is in inference mode."""
        assert torch.is_inference_mode_enabled()
        batch, plan, others = step.batch, step.plan, step.others
        self._write(step)
        prompts = PromptResults([], [], [])
        captured, count = _captured(plan), len(batch.sampling_slots)
        slots, tokens = self._slots[:count], None
        if "forced" in others and grammar_mask is None:
            self.sampler.count(others["forced"][0], others["forced"][1], plan)
        if batch.prefills:
            hidden = self._mixed(batch, others, prompts)
            for chunk in batch.prefills:
                if chunk.snapshot is not None:
                    self._caches.copy_state(chunk.slot, self._first_snapshot + chunk.snapshot)
            if not count:
                return self._launched(slots, None, prompts, step)
            if self._decodes is not None and captured == plan and "drafts" not in others:
                tokens = self._decodes.end(count, plan)
                return self._launched(tokens, None, prompts, step)
            logits = self.model.logits(hidden)[:count]
        elif self._decodes is None:
            logits, tokens = self._decode(slots, captured)
        else:
            logits, tokens = self._decodes.replay(count, captured)
        if tokens is None:
            mask = None
            if grammar_mask is not None:
                mask = staging((count, -(-self.vocab_size // 32)), torch.int32, self.device)
                settled = grammar_mask(batch.sampling_slots.tolist(), mask.numpy())
                # A copy that waits would delay the launches of sampling until the forward pass has finished.
                mask = mask.to(self.device, non_blocking=True)
                forced = others.get("forced")
                if settled:
                    slots, forced = self._settle(batch, slots, settled)
                if forced is not None:
                    self.sampler.count(forced[0], forced[1], plan)
            drafts = DraftRows(others["drafts"]) if "drafts" in others else None
            tokens = self.sampler.sample(logits, slots, plan, grammar_mask=mask, drafts=drafts)
            if drafts is not None:
                self._state.take(slots, tokens, drafts)
            else:
                self._state.advance(slots, tokens)
        logprobs = self.sampler.logprobs(logits, slots, tokens, plan)
        return self._launched(tokens, logprobs, prompts, step)

    def _launched(
        self,
        tokens: torch.Tensor,
        logprobs: LogprobTensors | None,
        prompts: PromptResults,
        step: PreparedStep,
    ) -> LaunchedStep:
        return LaunchedStep(
            tokens, logprobs, prompts, step.memory, self._buffer.give_back, idle_wait=self.idle_waits
        )

    def _settle(
        self, batch: ScheduledBatch, slots: torch.Tensor, settled: list[list[int] | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Leave the sequences of expected chunks that count for nothing as if the step had left them out.

        Args:
            slots: those that sample.
            settled: what each expected chunk computes behind its first token; None for nothing that counts.

        Returns:
            ``slots`` with the padding slot in place of theirs, and the forced tokens of all other chunks, as
            :class:`StepArrays` has them.
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
        changed = np.array(lengths, np.int64).T
        slots, counted, (changed_slots, length) = upload_together([sampling, forced, changed], self.device)
        self._state.length.index_copy_(0, changed_slots, length)
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
                    self._rehearse_modalities()
            if self._decodes is not None:
                with times.phase("graphs of decode steps"):
                    self._decodes.capture_all(_CAPTURED_PLANS)
                    assert self._capture is not None
                    self._write_changes = self._capture(self._write_changes)

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
        positions = zeros.expand(self._axes, -1) if self._mrope else zeros
        modalities = None
        if self._vision_tokens:
            halves = Modalities(*torch.arange(num_tokens, device=device).tensor_split(2))
            modalities = halves, halves
        hidden = self.model(
            self.model.embed(zeros), positions, self._caches.layers, meta, ids=zeros, modalities=modalities
        )
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
            self._rehearse_modalities()

    def _rehearse_modalities(self) -> None:
        """Run what a step with tokens of images or videos runs and no captured one does."""
        if self._vision_tokens:
            assert self._forwards is not None
            self.model.rehearse_modalities(self._forwards.rehearsed_sizes)

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
            )

    def _write(self, step: PreparedStep) -> None:
        """Write what a step changes to the state of its slots."""
        for admission in step.batch.admitted:
            for rows in self._rows.of(admission.slot):
                self._group.broadcast(rows)
            if admission.snapshot is not None:
                self._caches.copy_state(self._first_snapshot + admission.snapshot, admission.slot)
        if step.changes and not step.batch.prefills:
            # Steps with chunks write them when they gather their inputs.
            self._write_changes()
        if "long_prompts" in step.others:
            self.model.rotary.write_prompt_rows(*step.others["long_prompts"])

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
        positions = inputs.positions.expand(self._axes, -1) if self._mrope else inputs.positions
        embeds = self.model.embed(inputs.ids)
        hidden = self.model(embeds, positions, self._caches.layers, meta, ids=inputs.ids)
        return self.model.logits(hidden)

    def _decode_sample(self, slots: torch.Tensor, logits: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
        tokens = self.sampler.sample(logits, slots, plan, grammar_mask=None)
        self._state.advance(slots, tokens)
        return tokens

    # Mixed steps: decodes first, then prompt chunks.

    def _mixed(
        self, batch: ScheduledBatch, others: dict[str, torch.Tensor], prompts: PromptResults
    ) -> torch.Tensor:
        """One forward pass over decodes and chunks: the hidden states ``(R + padding, H)`` of the rows that
        sample, which the next pass may overwrite. The other results of prompts go to ``prompts``."""
        if "in_flight" in others:
            self._choose(batch, others)
        media = self._media(batch, others.get("embedded_rows"))
        graphs, rows, wants_all = self._forwards, self._padded(batch), _wants_all_rows(batch)
        sequences = len(batch.decode_slots) + len(batch.prefills)
        most = max(sequences, rows)
        # How many tokens have which experts is not known when a graph is captured.
        may_replay = "vision" not in others
        if (
            may_replay
            and graphs is not None
            and graphs.all_rows == wants_all
            and graphs.fits(batch.num_tokens, most)
        ):
            every = graphs.replay(batch.num_tokens, most, media)
            hidden = graphs.hidden[:rows]
        else:
            inputs = self._room(batch.num_tokens, sequences, rows)
            modalities = self._modalities(others)
            every = self._mixed_eagerly(batch, inputs, media, modalities, all_rows=wants_all)
            hidden = every.index_select(0, inputs.rows) if wants_all else every
            if graphs is not None:
                hidden = graphs.hidden[:rows].copy_(hidden)
        if wants_all:
            assert every is not None
            self._read_prompts(batch, every, prompts)
        return hidden

    def _padded(self, batch: ScheduledBatch) -> int:
        """The number of a batch's sampling rows, padded to a captured batch size.

        Kernels of other sizes would be loaded at their first use, which takes the host tens of milliseconds.
        """
        count = len(batch.sampling_slots)
        return max(1, count) if self._decodes is None else self._decodes.size_for(count)

    def _room(self, tokens: int, sequences: int, rows: int) -> StepInputs:
        return StepInputs.zeros(
            self._layout, tokens, sequences, rows, self._state.block_tables.shape[2], self.device
        )

    def _gather(self, inputs: StepInputs) -> None:
        """Write the step's changes, and fill ``inputs`` from its arrays and the state of its slots."""
        self._state.write(self._buffer.changes)
        self._state.step_inputs(self._buffer.numbers, self._layout, inputs)

    def _choose(self, batch: ScheduledBatch, others: dict[str, torch.Tensor]) -> None:
        """Complete the step's arrays by the tokens of expected chunks, the rows that sample behind them, and
        the tokens that are computed before a sampled one."""
        numbers, decodes = self._buffer.numbers, len(batch.decode_slots)
        firsts, slots, lengths = others["in_flight"]
        ids, counted, rows = self._layout.expected(
            numbers, len(batch.prefills), batch.num_tokens - decodes, len(slots)
        )
        tokens = self._state.last_token.index_select(0, slots)
        choices, run_lengths = others["choices"]
        # The first choice that fits.
        choice = ((choices == tokens) | (choices == ANY)).int().argmax(dim=0)
        run_length = run_lengths.gather(0, choice[None])[0]
        ids.index_copy_(0, firsts, tokens)
        if "runs" in others:
            places, owners = others["run_places"]
            found = others["runs"].gather(0, choice.index_select(0, owners)[None])[0]
            ids.index_copy_(0, places, found)
        counted.copy_(lengths + run_length)
        rows.copy_(decodes + firsts + run_length)

    def _media(self, batch: ScheduledBatch, embedded_rows: torch.Tensor | None) -> MediaRows | None:
        """Return the rows of a step's media, and the places that take them; None without media."""
        parts = self._rows.take(batch)
        if embedded_rows is None:
            return None
        media, width = parts[0] if len(parts) == 1 else torch.cat(parts), self.model.config.hidden_size
        deepstack = media[:, width:].unflatten(1, (-1, width)).transpose(0, 1)
        return MediaRows(embedded_rows, self.model.scaled_rows(media[:, :width]), deepstack)

    def _modalities(self, others: dict[str, torch.Tensor]) -> tuple[Modalities, Modalities] | None:
        """Return which rows are text and which vision, of all and of those sampled; None if all are text."""
        if "vision" not in others:
            return None
        none = others["vision"][:0]
        all_text, text, vision = (
            others.get(name, none) for name in ("text", "sampled_text", "sampled_vision")
        )
        return Modalities(all_text, others["vision"]), Modalities(text, vision)

    def _forward(
        self,
        inputs: StepInputs,
        meta: AttentionMetadata,
        media: torch.Tensor,
        deepstack: torch.Tensor | None,
    ) -> torch.Tensor:
        """A pass for :class:`ForwardGraphs`."""
        embeds = torch.where(inputs.is_media[:, None], media, self.model.embed(inputs.ids))
        rows = None if self._pooling else inputs.rows
        return self._run(inputs, embeds, meta, deepstack, rows, None)

    def _run(
        self,
        inputs: StepInputs,
        embeds: torch.Tensor,
        meta: AttentionMetadata,
        deepstack: torch.Tensor | None,
        rows: torch.Tensor | None,
        modalities: tuple[Modalities, Modalities] | None,
    ) -> torch.Tensor:
        positions = inputs.positions if self._mrope else inputs.positions[0]
        layers = self._caches.layers
        return self.model(embeds, positions, layers, meta, deepstack, rows, inputs.ids, modalities)

    def _mixed_eagerly(
        self,
        batch: ScheduledBatch,
        inputs: StepInputs,
        media: MediaRows | None,
        modalities: tuple[Modalities, Modalities] | None,
        *,
        all_rows: bool,
    ) -> torch.Tensor:
        """A pass that is not captured: hidden states of the sampling rows, or of all rows."""
        self._gather(inputs)
        ends = [chunk.start + chunk.count for chunk in batch.prefills]
        meta = inputs.metadata(
            max_query_len=max(chunk.count for chunk in batch.prefills),
            max_seq_len=self._max_model_len if len(batch.decode_slots) else max(ends),
            both_ways=self._both_ways,
            gaps=self._gaps,
        )
        embeds, deepstack = self.model.embed(inputs.ids), None
        if media is not None:
            embeds.index_copy_(0, media.places, media.embeds)
            if len(media.deepstack):
                deepstack = embeds.new_zeros((len(media.deepstack), *embeds.shape))
                deepstack.index_copy_(1, media.places, media.deepstack)
        rows = None if all_rows else inputs.rows
        return self._run(inputs, embeds, meta, deepstack, rows, modalities)

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


@lru_cache(256)
def _captured(plan: SamplingPlan) -> SamplingPlan | None:
    """The plan by which captured graphs sample for ``plan``; None if there is none."""
    captured = replace(plan, num_logprobs=-1, wanted_width=0)
    return captured if captured in _CAPTURED_PLANS else None


def _wants_all_rows(batch: ScheduledBatch) -> bool:
    """Return True if rows that don't sample need their hidden states too."""
    return any(chunk.request.pooling is not None or _is_scored(chunk) for chunk in batch.prefills)


def _is_scored(chunk: PrefillChunk) -> bool:
    """Return True if log-probabilities of the chunk's tokens, which are a prompt's, are wanted."""
    return chunk.answer is None and chunk.request.scores_prompt
