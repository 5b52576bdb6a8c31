"""Turns the prompts and images of one model's callers into input of its engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from threading import Lock
from typing import Any, Protocol

from PIL import Image

from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.families.base import MediaProcessor, NamelessProcessor
from engine.inputs.builder import PromptBuilder
from engine.inputs.embeds import are_embeddings, given_embeddings
from engine.inputs.media_options import PROCESSOR_FIELD, with_options
from engine.inputs.messages import parse_messages
from engine.inputs.multi_modal import FIELD, media_entries, media_sources
from engine.inputs.retrieval import Retrieval, only_text, parts_of
from engine.media.decode import ImageLimits, decode_image, upright_rgb
from engine.media.fetch import ByteBudget, MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource, check_media_limits, num_images
from engine.model_parts import fetch_policy, load_media_processor, load_prompt_builder, load_retrieval
from engine.preparation import MediaPreparation, PagedFile
from engine.prompt import EngineInput, MediaItem, Message, PagesItem, PreparedMedia, Prompt, is_token_ids

#: Adds the content hash to an item that was prepared without it.
Name = Callable[[PreparedMedia], PreparedMedia]


class Encode(Protocol):
    """Encodes the media of one prompt as soon as they are prepared."""

    def begin(self, media: PreparedMedia) -> None:
        """Take one of the media, which has no content hash yet, before the prompt is made of them.

        Raises:
            InvalidRequest: the item isn't what its description says.
        """

    def finish(
        self, media: Sequence[PreparedMedia], inputs: EngineInput, name: Name | None
    ) -> tuple[Sequence[Any], Sequence[PreparedMedia]]:
        """Embedding rows of all ``media``, as :meth:`engine.encoder.EncoderEngine.encode` gives them, and the
        media with their content hashes.

        Args:
            name: adds the hashes; None if the media have them.

        Raises:
            InvalidRequest: the prompt can't be served.
        """


#: The entries of a prompt of :meth:`engine.llm.LLM.generate`.
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", FIELD, PROCESSOR_FIELD, "cache_salt"})
#: Most threads that prepare images at a time.
_THREADS = 8


@dataclass(slots=True)
class PreparedPrompt:
    """A prompt ready for the engine.

    Attributes:
        inputs: token ids and media spans.
        media: items that are still to be encoded, in the order of the spans.
        embeddings: rows of each span instead, where they are known.
    """

    inputs: EngineInput
    media: list[PreparedMedia] = field(default_factory=list)
    embeddings: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Media:
    """The prepared media of a prompt.

    Attributes:
        items: in the order of the prompt, each page of a document on its own.
        places: one for each source.
        name: adds an item's content hash, which the items don't have yet; None if they have.
    """

    items: list[PreparedMedia] = field(default_factory=list)
    places: list[MediaItem | PagesItem] = field(default_factory=list)
    name: Name | None = None


class Frontend:
    """Prepares prompts as :class:`engine.llm.LLM` takes them. Thread-safe.

    Args:
        config: the engine's configuration.
        builder: builds prompts.
        retrieval: how the model is shown queries and documents.
        processor: prepares media; None for a text-only model.
        fetcher: gets images by URL.
    """

    def __init__(
        self,
        config: EngineConfig,
        builder: PromptBuilder,
        retrieval: Retrieval,
        processor: MediaProcessor | None,
        fetcher: MediaFetcher,
    ) -> None:
        self._config = config
        self._builder = builder
        self.retrieval = retrieval
        self._processor = processor
        self._fetcher = fetcher
        threads = min(os.cpu_count() or 1, _THREADS)
        self._preparation = None if processor is None else MediaPreparation(processor, threads=threads)
        self._limits = ImageLimits()
        # One PIL image may stand in several prompts, and two threads must not read its file at a time.
        self._opening = [Lock() for _ in range(64)]

    @classmethod
    def load(cls, config: EngineConfig, policy: FetchPolicy | None = None) -> Frontend:
        """The frontend of ``config.model``; errors as
        :func:`~engine.model_parts.load_prompt_builder`."""
        fetcher = MediaFetcher(fetch_policy(config, policy or FetchPolicy()))
        builder = load_prompt_builder(config)
        retrieval = load_retrieval(config, builder)
        return cls(config, builder, retrieval, load_media_processor(config), fetcher)

    @property
    def takes_media(self) -> bool:
        return self._processor is not None

    def with_template(self, template: str) -> Frontend:
        """Return this frontend with another chat template; errors as :meth:`PromptBuilder.with_template`."""
        builder = self._builder.with_template(template)
        return Frontend(self._config, builder, self.retrieval, self._processor, self._fetcher)

    def from_prompt(self, prompt: Prompt, encode: Encode | None = None) -> PreparedPrompt:
        """Prepare one prompt of :meth:`engine.llm.LLM.generate`.

        Args:
            encode: encodes the media at once, if given: the device computes their rows while the prompt is
                built and they are hashed.

        Raises:
            InvalidRequest: naming the entry that can't be used.
        """
        if isinstance(prompt, str):
            return PreparedPrompt(self._builder.from_text(prompt))
        if is_token_ids(prompt):
            return PreparedPrompt(self._builder.from_token_ids(prompt))
        if not isinstance(prompt, Mapping):
            raise InvalidRequest(
                "A prompt must be a text, token ids, or a dict with 'prompt' or 'prompt_token_ids', "
                f"not {type(prompt).__name__}.",
                param="prompt",
            )
        unknown = prompt.keys() - _PROMPT_KEYS
        if unknown:
            raise InvalidRequest(f"A prompt has no entry {sorted(unknown)[0]!r}.", param="prompt")
        data, salt = media_entries(prompt), prompt.get("cache_salt", "")
        if are_embeddings(data.get("image")):
            given = self._given(data)
            inputs = self._inputs(prompt, [item for item, _ in given], salt)
            tensors = {item.hash: tensor for item, tensor in given}
            return PreparedPrompt(inputs, embeddings=[tensors[span.item.hash] for span in inputs.spans])
        sources = with_options(media_sources(data), prompt.get(PROCESSOR_FIELD))
        media = self._prepare(sources, encode)
        inputs = self._inputs(prompt, [prepared.item for prepared in media.items], salt)
        return _finished(inputs, media, encode)

    def from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        encode: Encode | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """Prepare one conversation of :meth:`engine.llm.LLM.chat`; ``encode`` as in :meth:`from_prompt`.

        Raises:
            InvalidRequest: naming the message or part that can't be used.
        """
        parsed, sources = parse_messages(messages)
        sources = with_options(sources, mm_processor_kwargs)
        build = partial(
            self._builder.from_messages,
            parsed,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=chat_template_kwargs,
        )
        return self._conversation(self._builder, parsed, sources, build, encode)

    def for_vector(
        self,
        messages: Sequence[Mapping[str, Any]],
        encode: Encode | None = None,
        *,
        instruction: str | None = None,
        add_generation_prompt: bool = False,
    ) -> PreparedPrompt:
        """Prepare one conversation of :meth:`engine.llm.LLM.embed`; ``encode`` as in :meth:`from_prompt`.

        Args:
            instruction: see :meth:`engine.inputs.retrieval.Retrieval.instructed`.

        Raises:
            InvalidRequest: naming the message or part that can't be used.
        """
        parsed, sources = parse_messages(messages)
        parsed, begins = self.retrieval.instructed(parsed, instruction)
        begins = begins or add_generation_prompt
        build = partial(self._builder.from_messages, parsed, add_generation_prompt=begins)
        return self._conversation(self._builder, parsed, sources, build, encode)

    def from_item(
        self,
        item: Prompt,
        encode: Encode | None = None,
        *,
        instruction: str | None = None,
    ) -> PreparedPrompt:
        """Prepare a text or an image of :meth:`engine.llm.LLM.score`, or a prompt of :meth:`from_prompt`.

        Errors as there.
        """
        if not isinstance(item, str | Mapping) or (isinstance(item, Mapping) and _PROMPT_KEYS & item.keys()):
            return self.from_prompt(item, encode)
        text = only_text(item)
        if text is not None and not self.retrieval.shows_as_message(instruction):
            return self.from_prompt(self.retrieval.written(text, instruction), encode)
        content = parts_of(item, "prompt")
        return self.for_vector([{"role": "user", "content": content}], encode, instruction=instruction)

    def from_pair(
        self,
        query: Prompt,
        document: Prompt,
        encode: Encode | None = None,
        *,
        instruction: str | None = None,
    ) -> PreparedPrompt:
        """Prepare a query and a document for a reranker; ``encode`` as in :meth:`from_prompt`.

        Raises:
            InvalidRequest: naming the part that can't be used.
        """
        parsed, sources = parse_messages(self.retrieval.pair(query, document, instruction))
        builder = self.retrieval.pair_builder
        return self._conversation(builder, parsed, sources, partial(builder.from_messages, parsed), encode)

    def _conversation(
        self,
        builder: PromptBuilder,
        parsed: Sequence[Message],
        sources: Sequence[MediaSource],
        build: Callable[[Sequence[MediaItem | PagesItem]], EngineInput],
        encode: Encode | None,
    ) -> PreparedPrompt:
        """Prepare parsed messages whose prompt ``build`` makes of their media."""
        builder.check_messages(parsed, len(sources))
        media = self._prepare(sources, encode)
        return _finished(build(media.places), media, encode)

    def close(self) -> None:
        """Close connections. They are opened again when they are needed."""
        self._fetcher.close_blocking()
        if self._preparation is not None:
            self._preparation.close()

    def _inputs(self, prompt: Mapping[str, Any], items: Sequence[MediaItem], salt: str) -> EngineInput:
        if (ids := prompt.get("prompt_token_ids")) is not None:
            return self._builder.from_token_ids(ids, items, cache_salt=salt)
        if not isinstance(prompt.get("prompt"), str):
            raise InvalidRequest("A prompt needs a text in 'prompt', or ids in 'prompt_token_ids'.")
        return self._builder.from_text(prompt["prompt"], items, cache_salt=salt)

    def _given(self, data: Mapping[str, Any]) -> list[tuple[MediaItem, Any]]:
        """Items that come as embeddings."""
        where = f"{FIELD}.image"
        if len(data) > 1:
            raise InvalidRequest("Embeddings can't be mixed with other media.", param=FIELD)
        if self._processor is None:
            raise InvalidRequest("This model takes no images.", param=where)
        given = given_embeddings(data["image"], self._processor)
        sources = [MediaSource(index, f"{where}[{index}]") for index in range(len(given))]
        check_media_limits(sources, self._config.limit_mm_per_prompt)
        return given

    def _prepare(self, sources: Sequence[MediaSource], encode: Encode | None) -> _Media:
        """Fetch, decode and prepare the media of a prompt. With ``encode`` they get their hashes later, and
        the last one is given to it."""
        if not sources:
            return _Media()
        if self._preparation is None:
            raise InvalidRequest("This model takes no images.", param=sources[0].where)
        check_media_limits(sources, self._config.limit_mm_per_prompt)
        for source in sources:
            if source.rows is not None or source.is_reference:
                raise InvalidRequest(
                    f"{source.where}: only a server takes this; give the image itself, or its embeddings in "
                    "multi_modal_data.",
                    param=source.where,
                )
        budget = ByteBudget(self._fetcher.policy.max_total_bytes)
        files = {
            source.index: self._open(source, self._fetcher.fetch_blocking(source, budget))
            for source in sources
            if source.pages is not None
        }
        pages = [page for file, _ in files.values() for page in file.sources]
        whole = [source for source in sources if source.pages is None]
        check_media_limits([*whole, *pages], self._config.limit_mm_per_prompt)
        processor = self._preparation.for_prompt(sources, num_images([*whole, *pages]))
        self._preparation.check_pages(processor, pages)
        name: Name | None = None
        if encode is not None and _may_be_nameless(type(processor)):
            naming: Any = processor
            processor, name = naming.nameless(), partial(self._preparation.named, naming)
        found = _Media(name=name)
        for source in sources:
            if source.pages is not None:
                file, data = files[source.index]
                made = self._preparation.prepare_pages(processor, file.sources, data)
                found.places.append(PagesItem(tuple(media.item for media in made), file.texts))
            else:
                made = [self._prepare_whole(processor, source, budget)]
                found.places.append(made[0].item)
            found.items.extend(made)
        if encode is not None and name is not None:
            encode.begin(found.items[-1])
        return found

    def _open(self, source: MediaSource, data: bytes) -> tuple[PagedFile, bytes]:
        assert self._preparation is not None
        return self._preparation.open(source, data), data

    def _prepare_whole(
        self, processor: MediaProcessor, source: MediaSource, budget: ByteBudget
    ) -> PreparedMedia:
        """Fetch and prepare an image or a video."""
        assert self._preparation is not None
        if source.is_video_file:
            data = self._fetcher.fetch_blocking(source, budget)
            return self._preparation.prepare(processor, source, [data])
        images = [self._image(image, budget) for image in source.frames or (source,)]
        return self._preparation.show(processor, source, images)

    def _image(self, source: MediaSource, budget: ByteBudget) -> Image.Image:
        if source.image is not None:
            with self._opening[id(source.image) % len(self._opening)]:
                return upright_rgb(source.image, where=source.where)
        data = self._fetcher.fetch_blocking(source, budget)
        return decode_image(data, self._limits, where=source.where)


def _finished(inputs: EngineInput, media: _Media, encode: Encode | None) -> PreparedPrompt:
    """The prompt with its media in the order of its spans, encoded if ``encode`` is given."""
    by_item = {id(prepared.item): prepared for prepared in media.items}
    items = [by_item[id(span.item)] for span in inputs.spans]
    if encode is None or not items:
        return PreparedPrompt(inputs, items)
    rows, named = encode.finish(items, inputs, media.name)
    if media.name is not None:
        pairs = zip(inputs.spans, named, strict=True)
        inputs = replace(inputs, spans=[replace(span, item=prepared.item) for span, prepared in pairs])
    return PreparedPrompt(inputs, embeddings=list(rows))


@cache
def _may_be_nameless(kind: type) -> bool:
    """Return whether a processor of this type can leave out names. To ask for a protocol takes 20 µs."""
    return issubclass(kind, NamelessProcessor)
