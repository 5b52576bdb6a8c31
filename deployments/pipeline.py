"""One model's way from a request to an answer: prepare the media, build the prompt, encode, generate."""

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field, replace

from deployments.access import caller_name, caller_salt, charge, media_account
from deployments.answer_format import AnswerFormat, answer_format
from deployments.charges import MediaCharges
from deployments.config import AppConfig, ModelSpec, ReplayConfig
from deployments.media import Shown, prepare_media
from deployments.metrics.collector import Measured
from deployments.metrics.ingress import ModelMeter, arrival
from deployments.protocol.generation import check_named_tokens
from deployments.references import MediaKeeper, Owner, ReferenceConfig, References
from deployments.replay import Patience, attempt_name, carried_on, deadline
from deployments.report import ItemReport, current_report
from deployments.stages import Generation, Pixels, Pooling, Rows, RowsLost, StageLost, Stages
from deployments.tasks import all_or_none
from deployments.threads import on_thread
from engine.errors import ContextLengthExceeded, InvalidRequest, Unavailable
from engine.inputs.builder import PromptBuilder
from engine.mailbox import Taker
from engine.media.source import MediaSource, check_media_limits
from engine.model_parts import load_end_tokens, load_prompt_builder, load_retrieval, load_sampling_defaults
from engine.outputs import EmbeddingOutput, StreamUpdate
from engine.parsers.grammar import SpecialTokens
from engine.pooling_params import PoolingParams
from engine.prompt import EngineInput, KeptFiles, MediaItem, PagesItem
from engine.sampling_params import SamplingParams

#: Makes a prompt of its media, one item for each source; called on a thread, unless it takes little time.
Build = Callable[[list[MediaItem | PagesItem]], EngineInput]


async def _no_rows() -> tuple[Rows, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt ready for the engine, with the embedding rows of its distinct items.

    Attributes:
        inputs: without the text, which the engine has no use for.
        text: of the prompt; None if it was given as token ids.
        encode_again: encodes the items again, from their sources.
    """

    inputs: EngineInput
    text: str | None = None
    media: tuple[Rows, ...] = ()
    encode_again: Callable[[], Awaitable[tuple[Rows, ...]]] = _no_rows


@dataclass(frozen=True, slots=True)
class _Media:
    """The media of one request: its sources, and files of earlier requests by the index of the source that
    names them."""

    sources: Sequence[MediaSource]
    files: Mapping[int, KeptFiles]
    owner: Owner
    charges: MediaCharges


@dataclass(slots=True)
class SharedMedia:
    """The media of a request that has several prompts. They are prepared and encoded with the first of them,
    which must be ready before another is asked for.

    Attributes:
        sources: of all prompts.
        media, items, rows: what the first prompt has made of them; ``rows`` by the hashes of their items.
        renewal: held while lost ``rows`` are made again, for all prompts.
    """

    sources: Sequence[MediaSource] = ()
    media: _Media | None = None
    items: list[MediaItem | PagesItem] = field(default_factory=list)
    rows: dict[str, Rows] | None = None
    renewal: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pipeline:
    """Takes the requests for one model through its stages.

    Args:
        spec: the model.
        stages: its stages.
        threads: where prompts are rendered and tokenized, but for short ones.
        references: keeps media for later requests; a place of this pipeline's own if None.

    Attributes:
        replay: how far requests are carried on whose stage dies; may be changed, as ``timeout_s`` may.
        timeout_s: seconds that a request may take from its arrival; None for no limit.
        retrieval: how the model is shown queries and documents.
        meter: counts and times this pipeline's work.
        references: the media that later requests may name.
    """

    def __init__(
        self,
        spec: ModelSpec,
        stages: Stages,
        threads: ThreadPoolExecutor,
        replay: ReplayConfig = ReplayConfig(),
        timeout_s: float | None = None,
        references: MediaKeeper | None = None,
    ) -> None:
        self.name = spec.name
        self._takes_rows = spec.image_embeds
        self.references = references or References(ReferenceConfig())
        self.task = spec.engine.task
        self.builder = load_prompt_builder(spec.engine)
        self.retrieval = load_retrieval(spec.engine, self.builder)
        self.sampling_defaults = load_sampling_defaults(spec.engine)
        self.format = _answer_format(spec, self.builder)
        self._limits = spec.engine.limit_mm_per_prompt
        self.meter = ModelMeter(StageLost)
        self._stages = stages
        self._threads = threads
        self.replay = replay
        self.timeout_s = timeout_s
        self._random = random.Random(secrets.randbits(256))
        self._max_model_len: int | None = None
        deployed = {
            "preprocessor": spec.preprocessor,
            "encoder": spec.language_model if spec.encoder.with_language_model else spec.encoder,
            "language_model": spec.language_model,
        }
        self._may_sleep = {
            name
            for name, stage in deployed.items()
            if stage.autoscaling is not None and stage.autoscaling.get("min_replicas") == 0
        }
        self._sleeps = "language_model" in self._may_sleep

    async def max_model_len(self) -> int:
        """The most tokens of prompt and answer together.

        Raises:
            Unavailable: no replica answers.
        """
        if self._max_model_len is None:
            # A replica that sleeps has to wake first.
            with self.meter.call("language_model"):
                return await self._ask_max_model_len()
        return self._max_model_len

    async def known_max_model_len(self) -> int | None:
        """As :meth:`max_model_len`, but None for a model that sleeps and has not been asked yet."""
        if self._sleeps and self._max_model_len is None:
            # Asking would start a replica of a model that nobody uses.
            return None
        return await self.max_model_len()

    async def _ask_max_model_len(self) -> int:
        self._max_model_len = await self._stages.language_model.max_model_len()
        return self._max_model_len

    def measured(self) -> Measured:
        """This model's metrics."""
        sources = {name: stage.collect for name, stage in self._stages.by_name().items()}
        return Measured(self.meter, sources, self._stages.ways, self._may_sleep)

    async def device(self) -> str:
        """The devices that the language model runs on, in words; errors as :meth:`max_model_len`."""
        return await self._stages.language_model.device()

    async def ping(self) -> None:
        """Return once the language model stage has answered; errors as :meth:`max_model_len`. One that may
        have no replica while it is idle is asked until it has answered once."""
        if self._sleeps and self._max_model_len is not None:
            # Asking would start a replica of a model that nobody uses.
            return
        await self._ask_max_model_len()

    async def prepare(
        self,
        build: Build,
        sources: Sequence[MediaSource] | SharedMedia = (),
        *,
        params: SamplingParams | None = None,
        salt: str = "",
        short: bool = False,
    ) -> EncodedPrompt:
        """Prepare a request's media, build its prompt, and encode the media.

        Args:
            build: makes the prompt.
            sources: the media, or those of all prompts of the request; ``build`` gets an item for each.
            params: how much is to be generated; None for embeddings.
            salt: keeps the caches of tenants apart.
            short: ``build`` takes less time than a thread that does it would cost.

        Raises:
            InvalidRequest: before any expensive work.
            Unavailable: a stage is down, or was lost too often.
        """
        patience = self._patience("prepare")
        shared = sources if isinstance(sources, SharedMedia) else SharedMedia(sources)
        media = shared.media = shared.media or await self._media(shared.sources, salt, patience)
        charged, salt_of_caller = False, caller_salt(salt)

        async def prepare() -> EncodedPrompt:
            nonlocal charged
            shown: list[Shown] = []
            if shared.rows is None:
                shown = await self._shown(media)
                shared.items = [each.item for each in shown]
            inputs = await self._build(build, shared.items, short)
            text = inputs.text
            inputs = replace(inputs, text=None, cache_salt=caller_salt(inputs.cache_salt))
            count, limit = len(inputs.token_ids), await self.max_model_len()
            least = 0 if params is None else params.max_tokens or 1
            if count + least > limit and not self._sleeps:
                # An update may have brought replicas that hold more than the one that was asked first.
                limit = await self._ask_max_model_len()
            if count + least > limit:
                raise ContextLengthExceeded.by(limit, count, least)
            if not charged:
                most = _most_tokens(params, count, limit) if params is not None else 0
                if params is not None:
                    check_named_tokens(params, most)
                charge(count + most)
                charged = True

            def kept(rows: dict[str, Rows]) -> dict[str, Rows]:
                # Each of several prompts takes them.
                return {name: row.kept() for name, row in rows.items()} if shared is sources else rows

            def of_prompt(rows: Mapping[str, Rows]) -> tuple[Rows, ...]:
                if shared is not sources:
                    return tuple(rows.values())
                hashes = {span.item.hash for span in inputs.spans}
                return tuple(row for name, row in rows.items() if name in hashes)

            if shared.rows is None:
                rows, reports = await self._encode(_pixels(shown), salt_of_caller)
                shared.rows = kept(rows)
                current_report().prepared(reports)
            given = shared.rows

            async def encode_again() -> tuple[Rows, ...]:
                nonlocal given
                async with shared.renewal:
                    if shared.rows is None or shared.rows is given:
                        pixels = await self._same_pixels(media, given)
                        shared.rows = kept((await self._encode(pixels, salt_of_caller))[0])
                    given = shared.rows
                return of_prompt(given)

            return EncodedPrompt(inputs, text, of_prompt(given), encode_again)

        return await patience.call(prepare)

    async def tokenize(
        self, build: Build, sources: Sequence[MediaSource] = (), *, salt: str = ""
    ) -> EngineInput:
        """Build a prompt without encoding its media; arguments and errors as :meth:`prepare`."""
        patience = self._patience("prepare")
        media = await self._media(sources, salt, patience)

        async def built() -> EngineInput:
            return await self._build(build, [each.item for each in await self._shown(media)])

        return await patience.call(built)

    async def _media(self, sources: Sequence[MediaSource], salt: str, patience: Patience) -> _Media:
        """The media of a request, with the files that its references name.

        Raises:
            InvalidRequest: the model or the configuration doesn't take them.
            UnknownReference: nothing is kept under a ``uuid``.
            Unavailable: the place where media are kept is down, or was lost too often.
        """
        owner, charges = Owner(caller_name(), salt, self.name), MediaCharges(media_account())
        if not sources:
            return _Media((), {}, owner, charges)
        if self._stages.preprocessor is None:
            raise InvalidRequest(f"The model {self.name} takes no images.", param=sources[0].where)
        check_media_limits(sources, self._limits)
        resolved, files = await patience.call(lambda: self.references.resolve(owner, sources))
        charges.sources(resolved, files)
        rows = next((source for source in resolved if source.rows is not None), None)
        if rows is not None and not self._takes_rows:
            raise InvalidRequest(
                f"{rows.where}: this server takes no embeddings of images, unless its configuration has "
                "image_embeds: true.",
                param=rows.where,
            )
        return _Media(resolved, files, owner, charges)

    async def _build(
        self, build: Build, items: list[MediaItem | PagesItem], short: bool = False
    ) -> EngineInput:
        began = time.perf_counter()
        inputs = build(items) if short else await on_thread(self._threads, build, items)
        current_report().took("prompt", time.perf_counter() - began)
        return inputs

    async def _shown(self, media: _Media) -> list[Shown]:
        if not media.sources:
            return []
        stage, owner = self._stages.preprocessor, media.owner
        assert stage is not None
        try:
            with self.meter.call("preprocessor"):
                shown = await prepare_media(
                    stage,
                    media.sources,
                    media.files,
                    owner.key,
                    self._limits,
                    media.charges,
                    caller_salt(owner.salt),
                )
        except RowsLost:
            # Only kept files are handed over by reference.
            await self.references.lost(owner, [each for each in media.sources if each.index in media.files])
            raise
        media.charges.prepared(media.sources, [each.pixels for each in shown])
        for source, each in zip(media.sources, shown, strict=True):
            if each.kept is not None:
                await self.references.keep(owner, source, each.kept)
        return shown

    async def _same_pixels(self, media: _Media, hashes: Collection[str]) -> Sequence[Pixels]:
        """The pixels of a request's media once more.

        Args:
            hashes: of its items.

        Raises:
            Unavailable: an address gives another image than before.
        """
        pixels = _pixels(await self._shown(media))
        if set(hashes) - {each.item.hash for each in pixels}:
            raise Unavailable(
                "A part of the server stopped while it worked on this request, and the address of one of its "
                "images gives another image now. Send the request again."
            )
        return pixels

    async def _encode(self, pixels: Sequence[Pixels], salt: str) -> tuple[dict[str, Rows], list[ItemReport]]:
        """Embedding rows of the distinct items by their hashes, and a report for every item. All items are
        sent at once: the encoder batches those that wait."""
        distinct = {each.item.hash: each for each in pixels}
        if not distinct:
            return {}, []
        encoder, asked = self._stages.encoder, _asked()
        assert encoder is not None

        async def encode(each: Pixels) -> tuple[Rows, float]:
            if each.embedded is not None:
                return each.embedded, 0.0
            began = time.perf_counter()
            return await encoder.encode(each, salt, asked), time.perf_counter() - began

        with self.meter.call("encoder"):
            found = await all_or_none(map(encode, distinct.values()))
        encoded = dict(zip(distinct, found, strict=True))
        items = []
        for each in pixels:
            rows, seconds = encoded[each.item.hash]
            times = {**each.seconds, "encode": seconds}
            items.append(ItemReport(each.item, rows.cached, times, each.frames, each.note))
        return {name: rows for name, (rows, _) in encoded.items()}, items

    def generate(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        names: Mapping[str, str] | None = None,
        relay: Taker | None = None,
    ) -> AsyncGenerator[StreamUpdate, None]:
        """Stream the model's output. Closing the iterator aborts the request.

        Args:
            names: the caller's fields by the engine's names, for errors.
            relay: takes updates past this iterator.

        Raises:
            SightlineError: the request is refused, or was lost too often.
        """
        if params.seed is None and not params.greedy:
            # The rest of an answer must follow from its beginning, wherever it is computed.
            params = copy(params)
            params.seed = self._random.getrandbits(62)
        patience = self._patience("answer")

        async def encode_again() -> Sequence[Rows]:
            return await patience.call(prompt.encode_again)

        request = Generation(request_id, prompt.inputs, params, priority, asked=_asked())
        stage = self._stages.language_model

        def around() -> AbstractContextManager[None]:
            return self.meter.call("language_model")

        def measured() -> AbstractContextManager[Callable[[StreamUpdate], None]]:
            return self.meter.stream(params.n)

        return carried_on(
            stage, request, prompt.media, encode_again, patience, around, measured, names or {}, relay
        )

    async def embed(self, request_id: str, prompt: EncodedPrompt, params: PoolingParams) -> EmbeddingOutput:
        """Pool the prompt's hidden states into a vector; errors as :meth:`generate`."""
        patience, media, tries = self._patience("answer"), prompt.media, itertools.count()

        async def embed() -> EmbeddingOutput:
            nonlocal media
            request = Pooling(attempt_name(request_id, next(tries)), prompt.inputs, params)
            try:
                with self.meter.call("language_model"):
                    return await self._stages.language_model.embed(request, media)
            except RowsLost:
                media = await prompt.encode_again()
                raise

        with self.meter.answer():
            output = await patience.call(embed)
        self.meter.count_tokens(output.usage)
        current_report().ended(output.usage)
        return output

    def _patience(self, work: str) -> Patience:
        return Patience(self.replay, deadline(self.timeout_s), lambda: self.meter.failover(work))


def _asked() -> float:
    """When the client asked, by ``time.time()``; now if this is no work for an HTTP request."""
    began = arrival.get()
    return time.time() - (0.0 if began is None else time.perf_counter() - began)


def _pixels(media: Sequence[Shown]) -> list[Pixels]:
    return [pixels for each in media for pixels in each.pixels]


def _most_tokens(params: SamplingParams, prompt: int, context: int) -> int:
    """The tokens that all completions of a prompt may have."""
    longest = params.for_prompt(prompt, context).max_tokens
    return params.n * (context - prompt if longest is None else longest)


def make_pipelines(
    config: AppConfig, stages: Sequence[Stages], references: MediaKeeper | None = None
) -> Mapping[str, Pipeline]:
    """A pipeline for each of ``config.models``, by its name.

    Args:
        stages: the stages of each model, in the order of ``config.models``.
        references: keeps media for later requests; a place in this process if None.
    """
    ingress = config.ingress
    references = references or References(ingress.references)
    threads = ThreadPoolExecutor(ingress.threads, "prompts")
    return {
        spec.name: Pipeline(spec, each, threads, ingress.replay, ingress.request_timeout_s, references)
        for spec, each in zip(config.models, stages, strict=True)
    }


def _answer_format(spec: ModelSpec, builder: PromptBuilder) -> AnswerFormat:
    """Return the model's format of tool calls and thoughts."""
    added = {token.content: number for number, token in builder.tokenizer.added_tokens.items()}
    special = SpecialTokens(added, load_end_tokens(spec.engine))
    sources = builder.template.sources if builder.template is not None else {}
    return answer_format(
        list(sources.values()), special, spec.tool_parser, spec.reasoning_parser, builder.thoughts
    )
