"""One model's way from a request to an answer: prepare the media, build the prompt, encode, generate."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from deployments.access import caller_salt, charge
from deployments.config import AppConfig, ModelSpec
from deployments.metrics.collector import Measured
from deployments.metrics.ingress import ModelMeter
from deployments.stages import Generation, Pixels, Pooling, Rows, StageLost, Stages
from deployments.tasks import all_or_none
from deployments.tools import AnswerFormat, answer_format
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.frontend import load_end_tokens, load_prompt_builder, load_sampling_defaults
from engine.inputs.builder import PromptBuilder
from engine.media.source import MediaSource, check_media_limits
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.parsers.grammar import SpecialTokens
from engine.pooling_params import PoolingParams
from engine.prompt import EngineInput, MediaItem
from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt ready for the engine, with the embedding rows of its distinct items."""

    inputs: EngineInput
    media: tuple[Rows, ...] = ()


class Pipeline:
    """Takes the requests for one model through its stages.

    Args:
        spec: the model.
        stages: its stages.
        threads: where prompts are rendered and tokenized; never on the event loop.

    Attributes:
        meter: counts and times this pipeline's work.
    """

    def __init__(self, spec: ModelSpec, stages: Stages, threads: ThreadPoolExecutor) -> None:
        self.name = spec.name
        self.task = spec.engine.task
        self.builder = load_prompt_builder(spec.engine)
        self.sampling_defaults = load_sampling_defaults(spec.engine)
        self.format = _answer_format(spec, self.builder)
        self._limits = spec.engine.limit_mm_per_prompt
        self.meter = ModelMeter(StageLost)
        self._stages = stages
        self._threads = threads
        self._max_model_len: int | None = None

    async def max_model_len(self) -> int:
        """The most tokens of prompt and answer together.

        Raises:
            Unavailable: no replica answers.
        """
        if self._max_model_len is None:
            self._max_model_len = await self._stages.language_model.max_model_len()
        return self._max_model_len

    def measured(self) -> Measured:
        """This model's metrics."""
        sources = {name: stage.collect for name, stage in self._stages.by_name().items()}
        return Measured(self.meter, sources)

    async def ping(self) -> None:
        """Return once the language model stage has answered; errors as :meth:`max_model_len`."""
        await self._stages.language_model.max_model_len()

    async def prepare(
        self,
        build: Callable[[list[MediaItem]], EngineInput],
        sources: Sequence[MediaSource] = (),
        *,
        min_tokens: int = 1,
        salt: str = "",
    ) -> PreparedPrompt:
        """Prepare a request's media, build its prompt, and encode the media.

        Args:
            build: makes the prompt from the media items; called on a thread.
            sources: the media.
            min_tokens: output tokens that must fit behind the prompt; 0 for embeddings.
            salt: keeps the caches of tenants apart.

        Raises:
            InvalidRequest: before any expensive work.
            Unavailable: a stage is down, or was lost twice in a row.
        """
        if sources:
            self._check_media(sources)
        try:
            return await self._prepare(build, sources, min_tokens, salt)
        except StageLost:
            self.meter.failover("prepare")
            # The sources are still here: start again.
            return await self._prepare(build, sources, min_tokens, salt)

    async def tokenize(
        self, build: Callable[[list[MediaItem]], EngineInput], sources: Sequence[MediaSource] = ()
    ) -> EngineInput:
        """Build a prompt without encoding its media; arguments and errors as :meth:`prepare`."""
        if sources:
            self._check_media(sources)
        inputs, _ = await self._build(build, sources)
        return inputs

    def _check_media(self, sources: Sequence[MediaSource]) -> None:
        if self._stages.preprocessor is None:
            raise InvalidRequest(f"The model {self.name} takes no images.", param=sources[0].where)
        check_media_limits(sources, self._limits)

    async def _prepare(
        self,
        build: Callable[[list[MediaItem]], EngineInput],
        sources: Sequence[MediaSource],
        min_tokens: int,
        salt: str,
    ) -> PreparedPrompt:
        inputs, pixels = await self._build(build, sources)
        inputs = replace(inputs, cache_salt=caller_salt(inputs.cache_salt))
        count, limit = len(inputs.token_ids), await self.max_model_len()
        if count + min_tokens > limit:
            raise ContextLengthExceeded.by(limit, count, min_tokens)
        charge(count + min_tokens)
        return PreparedPrompt(inputs, await self._encode(pixels, caller_salt(salt)))

    async def _build(
        self, build: Callable[[list[MediaItem]], EngineInput], sources: Sequence[MediaSource]
    ) -> tuple[EngineInput, Sequence[Pixels]]:
        pixels: Sequence[Pixels] = []
        if sources:
            assert self._stages.preprocessor is not None
            with self.meter.call("preprocessor"):
                pixels = await self._stages.preprocessor.prepare(sources)
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self._threads, build, [each.item for each in pixels])
        return inputs, pixels

    async def _encode(self, pixels: Sequence[Pixels], salt: str) -> tuple[Rows, ...]:
        """Embedding rows of the distinct items. All are sent at once: the encoder batches waiting items."""
        distinct = {each.item.hash: each for each in pixels}.values()
        if not distinct:
            return ()
        encoder = self._stages.encoder
        assert encoder is not None
        with self.meter.call("encoder"):
            return tuple(await all_or_none(encoder.encode(each, salt) for each in distinct))

    def generate(
        self, request_id: str, prompt: PreparedPrompt, params: SamplingParams, *, priority: int = 0
    ) -> AsyncGenerator[StreamUpdate, None]:
        """Stream the model's output. Closing the iterator aborts the request.

        Raises:
            SightlineError: the request is refused, or its replica died.
        """
        request = Generation(request_id, prompt.inputs, params, priority)
        return self.meter.stream(self._stages.language_model.generate(request, prompt.media))

    async def embed(self, request_id: str, prompt: PreparedPrompt, params: PoolingParams) -> EmbeddingOutput:
        """Pool the prompt's hidden states into a vector; errors as :meth:`generate`."""
        request = Pooling(request_id, prompt.inputs, params)
        with self.meter.answer(), self.meter.call("language_model"):
            output = await self._stages.language_model.embed(request, prompt.media)
        self.meter.count_tokens(output.usage)
        return output


def make_pipelines(config: AppConfig, stages: Sequence[Stages]) -> Mapping[str, Pipeline]:
    """A pipeline for each of ``config.models``, by its name.

    Args:
        stages: the stages of each model, in the order of ``config.models``.
    """
    threads = ThreadPoolExecutor(config.ingress.threads, "prompts")
    return {
        spec.name: Pipeline(spec, each, threads) for spec, each in zip(config.models, stages, strict=True)
    }


def _answer_format(spec: ModelSpec, builder: PromptBuilder) -> AnswerFormat:
    """Return the model's format of tool calls and thoughts."""
    added = {token.content: number for number, token in builder.tokenizer.added_tokens.items()}
    special = SpecialTokens(added, load_end_tokens(spec.engine))
    sources = builder.template.sources if builder.template is not None else {}
    return answer_format(list(sources.values()), special, spec.tool_parser, spec.reasoning_parser)
