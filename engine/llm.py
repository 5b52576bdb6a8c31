"""Offline inference: the server's pieces in one process, without Ray."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.errors import InvalidRequest
from engine.inputs.frontend import Frontend, PreparedPrompt
from engine.loading import load_engine
from engine.output_processor import RequestGroup, merge_updates
from engine.outputs import CompletionOutput, EmbeddingOutput, RequestOutput, StreamUpdate
from engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

#: Most prompts whose media are encoded in one go.
_TOGETHER = 16

Prompt = str | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


@dataclass(slots=True)
class _Job:
    """One prompt on its way: what it asks for, and what has come of it."""

    index: int
    params: SamplingParams
    prepared: Future[PreparedPrompt]
    group: RequestGroup | None = None
    text: str | None = None
    update: StreamUpdate | None = None
    embedding: EmbeddingOutput | None = None


class LLM:
    """A model for offline use.

    Prompts are prepared by worker threads while the device works on earlier ones.

    Args:
        model: folder of a checkpoint in Hugging Face layout, or a hub name.
        trust_remote_code: accepted for compatibility; code from checkpoints is never run.
        options: every field of :class:`~engine.config.EngineConfig`.

    Raises:
        CheckpointError, ConfigError: see :func:`engine.loading.load_engine`.
    """

    def __init__(self, model: str, *, trust_remote_code: bool = False, **options: Any) -> None:
        if trust_remote_code:
            logger.warning("trust_remote_code is ignored: code from checkpoints is never run")
        self.config = EngineConfig(model=model, **options)
        self._frontend = Frontend.load(self.config)
        self._encoder = EncoderEngine.load(self.config) if self._frontend.takes_media else None
        self._engine = load_engine(self.config)
        self._count = 0

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.requests.max_model_len

    def get_tokenizer(self):
        """The model's :class:`~engine.inputs.tokenizer.Tokenizer`."""
        return self._engine.tokenizer

    def metrics(self) -> dict:
        """The engine's counters since it was loaded."""
        scheduler = self._engine.core.scheduler
        stats = scheduler.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "cached_tokens": stats.cached_tokens,
            "computed_tokens": stats.computed_tokens,
            "output_tokens": stats.output_tokens,
            "preempted": stats.preempted,
            **self._engine.metrics.snapshot(),
        }

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; the results are in their order.

        Args:
            prompts: text, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}`` with
                ``"multi_modal_data": {"image": picture or list of pictures}``; or a sequence of such.
            sampling_params: for all, or one for each.

        Raises:
            InvalidRequest: a prompt can't be served; nothing is left behind of the others.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        prepare = [lambda prompt=prompt: self._frontend.from_prompt(prompt) for prompt in many]
        return self._run_generation(prepare, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of OpenAI messages.

        Args:
            chat_template: a Jinja template, or the path of one, to use instead of the checkpoint's.

        Raises:
            InvalidRequest: as :meth:`generate`.
        """
        many = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prepare = [
            lambda conversation=conversation: self._frontend.from_messages(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                **template_options,
            )
            for conversation in many
        ]
        return self._run_generation(prepare, sampling_params, use_tqdm)

    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str = "last", use_tqdm: bool = True
    ) -> list[EmbeddingOutput]:
        """Pool the hidden states of prompts, as :meth:`generate` takes them, into vectors.

        Raises:
            InvalidRequest: a prompt can't be served, or the model wasn't loaded with ``task="embed"``.
        """
        many = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        prepare = [lambda prompt=prompt: self._frontend.from_prompt(prompt) for prompt in many]
        jobs = self._run(prepare, [SamplingParams()] * len(many), pooling, use_tqdm)
        return [job.embedding for job in jobs if job.embedding is not None]

    def check_integrity(self) -> None:
        """Between calls: nothing is held anywhere. Raises AssertionError."""
        assert self._engine.outputs.num_groups == 0
        self._engine.core.check_integrity()

    # How a call runs.

    def _run_generation(
        self,
        prepare: Sequence[Callable[[], PreparedPrompt]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prepare)
        if len(params) != len(prepare):
            raise InvalidRequest(f"There are {len(prepare)} prompts, but {len(params)} sampling_params.")
        return [_request_output(job) for job in self._run(prepare, params, None, use_tqdm)]

    def _run(
        self,
        prepare: Sequence[Callable[[], PreparedPrompt]],
        params: Sequence[SamplingParams],
        pooling: str | None,
        use_tqdm: bool,
    ) -> list[_Job]:
        """Prepare, encode and compute all prompts; the jobs, done, in order."""
        core, outputs = self._engine.core, self._engine.outputs
        workers = min(os.cpu_count() or 1, 32)
        jobs: list[_Job] = []
        by_group: dict[int, _Job] = {}
        progress = tqdm(total=len(prepare), desc="prompts", disable=not use_tqdm, dynamic_ncols=True)
        with ThreadPoolExecutor(workers, "prepare") as pool, progress:
            waiting = self._start(prepare, params, pool, jobs)
            try:
                ready = next(waiting, None)
                while ready is not None or core.has_work:
                    batch: list[_Job] = []
                    while ready is not None and self._wants_more(ready, len(batch)):
                        batch.append(ready)
                        ready = next(waiting, None)
                    for job in self._admit(batch, pooling):
                        by_group[id(job.group)] = job
                    updates, stopped = outputs.process(core.step())
                    for request in stopped:
                        core.abort(request)
                    for group, update in updates:
                        self._take(by_group[id(group)], update, progress)
            except BaseException:
                self._abandon(jobs)
                raise
        return jobs

    def _start(
        self,
        prepare: Sequence[Callable[[], PreparedPrompt]],
        params: Sequence[SamplingParams],
        pool: ThreadPoolExecutor,
        jobs: list[_Job],
    ) -> Iterator[_Job]:
        """Jobs in order, with preparation running a bounded distance ahead."""
        ahead: deque[_Job] = deque()
        for index, (work, wanted) in enumerate(zip(prepare, params, strict=True)):
            job = _Job(index, wanted, pool.submit(work))
            jobs.append(job)
            ahead.append(job)
            if len(ahead) > 2 * self.config.max_num_seqs:
                yield ahead.popleft()
        yield from ahead

    def _wants_more(self, job: _Job, gathered: int) -> bool:
        """Whether ``job`` should be taken in now, beside ``gathered`` others: it is prepared, or there is
        nothing else to do."""
        core = self._engine.core
        # Embeddings of only a batch's worth of prompts wait for their turn.
        if gathered >= _TOGETHER or core.scheduler.num_waiting + gathered >= self.config.max_num_seqs:
            return False
        return job.prepared.done() or not (core.has_work or gathered)

    def _admit(self, batch: Sequence[_Job], pooling: str | None) -> Sequence[_Job]:
        """Encode the media of all in ``batch`` together, and give their requests to the engine."""
        prompts = [job.prepared.result() for job in batch]
        media = [item for prompt in prompts for item in prompt.media]
        rows: Iterator[Any] = iter(())
        if media:
            assert self._encoder is not None
            rows = iter(self._encoder.encode(media))
        requests, outputs = self._engine.requests, self._engine.outputs
        for job, prompt in zip(batch, prompts, strict=True):
            embeddings = [*prompt.embeddings, *(next(rows) for _ in prompt.media)]
            self._count += 1
            key = str(self._count)
            if pooling is None:
                job.group = requests.generation(key, prompt.inputs, job.params, embeddings)
            else:
                job.group = requests.pooling(key, prompt.inputs, embeddings, pooling)
            job.text = prompt.inputs.text
            # Pixels are not needed any more.
            job.prepared = Future()
            outputs.add(job.group)
            for request in job.group.requests:
                self._engine.core.add(request)
        return batch

    def _take(self, job: _Job, update: StreamUpdate | EmbeddingOutput, progress: tqdm) -> None:
        if isinstance(update, EmbeddingOutput):
            job.embedding = update
            progress.update()
            return
        job.update = update if job.update is None else merge_updates(job.update, update)
        if update.finished:
            progress.update()
            progress.set_postfix_str(_rate(progress, self._engine.metrics.completion_tokens))

    def _abandon(self, jobs: Sequence[_Job]) -> None:
        """After an error: free all that the call's other prompts hold."""
        core = self._engine.core
        for job in jobs:
            job.prepared.cancel()
            if job.group is not None:
                self._engine.outputs.remove(job.group)
                for request in job.group.requests:
                    core.abort(request)
        while core.has_work:
            core.step()


def _rate(progress: tqdm, tokens: int) -> str:
    elapsed = progress.format_dict["elapsed"]
    return f"{tokens / elapsed:.0f} tok/s" if elapsed else ""


def _request_output(job: _Job) -> RequestOutput:
    assert job.group is not None and job.update is not None
    outputs = []
    for delta in sorted(job.update.deltas, key=lambda delta: delta.index):
        total = None
        if delta.logprobs is not None:
            chosen = zip(delta.token_ids, delta.logprobs, strict=True)
            total = sum(row[token].logprob for token, row in chosen)
        outputs.append(
            CompletionOutput(
                delta.index,
                delta.text,
                delta.token_ids,
                delta.finish_reason,
                delta.stop_reason,
                delta.logprobs,
                total,
            )
        )
    request = job.group.requests[0]
    return RequestOutput(
        job.group.id,
        job.text,
        request.token_ids[: request.num_prompt],
        outputs,
        job.group.usage,
        job.update.prompt_logprobs,
    )
