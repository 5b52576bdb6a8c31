"""Offline inference: the server's pieces in one process, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from engine.config import EngineConfig
from engine.encoder import EncoderEngine
from engine.errors import ConfigError, InvalidRequest
from engine.executor.launch import Launcher
from engine.frontend import Frontend
from engine.inputs.retrieval import compare, pair_score
from engine.loading import check_checkpoint, load_engine
from engine.media.guard import FetchPolicy
from engine.model_parts import load_sampling_defaults
from engine.offline import Job, OfflineRunner, Params, Prepare
from engine.outputs import CompletionOutput, EmbeddingOutput, RequestOutput
from engine.pooling_params import Pooling, PoolingParams
from engine.prompt import Prompt, is_token_ids
from engine.sampling_params import SamplingParams
from engine.settings import Settings, no_such_option

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
Part = TypeVar("Part", bound=Settings)


class LLM:
    """A model for offline use.

    Args:
        model: folder of a checkpoint in Hugging Face layout, or a hub name.
        fetch: fields of :class:`~engine.media.guard.FetchPolicy`: the addresses that :meth:`chat` may
            fetch images from; public ones if not given.
        trust_remote_code: accepted for compatibility; code from checkpoints is never run.
        launcher: starts the ranks beyond the first; processes of this machine if not given.
        options: every field of :class:`~engine.config.EngineConfig`.

    Raises:
        ConfigError: an option is unknown or of no use; names it.
        CheckpointError: see :func:`engine.loading.load_engine`.
    """

    def __init__(
        self,
        model: str,
        *,
        fetch: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        launcher: Launcher | None = None,
        **options: Any,
    ) -> None:
        if trust_remote_code:
            logger.warning("trust_remote_code is ignored: code from checkpoints is never run")
        self.config = _settings(EngineConfig, {"model": model, **options})
        policy = _settings(FetchPolicy, fetch or {}, "fetch.")
        self._frontend = Frontend.load(self.config, policy)
        self._encoder = None
        if self._frontend.takes_media:
            # Check all tensor headers before loading any weights.
            check_checkpoint(self.config)
            self._encoder = EncoderEngine.load(self.config)
        self._engine = load_engine(self.config, launcher)
        self._runner = OfflineRunner(self._engine, self._encoder)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        return self._engine.requests.max_model_len

    def get_tokenizer(self):
        """The model's :class:`~engine.text.tokenizer.Tokenizer`."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the checkpoint's own defaults, which apply to calls without sampling parameters."""
        return SamplingParams.from_defaults(load_sampling_defaults(self.config))

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
            prompts: text, token ids, or ``{"prompt": text}`` or ``{"prompt_token_ids": ids}`` with
                ``"multi_modal_data": {"image": image or list of images}`` and, as in :meth:`chat`,
                ``mm_processor_kwargs``; or a sequence of such.
            sampling_params: for all, or one for each.

        Raises:
            InvalidRequest: a prompt can't be served; nothing is left behind of the others.
        """
        return self._run_generation(self._prompts(prompts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of OpenAI messages.

        Args:
            chat_template: a Jinja template, or the path of one, to use instead of the checkpoint's.
            add_generation_prompt: end the prompt where the assistant's answer begins.
            continue_final_message: continue the last message instead.
            tools: functions in OpenAI's form, which the template shows to the model in every conversation. A
                call comes in the answer's text, as the model writes it: nothing parses or constrains it.
            chat_template_kwargs: further variables of the template.
            mm_processor_kwargs: options of the processor for all media, up to those of the configuration.

        Raises:
            InvalidRequest: as :meth:`generate`; or a tool is no function.
        """
        for index, tool in enumerate(tools or ()):
            _check_tool(tool, f"tools[{index}]")
        prepare = self._conversations(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        return self._run_generation(prepare, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt] = (),
        *,
        messages: Messages | Sequence[Messages] = (),
        pooling: Pooling = "last",
        normalize: bool = True,
        instruction: str | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        use_tqdm: bool = True,
    ) -> list[EmbeddingOutput]:
        """Pool the hidden states of prompts, as :meth:`generate` takes them, or of ``messages``, as
        :meth:`chat` takes them, into vectors. See :class:`~engine.pooling_params.PoolingParams`.

        Args:
            instruction: shows texts and messages to the model in the format of its family's embedding models,
                with this instruction; with their own if empty. None takes the one that the model was loaded
                with, if any. Prompts that are objects with ``prompt`` stay as they stand.

        Raises:
            InvalidRequest: a prompt can't be served, or the model wasn't loaded with ``task="embed"``.
        """
        frontend = self._frontend if chat_template is None else self._frontend.with_template(chat_template)
        _check_instruction(instruction)
        options: dict[str, Any] = {"instruction": instruction, "add_generation_prompt": add_generation_prompt}
        prepare: list[Prepare] = [
            *(partial(frontend.from_item, prompt, instruction=instruction) for prompt in _as_list(prompts)),
            *(partial(frontend.for_vector, each, **options) for each in _as_conversations(messages)),
        ]
        return self._pooled(prepare, PoolingParams(pooling=pooling, normalize=normalize), use_tqdm)

    def score(
        self,
        first: Prompt | Sequence[Prompt],
        second: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        instruction: str | None = None,
        use_tqdm: bool = True,
    ) -> list[float]:
        """Score pairs of texts or images.

        With ``task="embed"`` a score is the cosine similarity of two vectors, or MaxSim for a model with one
        vector per token. With ``task="score"`` it is the probability that the second meets the first.

        Args:
            first: one text, or an object with ``image`` and perhaps ``text``, or a prompt as :meth:`embed`
                takes it, compared with each of ``second``; or as many as ``second`` has.
            instruction: of ``first``, the query; see :meth:`embed`.

        Raises:
            InvalidRequest: the numbers don't fit, or as :meth:`embed`.
        """
        _check_instruction(instruction)
        left, right = _as_list(first), _as_list(second)
        if pooling == "all":
            raise InvalidRequest("Prompts are compared by one vector each, not by all.", param="pooling")
        if len(left) not in (1, len(right)):
            raise InvalidRequest(
                f"{len(left)} prompts can't be compared with {len(right)}: give one, or as many."
            )
        if not right:
            return []
        frontend = self._frontend
        retrieval = frontend.retrieval
        if retrieval.ranks_pairs:
            pairs = zip(left * (len(right) // len(left)), right, strict=True)
            prepare = [partial(frontend.from_pair, *pair, instruction=instruction) for pair in pairs]
            return [pair_score(o) for o in self._pooled(prepare, retrieval.params(), use_tqdm)]
        prepare = [
            *(partial(frontend.from_item, item, instruction=instruction) for item in left),
            *(partial(frontend.from_item, item) for item in right),
        ]
        outputs = self._pooled(prepare, retrieval.params(pooling), use_tqdm)
        lefts, rights = outputs[: len(left)], outputs[len(left) :]
        compared = zip(lefts * (len(rights) // len(lefts)), rights, strict=True)
        return [compare(one, other) for one, other in compared]

    def check_integrity(self) -> None:
        """Between calls: nothing is held anywhere. Raises AssertionError."""
        assert self._engine.outputs.num_groups == 0
        self._engine.core.check_integrity()

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[Prepare]:
        return [partial(self._frontend.from_prompt, prompt) for prompt in _as_list(prompts)]

    def _conversations(
        self, messages: Messages | Sequence[Messages], chat_template: str | None, **options: Any
    ) -> list[Prepare]:
        many = _as_conversations(messages)
        frontend = self._frontend
        if many and chat_template is not None:
            frontend = frontend.with_template(chat_template)
        return [partial(frontend.from_messages, conversation, **options) for conversation in many]

    def _run(self, prepare: Sequence[Prepare], params: Sequence[Params], use_tqdm: bool) -> list[Job]:
        try:
            return self._runner.run(prepare, params, use_tqdm)
        finally:
            self._frontend.close()

    def _pooled(
        self, prepare: Sequence[Prepare], params: PoolingParams, use_tqdm: bool
    ) -> list[EmbeddingOutput]:
        jobs = self._run(prepare, [params] * len(prepare), use_tqdm)
        return [job.embedding for job in jobs if job.embedding is not None]

    def _run_generation(
        self,
        prepare: Sequence[Prepare],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            params = [params] * len(prepare)
        if not all(isinstance(each, SamplingParams) for each in params):
            raise InvalidRequest(
                "sampling_params must be SamplingParams, or a list of them.", param="sampling_params"
            )
        if len(params) != len(prepare):
            raise InvalidRequest(f"There are {len(prepare)} prompts, but {len(params)} sampling_params.")
        return [_request_output(job) for job in self._run(prepare, params, use_tqdm)]


def _settings(part: type[Part], options: Mapping[str, Any], where: str = "") -> Part:
    """A part of the configuration.

    Args:
        where: before the names of its options.

    Raises:
        ConfigError: naming the options that can't be used.
    """
    try:
        return part.model_validate(options)
    except ValidationError as error:
        found = error.errors()
    faults = [
        (
            where + ".".join(str(step) for step in fault["loc"] if step != "[key]"),
            no_such_option(part, fault["loc"]) if fault["type"] == "extra_forbidden" else fault["msg"],
        )
        for fault in found
    ]
    raise ConfigError("; ".join(f"{field}: {words}" for field, words in faults), param=faults[0][0] or None)


def _check_instruction(instruction: Any) -> None:
    if not isinstance(instruction, str | None):
        raise InvalidRequest("instruction must be a string.", param="instruction")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    # What is neither a prompt nor several is refused as a prompt would be.
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]  # type: ignore[list-item]
    # Ids may come in an array.
    many: list[Any] = [each.tolist() if hasattr(each, "tolist") else each for each in prompts]
    return [many] if is_token_ids(many) else many


def _as_conversations(messages: Messages | Sequence[Messages]) -> Sequence[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequest(
            f"messages must be a list of messages, or of such lists, not {type(messages).__name__}.",
            param="messages",
        )
    return [messages] if messages and isinstance(messages[0], Mapping) else messages


def _check_tool(tool: Any, where: str) -> None:
    """Refuse a tool that is no function in OpenAI's form.

    Raises:
        InvalidRequest: naming the tool.
    """
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(
            f"{where} must be {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}.",
            param=where,
        )


def _request_output(job: Job) -> RequestOutput:
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
