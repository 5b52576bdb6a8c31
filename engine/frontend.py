"""Everything in front of the engine for one model: prompts and pictures to engine input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from PIL import Image

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.families.base import MediaProcessor, ModelConfig, NamelessProcessor, PromptAwareProcessor
from engine.families.family import Family
from engine.families.registry import resolve
from engine.fit import check_fit
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.embeds import are_embeddings, given_embeddings
from engine.inputs.messages import parse_messages
from engine.media.decode import ImageLimits, decode_image, upright_rgb
from engine.media.fetch import ByteBudget, MediaFetcher
from engine.media.guard import FetchPolicy
from engine.media.source import MediaSource, check_media_limits
from engine.prompt import EngineInput, MediaItem, PreparedMedia
from engine.sampling_params import generation_defaults
from engine.text.tokenizer import Tokenizer

#: Prepared media to their embedding rows; see :meth:`engine.encoder.EncoderEngine.encode`.
Encode = Callable[[Sequence[PreparedMedia]], Sequence[Any]]


def load_prompt_builder(config: EngineConfig) -> PromptBuilder:
    """Tokenizer, chat template and placeholders of a model; loads no weights.

    Raises:
        CheckpointError, ConfigError: a file is missing or unusable.
    """
    checkpoint, family, model = _describe(config)
    folder = tokenizer_folder(config, checkpoint)
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(
        folder, tokenizer.config, config.chat_template, family.prompt_format(model).default_template
    )
    return PromptBuilder.for_model(family, model, tokenizer, template)


def tokenizer_folder(config: EngineConfig, checkpoint: Checkpoint) -> Path:
    """Where the tokenizer of ``checkpoint`` lies, or the one that ``config`` names instead.

    Raises:
        CheckpointError: there is no such folder or hub name.
    """
    if config.tokenizer is None:
        return checkpoint.path
    return Checkpoint.open(config.tokenizer, weights=False, config=False).path


def load_media_processor(config: EngineConfig) -> MediaProcessor | None:
    """What prepares a model's pictures; None for a text-only model.

    Raises:
        CheckpointError: the model can't be served.
        ConfigError: an option of ``mm_processor_kwargs`` is unknown or out of bounds.
    """
    checkpoint, family, model = _describe(config)
    return family.media_processor(checkpoint, model, config.mm_processor_kwargs)


def fetch_policy(config: EngineConfig, policy: FetchPolicy) -> FetchPolicy:
    """``policy``, with the folder that ``config`` allows its model's pictures to be read from."""
    if config.allowed_local_media_path is None:
        return policy
    return policy.model_copy(update={"allowed_local_media_path": config.allowed_local_media_path})


def for_prompt(processor: MediaProcessor, sources: Sequence[MediaSource]) -> MediaProcessor:
    """What prepares the media of one prompt: some models show a picture otherwise among several."""
    if isinstance(processor, PromptAwareProcessor):
        return processor.among(sum(source.kind == "image" for source in sources))
    return processor


def load_sampling_defaults(config: EngineConfig) -> dict[str, Any]:
    """The fields of :class:`~engine.sampling_params.SamplingParams` that the checkpoint has defaults for."""
    return generation_defaults(_describe(config)[0].generation_config)


def load_end_tokens(config: EngineConfig) -> frozenset[int]:
    """The ids of the tokens that end an answer of ``config.model``."""
    return frozenset(_describe(config)[2].eos_token_ids)


def _describe(config: EngineConfig) -> tuple[Checkpoint, Family, ModelConfig]:
    checkpoint = Checkpoint.open(config.model, config.revision, weights=False)
    family = resolve(checkpoint)
    model = family.parse(checkpoint)
    check_fit(config, model)
    return checkpoint, family, model


@dataclass(slots=True)
class PreparedPrompt:
    """A prompt ready for the engine, with what is left to encode, in the order of its spans, or what came
    encoded."""

    inputs: EngineInput
    media: list[PreparedMedia] = field(default_factory=list)
    embeddings: list[Any] = field(default_factory=list)


class Frontend:
    """The offline way in: prompts as :class:`engine.LLM` takes them. Thread-safe.

    Args:
        config: the engine's.
        builder: makes prompts.
        processor: prepares pictures; None for a text-only model.
        fetcher: gets pictures by URL.
    """

    def __init__(
        self,
        config: EngineConfig,
        builder: PromptBuilder,
        processor: MediaProcessor | None,
        fetcher: MediaFetcher,
    ) -> None:
        self._config = config
        self._builder = builder
        self._processor = processor
        self._fetcher = fetcher
        self._limits = ImageLimits()
        # One picture may stand in several prompts: no two threads may read its file at a time.
        self._opening = [Lock() for _ in range(64)]

    @classmethod
    def load(cls, config: EngineConfig, policy: FetchPolicy | None = None) -> Frontend:
        """The front of ``config.model``; errors as :func:`load_prompt_builder`."""
        fetcher = MediaFetcher(fetch_policy(config, policy or FetchPolicy()))
        return cls(config, load_prompt_builder(config), load_media_processor(config), fetcher)

    @property
    def takes_media(self) -> bool:
        return self._processor is not None

    def from_prompt(self, prompt: str | Mapping[str, Any], encode: Encode | None = None) -> PreparedPrompt:
        """One prompt of :meth:`engine.LLM.generate`.

        Args:
            encode: encodes the media here and now, if given: a device computes their rows while they are
                named and the prompt is built.

        Raises:
            InvalidRequest: naming the entry that can't be used.
        """
        if isinstance(prompt, str):
            return PreparedPrompt(self._builder.from_text(prompt))
        if not isinstance(prompt, Mapping):
            raise InvalidRequest(
                "A prompt must be a text, or a dict with 'prompt' or 'prompt_token_ids', "
                f"not {type(prompt).__name__}.",
                param="prompt",
            )
        unknown = prompt.keys() - {"prompt", "prompt_token_ids", "multi_modal_data", "cache_salt"}
        if unknown:
            raise InvalidRequest(f"A prompt has no entry {sorted(unknown)[0]!r}.", param="prompt")
        data, salt = prompt.get("multi_modal_data") or {}, prompt.get("cache_salt", "")
        if are_embeddings(data.get("image")):
            given = self._given(data)
            inputs = self._inputs(prompt, [item for item, _ in given], salt)
            tensors = {item.hash: tensor for item, tensor in given}
            return PreparedPrompt(inputs, embeddings=[tensors[span.item.hash] for span in inputs.spans])
        media, rows = self._prepare(_media_sources(data), encode)
        return _prepared(self._inputs(prompt, [prepared.item for prepared in media], salt), media, rows)

    def _inputs(self, prompt: Mapping[str, Any], items: Sequence[MediaItem], salt: str) -> EngineInput:
        if (ids := prompt.get("prompt_token_ids")) is not None:
            return self._builder.from_token_ids(ids, items, cache_salt=salt)
        if not isinstance(prompt.get("prompt"), str):
            raise InvalidRequest("A prompt needs a text in 'prompt', or ids in 'prompt_token_ids'.")
        return self._builder.from_text(prompt["prompt"], items, cache_salt=salt)

    def _given(self, data: Mapping[str, Any]) -> list[tuple[MediaItem, Any]]:
        """Items that come as embeddings."""
        where = "multi_modal_data.image"
        if len(data) > 1:
            raise InvalidRequest("Embeddings can't be mixed with other media.", param="multi_modal_data")
        if self._processor is None:
            raise InvalidRequest("This model takes no pictures.", param=where)
        given = given_embeddings(data["image"], self._processor)
        sources = [MediaSource(index, f"{where}[{index}]") for index in range(len(given))]
        check_media_limits(sources, self._config.limit_mm_per_prompt)
        return given

    def from_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        encode: Encode | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """One conversation of :meth:`engine.LLM.chat`; ``encode`` as in :meth:`from_prompt`.

        Raises:
            InvalidRequest: naming the message or part that can't be used.
        """
        parsed, sources = parse_messages(messages)
        media, rows = self._prepare(sources, encode)
        builder = self._builder if chat_template is None else self._builder.with_template(chat_template)
        inputs = builder.from_messages(
            parsed,
            [prepared.item for prepared in media],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            template_kwargs=chat_template_kwargs,
        )
        return _prepared(inputs, media, rows)

    def close(self) -> None:
        """Close connections. They are opened again when they are needed."""
        self._fetcher.close_blocking()

    def _prepare(
        self, sources: Sequence[MediaSource], encode: Encode | None
    ) -> tuple[list[PreparedMedia], Sequence[Any] | None]:
        """The media of a prompt, and their rows if they are to be encoded here."""
        if not sources:
            return [], None
        if self._processor is None:
            raise InvalidRequest("This model takes no pictures.", param=sources[0].where)
        check_media_limits(sources, self._config.limit_mm_per_prompt)
        budget = ByteBudget(self._fetcher.policy.max_total_bytes)
        processor = for_prompt(self._processor, sources)
        names_later = processor if encode is not None and isinstance(processor, NamelessProcessor) else None
        if names_later is not None:
            processor = names_later.nameless()
        prepared = []
        for source in sources:
            if source.kind == "video":
                frames = [self._picture(frame, budget) for frame in source.frames]
                prepared.append(processor.prepare_video(frames))
            else:
                prepared.append(processor.prepare(self._picture(source, budget)))
        rows = None if encode is None else encode(prepared)
        if names_later is not None:
            prepared = [names_later.named(media) for media in prepared]
        return prepared, rows

    def _picture(self, source: MediaSource, budget: ByteBudget) -> Image.Image:
        if source.image is not None:
            with self._opening[id(source.image) % len(self._opening)]:
                return upright_rgb(source.image, where=source.where)
        data = self._fetcher.fetch_blocking(source, budget)
        return decode_image(data, self._limits, where=source.where)


def _prepared(
    inputs: EngineInput, media: Sequence[PreparedMedia], rows: Sequence[Any] | None
) -> PreparedPrompt:
    # A raw prompt may mark a video before a picture, which stand the other way round in multi_modal_data.
    place = {prepared.item.hash: index for index, prepared in enumerate(media)}
    order = [place[span.item.hash] for span in inputs.spans]
    if rows is None:
        return PreparedPrompt(inputs, [media[index] for index in order])
    return PreparedPrompt(inputs, embeddings=[rows[index] for index in order])


def _media_sources(data: Mapping[str, Any]) -> list[MediaSource]:
    """``multi_modal_data`` as sources: pictures, then videos."""
    unknown = data.keys() - {"image", "video"}
    if unknown:
        raise InvalidRequest(
            f"multi_modal_data has no entry {sorted(unknown)[0]!r}.", param="multi_modal_data"
        )
    sources: list[MediaSource] = []
    for kind in ("image", "video"):
        given = data.get(kind)
        if given is None:
            continue
        many = given if isinstance(given, list | tuple) else [given]
        if kind == "video" and many and isinstance(many[0], Image.Image):
            many = [many]
        for value in many:
            where = f"multi_modal_data.{kind}[{len(sources)}]"
            if kind == "video":
                frames = tuple(_source(frame, len(sources), where) for frame in value)
                sources.append(MediaSource(len(sources), where, "video", frames=frames))
            else:
                sources.append(_source(value, len(sources), where))
    return sources


def _source(value: Any, index: int, where: str) -> MediaSource:
    if isinstance(value, Image.Image):
        return MediaSource(index, where, image=value)
    if isinstance(value, bytes):
        return MediaSource(index, where, data=value)
    raise InvalidRequest(f"{where} must be a PIL image, not {type(value).__name__}.", param=where)
