"""Turns a scheduled batch into one forward pass and sampled tokens, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.distributed.group import TensorParallelGroup
from engine.graphs import Recorder
from engine.kernels.decode_state import DecodeInputs
from engine.kernels.device import use_triton
from engine.kernels.launch import compiling
from engine.kernels.paged import AttentionMetadata, KVCache
from engine.layers.decoder import Decoder
from engine.logprobs import LogprobTensors, prompt_logprobs
from engine.request import Request
from engine.runner.cuda_graphs import DecodeGraphs
from engine.runner.forward_graphs import ForwardGraphs, recorded_sizes
from engine.runner.input_batch import (
    DeviceState,
    SlotInfo,
    chunk_kv_slots,
    chunk_positions,
    embedding_tensor,
    long_prompt_rows,
    span_rows,
    table_updates,
)
from engine.runner.pooler import Pooler
from engine.runner.sampler import Sampler, SamplingPlan
from engine.runner.staging import download, download_logprobs, record_event, upload
from engine.scheduling.batch import ScheduledBatch, StepResult

#: Rows whose logits are computed at once for log-probabilities of the prompt.
_LOGPROB_ROWS = 512

#: Ways of sampling that are recorded; others sample after a recorded forward pass.
_CAPTURED_PLANS = (SamplingPlan(), SamplingPlan(random=True), SamplingPlan(random=True, truncates=True))

GrammarMask = Callable[[list[int]], np.ndarray]
Positions = Callable[[Request], tuple[np.ndarray, int] | None]


class PendingStep:
    """A step on its way. :meth:`result` waits for it."""

    def __init__(
        self,
        tokens: torch.Tensor,
        logprobs: LogprobTensors | None,
        prompt_logprobs: list[tuple[Request, int, LogprobTensors]],
        pooled: list[tuple[Request, torch.Tensor]],
    ) -> None:
        self._tokens = download(tokens)
        self._logprobs = None if logprobs is None else download_logprobs(logprobs)
        self._prompt_logprobs = [(r, start, download_logprobs(found)) for r, start, found in prompt_logprobs]
        self._pooled = [(request, download(vector)) for request, vector in pooled]
        # One event after all copies: they are on one stream.
        self._event = record_event(tokens.device)

    def ready(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return self._event is None or self._event.query()

    def result(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        pooled = [(request, vector.numpy().copy()) for request, vector in self._pooled]
        return StepResult(self._tokens.numpy().copy(), self._logprobs, self._prompt_logprobs, pooled)


class ModelRunner:
    """Runs one decoder on one device.

    Args:
        model: the decoder with its weights.
        kv: the KV cache of each layer.
        block_size: tokens per KV block.
        num_slots: rows of requests.
        max_num_tokens: most tokens of a step.
        max_model_len: longest sequence.
        positions: rotary positions of a request's prompt, as the model's family defines them.
        pooling: requests are for vectors, and want the hidden states of all their tokens.
        record: records decode steps and small forward passes, to be replayed; None: all is launched anew.
        group: the ranks that compute with this one, of which 0 has the embeddings.
    """

    def __init__(
        self,
        model: Decoder,
        kv: list[KVCache],
        *,
        block_size: int,
        num_slots: int,
        max_num_tokens: int,
        max_model_len: int,
        positions: Positions,
        pooling: bool,
        record: Recorder | None,
        group: TensorParallelGroup,
    ) -> None:
        self.model = model
        self._group = group
        self.device = kv[0].keys.device
        self.dtype = kv[0].keys.dtype
        self._kv = kv
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._positions = positions
        self._pooling = pooling
        self.vocab_size = model.config.vocab_size
        self._mrope = model.config.rope.mrope_section is not None
        model.rotary.reserve_prompt_rows(max_num_tokens)
        self._state = DeviceState(num_slots, -(-max_model_len // block_size), block_size, self.device)
        # Where the tokens of a decode step begin: each sequence has one.
        self._each = torch.arange(num_slots + 1, dtype=torch.int32, device=self.device)
        # Flash-decoding counters: one row per sequence of a decode step and one column per KV head.
        self._split_counters = torch.zeros((num_slots, kv[0].kv_heads), dtype=torch.int32, device=self.device)
        self.sampler = Sampler(num_slots, self.vocab_size, self.device)
        self._pooler = Pooler()
        self._info: dict[int, SlotInfo] = {}
        self._slots_seen: np.ndarray | None = None
        self._slots = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._decodes: DecodeGraphs | None = None
        self._forwards: ForwardGraphs | None = None
        if record is not None:
            self._decodes = DecodeGraphs(
                self._decode_logits,
                self._decode_sample,
                record,
                num_slots=num_slots,
                padding_slot=self._state.padding_slot,
                device=self.device,
            )
            self._forwards = ForwardGraphs(
                lambda embeds, positions, meta, rows: model(embeds, positions, kv, meta, rows=rows),
                record,
                sizes=recorded_sizes(
                    sum(parameter.numel() for parameter in model.layers[0].parameters()), max_num_tokens
                ),
                width=model.config.hidden_size,
                dtype=self.dtype,
                axes=3 if self._mrope else None,
                max_sequences=num_slots,
                max_blocks=self._state.block_tables.shape[1],
                max_seq_len=max_model_len,
                all_rows=pooling,
                device=self.device,
            )

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, grammar_mask: GrammarMask | None = None) -> PendingStep:
        """Enqueue a step.

        Args:
            batch: the step.
            grammar_mask: called after the forward pass was enqueued, with the slots of the sampling rows;
                int32 bit masks ``(R, ceil(V / 32))`` of the tokens allowed. Given iff some row has a grammar.
        """
        for slot in batch.released:
            self._release(slot)
        places = self._apply(batch)
        plan = self.sampler.plan(batch.sampling_slots.tolist())
        found: list[tuple[Request, int, LogprobTensors]] = []
        pooled: list[tuple[Request, torch.Tensor]] = []
        if batch.prefills:
            slots, tokens = places["sampling_slots"], None
            if _wants_all_rows(batch):
                hidden = self._mixed(batch, places, None)
                self._pool(batch, hidden, pooled)
                self._score_prompts(batch, hidden, found)
                hidden = hidden.index_select(0, places["rows"])
            else:
                hidden = self._mixed(batch, places, places["rows"])
            logits = self.model.logits(hidden)[: len(slots)]
        else:
            slots = self._decode_slot_tensor(batch.decode_slots)
            captured = replace(plan, num_logprobs=-1)
            step = self._decode if self._decodes is None else self._decodes.replay
            logits, tokens = step(slots, captured if captured in _CAPTURED_PLANS else None)
        if tokens is None:
            mask = None
            if grammar_mask is not None:
                mask = torch.from_numpy(grammar_mask(batch.sampling_slots.tolist())).to(self.device)
            tokens = self.sampler.sample(logits, slots, plan, grammar_mask=mask)
            if batch.prefills:
                # Lengths are those after the pass already.
                self._state.last_token.index_copy_(0, slots, tokens)
            else:
                self._state.advance(slots, tokens)
        return PendingStep(tokens, self.sampler.logprobs(logits, tokens, plan), found, pooled)

    def warm_up(self) -> None:
        """Record what is recorded at all, so that no request waits for it."""
        with torch.inference_mode():
            if self._forwards is not None:
                self._forwards.capture()
            if self._decodes is not None:
                self._decodes.capture(_CAPTURED_PLANS)

    @torch.inference_mode()
    def profile(self, num_tokens: int) -> None:
        """A forward pass over ``num_tokens`` rows that touches no KV block but 0, to measure peak memory."""
        device, zeros = self.device, torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        # No sequence may be longer than the row of its block table.
        longest = min(num_tokens, self._max_model_len)
        starts = torch.tensor([*range(0, num_tokens, longest), num_tokens], dtype=torch.int32, device=device)
        meta = AttentionMetadata(
            block_tables=self._state.block_tables[-1:].expand(len(starts) - 1, -1),
            query_start=starts,
            seq_lens=starts.diff(),
            slot_mapping=zeros - 1,
            max_query_len=longest,
            max_seq_len=longest,
        )
        positions = zeros.expand(3, -1) if self._mrope else zeros
        hidden = self.model(self.model.embed(zeros), positions, self._kv, meta)
        rows = hidden[: self._state.padding_slot]
        self.model.logits(rows).float().softmax(-1)

    def compile(self) -> None:
        """Compile the kernels of what is recorded, many at a time and not each where it comes up first. Other
        runners of the process have them then, too."""
        if self._decodes is None or self._forwards is None or not use_triton(self._slots):
            return
        padding = self._state.padding_slot
        with torch.inference_mode(), compiling():
            # Batches that differ in their kernels differ by more than a factor of two, but for the largest.
            for size in {padding, *(1 << power for power in range(padding.bit_length()))}:
                slots = torch.full((size,), padding, dtype=torch.int64, device=self.device)
                inputs = self._state.decode_inputs(slots)
                # No kernel has filled it, and the table of embeddings has an end.
                inputs.ids.zero_()
                logits = self._decode_rows(inputs)
                for plan in _CAPTURED_PLANS:
                    self._decode_sample(slots, logits, plan)
            self._forwards.rehearse()

    # State.

    def _release(self, slot: int) -> None:
        self._info.pop(slot, None)
        self._pooler.release(slot)
        self.sampler.release(slot)

    def _apply(self, batch: ScheduledBatch) -> dict[str, torch.Tensor]:
        """Write what changed to the device, together with this step's own arrays."""
        for admission in batch.admitted:
            self._admit(admission.request, admission.slot, admission.num_computed)
        self.sampler.flush()
        arrays: dict[str, np.ndarray] = {}
        updates = table_updates(batch)
        if updates.size:
            arrays["tables"] = updates
        if batch.admitted:
            slots = [a.slot for a in batch.admitted]
            arrays["deltas"] = np.array([slots, [self._info[s].delta for s in slots]], np.int64)
        if batch.prefills:
            arrays |= self._mixed_arrays(batch)
        if not arrays:
            return {}
        places = upload(arrays, self.device)
        if "tables" in places:
            slot, column, block = places["tables"]
            self._state.block_tables[slot, column] = block.int()
        if "long_prompts" in places:
            self.model.rotary.write_prompt_rows(*places["long_prompts"])
        if "deltas" in places:
            slot, delta = places["deltas"]
            self._state.delta.index_copy_(0, slot, delta)
        return places

    def _admit(self, request: Request, slot: int, num_computed: int) -> None:
        found = self._positions(request) if self._mrope else None
        positions, delta = found or (None, self.model.rotary.offset(request.rope_variant))
        rows = {
            span.item.hash: self._group.broadcast(
                embedding_tensor(request.embeddings[span.item.hash], self.dtype, self.device)
            )
            for span in request.spans
            if span.offset + span.length > num_computed
        }
        self._info[slot] = SlotInfo(positions, delta, rows)
        if request.pooling is None:
            prompt, output = (
                request.token_ids[: request.num_prompt],
                request.token_ids[request.num_prompt :],
            )
            self.sampler.admit(
                slot, request.params, prompt, output, seed=request.seed, stop_ids=request.stop_ids
            )

    def _decode_slot_tensor(self, slots: np.ndarray) -> torch.Tensor:
        """The decoding slots on the device, copied only when the set has changed."""
        if slots is not self._slots_seen:
            self._slots_seen = slots
            self._slots = upload({"slots": slots}, self.device)["slots"]
        return self._slots

    # Decode steps: all on the device.

    def _decode(self, slots: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the last token of each row and sample the next; with ``plan`` None stop at the logits."""
        logits = self._decode_logits(slots)
        return logits, None if plan is None else self._decode_sample(slots, logits, plan)

    def _decode_logits(self, slots: torch.Tensor) -> torch.Tensor:
        return self._decode_rows(self._state.decode_inputs(slots))

    def _decode_rows(self, inputs: DecodeInputs) -> torch.Tensor:
        meta = AttentionMetadata(
            block_tables=inputs.tables,
            query_start=self._each[: len(inputs.ids) + 1],
            seq_lens=inputs.seq_lens,
            slot_mapping=inputs.kv_slots,
            max_query_len=1,
            max_seq_len=self._max_model_len,
            split_counters=self._split_counters,
        )
        positions = inputs.positions.expand(3, -1) if self._mrope else inputs.positions
        hidden = self.model(self.model.embed(inputs.ids), positions, self._kv, meta)
        return self.model.logits(hidden)

    def _decode_sample(self, slots: torch.Tensor, logits: torch.Tensor, plan: SamplingPlan) -> torch.Tensor:
        tokens = self.sampler.sample(logits, slots, plan, grammar_mask=None)
        self._state.advance(slots, tokens)
        return tokens

    # Mixed steps: decodes first, then prompt chunks.

    def _mixed_arrays(self, batch: ScheduledBatch) -> dict[str, np.ndarray]:
        chunks, decodes = batch.prefills, len(batch.decode_slots)
        infos = [self._info[chunk.slot] for chunk in chunks]
        ends = np.array([c.start + c.count for c in chunks], np.int64)
        last_rows = decodes + np.cumsum([c.count for c in chunks]) - 1
        samples = np.array([c.completes and c.request.pooling is None for c in chunks], bool)
        positions = [
            chunk_positions(i, c.start, c.count, self._mrope) for i, c in zip(infos, chunks, strict=True)
        ]
        more: dict[str, np.ndarray] = {}
        if self.model.rotary.first_prompt_row:
            rows = long_prompt_rows(chunks, positions, self.model.rotary.first_prompt_row)
            more = {"long_prompts": rows} if rows.size else {}
        return {
            **more,
            "ids": np.concatenate([c.request.token_ids[c.start : c.start + c.count] for c in chunks]),
            "positions": np.concatenate(positions, axis=-1),
            "kv_slots": np.concatenate([chunk_kv_slots(c, self._block_size) for c in chunks]),
            "query_start": np.concatenate([np.arange(decodes + 1), last_rows + 1]),
            "slots": np.concatenate([batch.decode_slots, [c.slot for c in chunks]]),
            "ends": ends,
            "rows": self._padded(np.concatenate([np.arange(decodes), last_rows[samples]])),
            "sampling_slots": batch.sampling_slots,
            "embed_places": self._embed_places(batch),
        }

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        """The rows that sample, and row 0 again and again up to the next recorded batch size: the kernels of
        other sizes would be loaded when they come up first, which takes the host tens of milliseconds."""
        if self._pooling:
            return rows
        size = max(1, len(rows)) if self._decodes is None else self._decodes.size_for(len(rows))
        return np.concatenate([rows, np.zeros(size - len(rows), np.int64)])

    def _embed_places(self, batch: ScheduledBatch) -> np.ndarray:
        """Batch rows that embedding rows overwrite, in the order of :meth:`_embed_rows`."""
        places, row = [np.zeros(0, np.int64)], len(batch.decode_slots)
        for chunk in batch.prefills:
            end = chunk.start + chunk.count
            places += [span_rows(span, chunk.start, end)[2] + row for span in chunk.request.spans]
            row += chunk.count
        return np.concatenate(places)

    def _embed_rows(self, batch: ScheduledBatch) -> list[torch.Tensor]:
        """Embedding rows that this step consumes; those of items that end in it are let go."""
        rows: list[torch.Tensor] = []
        for chunk in batch.prefills:
            info, end = self._info[chunk.slot], chunk.start + chunk.count
            for span in chunk.request.spans:
                first, last, _ = span_rows(span, chunk.start, end)
                if last > first:
                    rows.append(info.rows[span.item.hash][first:last])
            pending = {s.item.hash for s in chunk.request.spans if s.offset + s.length > end}
            info.rows = {key: value for key, value in info.rows.items() if key in pending}
        return rows

    def _mixed(
        self, batch: ScheduledBatch, places: dict[str, torch.Tensor], rows: torch.Tensor | None
    ) -> torch.Tensor:
        """One forward over decodes and chunks: the hidden states ``(R, H)`` of ``rows``, or of all, which the
        next may overwrite."""
        state, decodes = self._state, len(batch.decode_slots)
        slots, ids, positions = places["slots"], places["ids"], places["positions"]
        lengths, kv_slots = places["ends"], places["kv_slots"]
        tables = state.block_tables.index_select(0, slots)
        if decodes:
            decoding = state.decode_inputs(slots[:decodes])
            decode_positions = decoding.positions.expand(3, -1) if self._mrope else decoding.positions
            ids = torch.cat([decoding.ids, ids])
            positions = torch.cat([decode_positions, positions], dim=-1)
            lengths = torch.cat([decoding.seq_lens, lengths])
            kv_slots = torch.cat([decoding.kv_slots, kv_slots])
        meta = AttentionMetadata(
            block_tables=tables,
            query_start=places["query_start"].int(),
            seq_lens=lengths.int(),
            slot_mapping=kv_slots,
            max_query_len=max(c.count for c in batch.prefills),
            max_seq_len=self._max_model_len if decodes else max(c.start + c.count for c in batch.prefills),
        )
        embeds = self.model.embed(ids)
        deepstack = None
        if parts := self._embed_rows(batch):
            media, width = parts[0] if len(parts) == 1 else torch.cat(parts), embeds.shape[1]
            embeds.index_copy_(0, places["embed_places"], media[:, :width])
            if media.shape[1] > width:
                deepstack = embeds.new_zeros((media.shape[1] // width - 1, *embeds.shape))
                layers = media[:, width:].unflatten(1, (-1, width)).transpose(0, 1)
                deepstack.index_copy_(1, places["embed_places"], layers)
        graphs = self._forwards
        if (
            graphs is not None
            and graphs.all_rows == (rows is None)
            and graphs.fits(len(embeds), len(slots))
            and deepstack is None
        ):
            hidden = graphs.replay(embeds, positions, meta, rows)
        else:
            hidden = self.model(embeds, positions, self._kv, meta, deepstack, rows)
        state.length.index_copy_(0, slots, lengths)
        return hidden

    def _pool(self, batch: ScheduledBatch, hidden: torch.Tensor, pooled: list) -> None:
        row = len(batch.decode_slots)
        for chunk in batch.prefills:
            if chunk.request.pooling is not None:
                vector = self._pooler.add(chunk, hidden[row : row + chunk.count])
                if vector is not None:
                    pooled.append((chunk.request, vector))
            row += chunk.count

    def _score_prompts(
        self,
        batch: ScheduledBatch,
        hidden: torch.Tensor,
        found: list[tuple[Request, int, LogprobTensors]],
    ) -> None:
        """Log-probabilities of prompt tokens, each from the hidden state of the token before it."""
        row = len(batch.decode_slots)
        for chunk in batch.prefills:
            wanted, request = chunk.request.params.prompt_logprobs, chunk.request
            end = min(chunk.start + chunk.count + 1, request.num_prompt)
            if wanted is not None and request.num_preemptions == 0:
                targets = request.token_ids[chunk.start + 1 : end]
                for first in range(0, len(targets), _LOGPROB_ROWS):
                    ids = torch.tensor(targets[first : first + _LOGPROB_ROWS], device=self.device)
                    logits = self.model.logits(hidden[row + first : row + first + len(ids)])
                    found.append((request, chunk.start + 1 + first, prompt_logprobs(logits, ids, wanted)))
            row += chunk.count

    def check_health(self) -> None:
        """A device of this process fails in its steps; there is nothing else to ask."""

    def close(self) -> None:
        """Let go of what was recorded; all other memory goes with the object."""
        self._decodes = self._forwards = None

    def check_idle(self) -> None:
        """Raise AssertionError unless no request is remembered but those released in the next step."""
        assert not self._pooler._partial, "hidden states of ended requests are still held"


def _wants_all_rows(batch: ScheduledBatch) -> bool:
    """Whether hidden states of more rows are wanted than of those that sample."""
    requests = (chunk.request for chunk in batch.prefills)
    return any(r.pooling is not None or r.params.prompt_logprobs is not None for r in requests)
