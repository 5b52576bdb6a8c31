"""Sampled tokens to text: detokenization, stop strings, and the updates that streams are made of."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from engine.constraints import dead_end
from engine.errors import RequestFailed, SightlineError
from engine.logprobs import LogprobTensors
from engine.mailbox import Result
from engine.metrics import EngineMetrics
from engine.outputs import (
    EmbeddingOutput,
    EngineTimes,
    FinishReason,
    OutputDelta,
    StreamUpdate,
    TokenLogprob,
    merge_updates,
)
from engine.request import Request
from engine.request_group import ChoiceText, RequestGroup
from engine.scheduling.batch import StepEvents
from engine.text.token_texts import TokenTexts
from engine.text.tokenizer import Tokenizer
from engine.token_rows import token_row

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Found:
    """Results of the steps of one call, as they are collected.

    Attributes:
        changed: groups and their updates, by the group's id.
        deltas: by the request's id.
        pooled: groups that have ended with a vector.
        stopped: requests to be aborted.
        ended: ids of groups of which a sequence has ended.
    """

    changed: dict[str, tuple[RequestGroup, StreamUpdate]] = field(default_factory=dict)
    deltas: dict[str, OutputDelta] = field(default_factory=dict)
    pooled: list[tuple[RequestGroup, EmbeddingOutput]] = field(default_factory=list)
    stopped: list[Request] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)


class OutputProcessor:
    """Keeps the text side of every running request. Used by one thread.

    Args:
        tokenizer: the model's.
        metrics: takes times and counts.
        interval: tokens of one choice that an update holds at least, but for the first and the last.
    """

    def __init__(self, tokenizer: Tokenizer, metrics: EngineMetrics, interval: int = 1) -> None:
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._interval = interval
        self._running: dict[str, tuple[RequestGroup, ChoiceText]] = {}
        self._failures: list[tuple[RequestGroup, SightlineError]] = []

    def add(self, group: RequestGroup) -> None:
        """Begin a request. If that raises, the request ends with the next :meth:`process`."""
        try:
            self._add(group)
        except Exception as error:
            self._fail(group, error)

    def _add(self, group: RequestGroup) -> None:
        for request in group.requests:
            known = group.progress.of(request.choice)
            sequence = group.sequences[request.id] = ChoiceText.of(request, self._tokenizer, known)
            self._running[request.id] = group, sequence

    def remove(self, group: RequestGroup) -> None:
        """Forget a group that ended or was aborted."""
        for request in group.requests:
            self._running.pop(request.id, None)

    @property
    def num_groups(self) -> int:
        return len({group for group, _ in self._running.values()})

    def process(self, steps: Iterable[StepEvents]) -> tuple[list[tuple[RequestGroup, Result]], list[Request]]:
        """Turn finished steps into updates, one per group however many steps there are.

        An exception of one group's text ends that group with an error, behind the text before it.

        Returns:
            The updates, then the errors; and the requests to be aborted, because a stop string or an error
            ended them.
        """
        found = _Found()
        for step in steps:
            self._prompt_logprobs(step, found.changed)
            self._take(step, found)
            found.pooled += self._pooled(step)
            for request, cause in step.failed:
                if request.id in self._running:
                    self._fail(self._running[request.id][0], cause)
        failures, self._failures = self._failures, []
        for group, _ in failures:
            # What came before the error is given. It may have come with it, if the steps were taken together.
            if group.held is not None:
                self._update(group, found.changed)
            elif group.id in found.changed and _is_empty(found.changed[group.id][1]):
                del found.changed[group.id]
            found.stopped += [request for request in group.requests if not request.finished]
        failed = {group.id for group, _ in failures}
        self._end(found.changed[name] for name in found.ended - failed)
        given = list(found.changed.values())
        if self._interval > 1:
            given = list(self._held_back(given, failed))
        return [*given, *found.pooled, *failures], found.stopped

    def _held_back(
        self, updates: Iterable[tuple[RequestGroup, StreamUpdate]], failed: Collection[str]
    ) -> Iterator[tuple[RequestGroup, StreamUpdate]]:
        """The updates that don't wait for more tokens, each with what has waited for it."""
        for group, update in updates:
            whole = update if group.held is None else merge_updates(group.held, update)
            group.held = whole if self._waits(whole) and group.id not in failed else None
            if group.held is None:
                yield group, whole

    def _waits(self, update: StreamUpdate) -> bool:
        """Return whether an update waits for more tokens: it is not the first, nor a choice's last, and holds
        fewer than it should."""
        if update.times is not None or update.prompt_logprobs is not None:
            return False
        return all(d.finish_reason is None and len(d.token_ids) < self._interval for d in update.deltas)

    def _take(self, step: StepEvents, found: _Found) -> None:
        """Add a step's tokens to their sequences' deltas."""
        running, changed, deltas = self._running, found.changed, found.deltas
        # How many requests got their last token when: most of them in the same step.
        previous: dict[float, int] = {}
        time, count = step.time, 0
        finished, opening, forced = step.finished, step.opening, step.forced
        for row, (request, token) in enumerate(zip(step.requests, step.tokens.tolist(), strict=True)):
            if request is None or (entry := running.get(request.id)) is None or entry[1].done:
                continue
            group, sequence = entry
            try:
                if (delta := deltas.get(request.id)) is None:
                    delta = deltas[request.id] = OutputDelta(sequence.index, "", [])
                    self._update(group, changed).deltas.append(delta)
                if sequence.plain and row not in finished:
                    if row in opening:
                        for before in opening[row]:
                            self._continue(delta, group, sequence, before)
                            count += 1
                    self._continue(delta, group, sequence, token)
                    count += 1
                    if row in forced:
                        for following in forced[row]:
                            self._continue(delta, group, sequence, following)
                            count += 1
                else:
                    count += self._extend_all(delta, group, sequence, row, step)
                    if delta.finish_reason is not None:
                        found.ended.add(group.id)
                        if not request.finished:
                            found.stopped.append(request)
            except Exception as error:
                self._fail(group, error)
                continue
            if token < 0:
                continue
            if (last := group.last_token_at) is None:
                self._note_first(group, time, changed[group.id][1])
            elif last != time:
                previous[last] = previous.get(last, 0) + 1
                group.last_token_at = time
        for last, tokens in previous.items():
            self._metrics.observe_gap(time - last, tokens)
        self._metrics.observe_tokens(count, step.time)

    def _end(self, updates: Iterable[tuple[RequestGroup, StreamUpdate]]) -> None:
        """Mark those updates that complete their groups, and forget these."""
        for group, update in updates:
            update.finished = group.finished
            if update.finished:
                self._metrics.observe_finish(group.usage)
                self.remove(group)

    def _fail(self, group: RequestGroup, error: Exception) -> None:
        self.remove(group)
        if not isinstance(error, SightlineError):
            logger.error("request %s failed", group.id, exc_info=error)
            failure = RequestFailed(
                f"This request failed inside the engine ({type(error).__name__}); other requests are not "
                "affected. The server's log says more."
            )
            failure.__cause__ = error
            error = failure
        self._failures.append((group, error))

    def _continue(self, delta: OutputDelta, group: RequestGroup, sequence: ChoiceText, token: int) -> None:
        """Add a token of a plain sequence that doesn't end it; as :meth:`_extend` would."""
        usage = group.usage
        if not usage.completion_tokens:
            usage.cached_tokens = sequence.request.num_cached or 0
        usage.completion_tokens += 1
        if text := sequence.detokenizer.append_one(token):
            sequence.num_characters += len(text)
            delta.text = delta.text + text if delta.text else text
        delta.token_ids.append(token)

    def _extend_all(
        self, delta: OutputDelta, group: RequestGroup, sequence: ChoiceText, row: int, step: StepEvents
    ) -> int:
        """Add the token of ``row`` and those forced around it, up to the sequence's end; return how many were
        added."""
        tokens = [*step.opening.get(row, ()), int(step.tokens[row]), *step.forced.get(row, ())]
        for number, token in enumerate(tokens, start=1):
            reason = step.finished.get(row) if number == len(tokens) else None
            self._extend(delta, group, sequence, token, row, step, reason)  # type: ignore[arg-type]
            if sequence.done:
                return number if token >= 0 else number - 1
        return len(tokens)

    def _extend(
        self,
        delta: OutputDelta,
        group: RequestGroup,
        sequence: ChoiceText,
        token: int,
        row: int,
        step: StepEvents,
        reason: FinishReason | None,
    ) -> None:
        """Add a token that ``step`` gave in ``row``; ``reason`` is that of the sequence's end with it."""
        request = sequence.request
        if reason == "error":
            sequence.give(delta, sequence.detokenizer.finish())
            delta.finish_reason = reason
            delta.stop_reason = dead_end(request.params, sequence.detokenizer.num_tokens_consumed)
            sequence.done = True
            sequence.settle(delta)
            return
        if group.usage.completion_tokens == 0:
            group.usage.cached_tokens = request.num_cached or 0
        group.usage.completion_tokens += 1
        text = ""
        if sequence.watch is not None and sequence.watch.add(token) and reason is None:
            # Behind what another engine made, too, and not within the tokens that must come.
            made = sequence.detokenizer.num_tokens_consumed + 1
            reason = "repetition" if made >= request.params.min_tokens else None
        adds_text = reason != "stop" or request.params.include_stop_str_in_output
        if adds_text:
            text = sequence.detokenizer.append_one(token)
        if reason is not None:
            text += sequence.detokenizer.finish()
        if sequence.detokenizer.stop_reason is not None:
            delta.stop_reason = sequence.detokenizer.stop_reason
            delta.finish_reason = "stop"
        elif reason is not None:
            delta.finish_reason = reason
            if reason == "stop" and token in request.params.stop_token_ids:
                delta.stop_reason = token
            elif reason == "repetition":
                delta.stop_reason = "repetition_detected"
        sequence.give(delta, text)
        sequence.done = delta.finish_reason is not None
        count = request.params.logprobs
        if count is None or step.logprobs is None:
            delta.token_ids.append(token)
        else:
            wanted = request.params.logprob_token_ids
            found = token_row(
                step.logprobs, row, token, count, sequence.texts, wanted=wanted, adds_text=adds_text
            )
            sequence.give_row(delta, token, found)

    def _update(
        self, group: RequestGroup, changed: dict[str, tuple[RequestGroup, StreamUpdate]]
    ) -> StreamUpdate:
        found = changed.get(group.id)
        if found is not None:
            return found[1]
        update = StreamUpdate(group.id, [], group.usage)
        if group.num_scored == 0 and group.requests[0].params.prompt_logprobs is not None:
            # Nothing comes before the prompt's first token.
            update.prompt_logprobs, group.num_scored = [None], 1
        changed[group.id] = (group, update)
        return update

    def _prompt_logprobs(
        self, step: StepEvents, changed: dict[str, tuple[RequestGroup, StreamUpdate]]
    ) -> None:
        for request, start, values in step.prompt_logprobs:
            group, _ = self._running.get(request.id, (None, None))
            if group is None or request is not group.requests[0]:
                continue
            try:
                update = self._update(group, changed)
                update.prompt_logprobs = update.prompt_logprobs or []
                update.prompt_logprobs += self._scores(group, request, start, values)
            except Exception as error:
                self._fail(group, error)

    def _scores(
        self, group: RequestGroup, request: Request, start: int, values: LogprobTensors
    ) -> list[dict[int, TokenLogprob] | None]:
        """Log-probabilities of the prompt's tokens from ``start`` on, without those given already: a request
        preempted in mid-prompt is scored again from its beginning."""
        wanted = request.params.prompt_logprobs
        assert wanted is not None and start <= group.num_scored, "a part of the prompt was not scored"
        first, end = group.num_scored, start + len(values.token_logprobs)
        group.num_scored = max(first, end)
        texts = self._prompt_texts(group)
        return [
            token_row(values, position - start, request.token_ids[position], wanted, texts)
            for position in range(first, end)
        ]

    def _prompt_texts(self, group: RequestGroup) -> TokenTexts:
        """The texts of the prompt's tokens, as far as they are scored."""
        if group.prompt_texts is None:
            group.prompt_texts = TokenTexts(self._tokenizer, at_start=True)
            group.prompt_texts.take(group.requests[0].token_ids[0])
        return group.prompt_texts

    def _pooled(self, step: StepEvents) -> Iterable[tuple[RequestGroup, EmbeddingOutput]]:
        for request, vector in step.pooled:
            group, _ = self._running.get(request.id, (None, None))
            if group is None:
                continue
            try:
                group.usage.cached_tokens = request.num_cached or 0
                output = EmbeddingOutput(group.id, request.token_ids, [], group.usage)
                if vector.ndim == 1:
                    output.embedding = _floats(vector)
                else:
                    output.token_embeddings = vector
            except Exception as error:
                self._fail(group, error)
                continue
            group.sequences[request.id].done = True
            self.remove(group)
            yield group, output

    def _note_first(self, group: RequestGroup, now: float, update: StreamUpdate) -> None:
        request = group.requests[0]
        self._metrics.observe_first_token(request.arrival, request.admitted_at, now)
        admitted = request.admitted_at or now
        update.times = EngineTimes(admitted - request.arrival, now - admitted)
        group.last_token_at = now


def _is_empty(update: StreamUpdate) -> bool:
    return update.prompt_logprobs is None and not any(delta.token_ids for delta in update.deltas)


def _floats(vector: np.ndarray) -> list[float]:
    return vector.astype(np.float64).tolist()
