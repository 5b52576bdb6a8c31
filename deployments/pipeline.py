"""One model's way through its stages: prepare → encode → generate."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.config import ModelSpec
from deployments.errors import Misrouted, as_sightline, is_lost
from deployments.handoff import Embedding, Generation, PixelsRef, RowsRef, by_reference, stream, unpack
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.frontend import load_prompt_builder, load_sampling_defaults
from engine.media.source import MediaSource, check_media_limits
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.pooling_params import PoolingParams
from engine.prompt import EngineInput, MediaItem
from engine.sampling_params import SamplingParams

#: Times that a stream is begun until it reaches the replica that holds its embeddings.
_ROUTING_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Stages:
    """Handles of one model's deployments; a model without a vision part has only the last."""

    language_model: DeploymentHandle
    preprocessor: DeploymentHandle | None = None
    encoder: DeploymentHandle | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the engine, and where its pictures' embeddings lie."""

    inputs: EngineInput
    rows: tuple[RowsRef, ...] = ()


class Pipeline:
    """What the ingress knows of one model. Pixels and embeddings pass it by as references.

    Args:
        spec: the model.
        stages: its deployments.
        threads: where prompts are rendered and tokenized; never on the event loop.
    """

    def __init__(self, spec: ModelSpec, stages: Stages, threads: ThreadPoolExecutor) -> None:
        self.name = spec.name
        self.builder = load_prompt_builder(spec.engine)
        self.sampling_defaults = load_sampling_defaults(spec.engine)
        self._limits = spec.engine.limit_mm_per_prompt
        self._language_model = by_reference(stages.language_model)
        self._preprocessor = stages.preprocessor and by_reference(stages.preprocessor)
        self._encoder = stages.encoder and by_reference(stages.encoder)
        self._threads = threads
        self._max_model_len: int | None = None

    async def max_model_len(self) -> int:
        """Most tokens of prompt and answer together.

        Raises:
            Unavailable: no replica answers.
        """
        if self._max_model_len is None:
            self._max_model_len = await self._call(self._language_model.max_model_len.remote())
        return self._max_model_len

    async def ping(self) -> None:
        """Returns once a replica of the language model has answered; errors as :meth:`max_model_len`."""
        await self._call(self._language_model.max_model_len.remote())

    async def prepare(
        self,
        build: Callable[[list[MediaItem]], EngineInput],
        sources: Sequence[MediaSource] = (),
        *,
        min_tokens: int = 1,
        salt: str = "",
    ) -> Prompt:
        """Prepare a request's media, make its prompt, and encode the media.

        Args:
            build: the prompt from the items of media; called on a thread.
            sources: the media.
            min_tokens: output tokens that must fit behind the prompt; 0 for embeddings.
            salt: keeps apart the caches of tenants.

        Raises:
            InvalidRequest: before anything expensive was done.
            Unavailable: a stage is down, twice in a row.
        """
        if sources:
            if self._preprocessor is None:
                raise InvalidRequest(f"The model {self.name} takes no pictures.", param=sources[0].where)
            check_media_limits(sources, self._limits)
        try:
            return await self._prepare(build, sources, min_tokens, salt)
        except Exception as error:
            if not is_lost(error):
                raise as_sightline(error) from error
        # A replica died, and what it made with it. The sources are still here: once more, from the start.
        try:
            return await self._prepare(build, sources, min_tokens, salt)
        except Exception as error:
            raise as_sightline(error) from error

    async def _prepare(
        self,
        build: Callable[[list[MediaItem]], EngineInput],
        sources: Sequence[MediaSource],
        min_tokens: int,
        salt: str,
    ) -> Prompt:
        pixels: list[PixelsRef] = []
        if sources:
            assert self._preprocessor is not None
            pixels = await self._preprocessor.prepare.remote(list(sources))
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self._threads, build, [ref.item for ref in pixels])
        count, limit = len(inputs.token_ids), await self.max_model_len()
        if count + min_tokens > limit:
            wanted = f" and {min_tokens} are to be generated" if min_tokens else ""
            advice = "shorten the prompt, or use smaller or fewer pictures"
            if count < limit:
                advice = "lower max_tokens or shorten the prompt"
            raise ContextLengthExceeded(
                f"The prompt has {count} tokens{wanted}, but this model's context holds {limit} in all: "
                f"{advice}.",
                param="max_tokens" if count < limit else "messages",
            )
        return Prompt(inputs, await self._encode(pixels, salt))

    async def _encode(self, pixels: Sequence[PixelsRef], salt: str) -> tuple[RowsRef, ...]:
        """Embeddings of the distinct items, all at once: the encoder makes batches of what comes together."""
        distinct = {ref.item.hash: ref for ref in pixels}.values()
        if not distinct:
            return ()
        assert self._encoder is not None
        responses = [self._encoder.encode.remote(ref.item, ref.pixels, salt) for ref in distinct]
        return tuple(await asyncio.gather(*responses))

    async def generate(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, priority: int = 0
    ) -> AsyncIterator[StreamUpdate]:
        """Stream the model's output. Closing the iterator aborts the request.

        Raises:
            SightlineError: a refusal, or Unavailable where the replica died.
        """
        replica = ""
        if prompt.rows:
            infos = [ref.info for ref in prompt.rows]
            rows = [ref.rows for ref in prompt.rows]
            replica = await self._call(self._language_model.hold.remote(request_id, infos, *rows))
        request = Generation(request_id, prompt.inputs, params, priority, has_media=bool(prompt.rows))
        # Twenty alternatives for each token of a long prompt come in one item.
        large = params.prompt_logprobs is not None
        language_model = self._language_model
        for attempt in range(_ROUTING_ATTEMPTS):
            try:
                async with stream(
                    language_model, "generate", request, replica=replica, large=large
                ) as updates:
                    async for packed in updates:
                        yield unpack(packed)
                return
            except Exception as error:
                failure = as_sightline(error)
                # That is the first thing such a stream says, so that nothing comes twice.
                if not isinstance(failure, Misrouted) or attempt == _ROUTING_ATTEMPTS - 1:
                    raise failure from error

    async def embed(self, request_id: str, prompt: Prompt, params: PoolingParams) -> EmbeddingOutput:
        """Pool the prompt's hidden states into a vector; errors as :meth:`generate`."""
        request = Embedding(request_id, prompt.inputs, params, tuple(ref.info for ref in prompt.rows))
        rows = [ref.rows for ref in prompt.rows]
        return await self._call(self._language_model.embed.remote(request, *rows))

    async def _call(self, response: Any) -> Any:
        try:
            return await response
        except Exception as error:
            raise as_sightline(error) from error
