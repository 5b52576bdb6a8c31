"""The parts of a model that its callers' side needs, by its configuration: no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint.folder import Checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidRequest
from engine.families.base import MediaProcessor, ModelConfig
from engine.families.family import Family
from engine.families.registry import resolve
from engine.fit import check_fit
from engine.generation_config import from_model_config, sampling_defaults
from engine.inputs.builder import PromptBuilder
from engine.inputs.chat_template import ChatTemplate
from engine.inputs.retrieval import Retrieval, check_task
from engine.media.guard import FetchPolicy
from engine.sampling_params import SamplingParams
from engine.text.tokenizer import Tokenizer


def load_prompt_builder(config: EngineConfig) -> PromptBuilder:
    """Load a model's tokenizer, chat template and placeholder strings, but no weights.

    Raises:
        CheckpointError, ConfigError: a file is missing or unusable.
    """
    checkpoint, family, model = _describe(config)
    folder = tokenizer_folder(config, checkpoint)
    tokenizer = Tokenizer.load(folder)
    prompt_format = family.prompt_format(model)
    template = ChatTemplate.load(
        folder,
        tokenizer.config,
        config.chat_template or prompt_format.template,
        prompt_format.default_template,
    )
    return PromptBuilder.for_model(family, model, tokenizer, template)


def tokenizer_folder(config: EngineConfig, checkpoint: Checkpoint) -> Path:
    """The folder of the checkpoint's tokenizer, or of the one that ``config`` names instead.

    Raises:
        CheckpointError: there is no such folder or hub name.
    """
    if config.tokenizer is None:
        return checkpoint.path
    try:
        return Checkpoint.open(config.tokenizer, weights=False, config=False).path
    except CheckpointError as error:
        raise CheckpointError(error.message, param="tokenizer") from error


def load_retrieval(config: EngineConfig, builder: PromptBuilder) -> Retrieval:
    """Load the form in which ``config.model`` reads queries and documents. ``builder`` makes its prompts.

    Raises:
        CheckpointError: the model can't be served.
        ConfigError: it can't do its task.
    """
    _, family, model = _describe(config)
    return Retrieval.of(config.task, family.retrieval(model), builder, config.instruction)


def load_media_processor(config: EngineConfig) -> MediaProcessor | None:
    """Load the processor of a model's media; None for a text-only model.

    Raises:
        CheckpointError: the model can't be served.
        ConfigError: an option of ``mm_processor_kwargs`` is unknown or out of bounds.
    """
    checkpoint, family, model = _describe(config)
    return family.media_processor(checkpoint, model, config.mm_processor_kwargs)


def load_embedding_width(config: EngineConfig) -> int:
    """Numbers per embedding row of ``config.model``; errors as :func:`load_media_processor`."""
    return _describe(config)[2].embedding_width


def fetch_policy(config: EngineConfig, policy: FetchPolicy) -> FetchPolicy:
    """``policy`` with the folder that ``config`` allows media to be read from."""
    if config.allowed_local_media_path is None:
        return policy
    return policy.model_copy(update={"allowed_local_media_path": config.allowed_local_media_path})


def load_sampling_defaults(config: EngineConfig) -> dict[str, Any]:
    """The checkpoint's defaults for fields of :class:`~engine.sampling_params.SamplingParams`.

    Raises:
        CheckpointError: a field is not supported, or out of bounds.
    """
    checkpoint, _, model = _describe(config)
    size, file = model.decoder.vocab_size, "generation_config.json"
    fields = checkpoint.generation_config
    if not checkpoint.has(file):
        file = "config.json"
        fields = from_model_config(checkpoint.config)
    defaults = sampling_defaults(fields, model.eos_token_ids, size, file)
    try:
        SamplingParams.from_defaults(defaults).verify(size, max_model_len=1 << 62)
    except InvalidRequest as error:
        raise CheckpointError(f"{file} can't be followed: {error.message}") from None
    return defaults


def load_end_tokens(config: EngineConfig) -> frozenset[int]:
    """The ids of the tokens that end an answer of ``config.model``."""
    return frozenset(_describe(config)[2].eos_token_ids)


def _describe(config: EngineConfig) -> tuple[Checkpoint, Family, ModelConfig]:
    checkpoint = Checkpoint.open(config.model, config.revision, weights=False)
    family = resolve(checkpoint)
    model = family.parse(checkpoint)
    check_fit(config, model)
    check_task(config.task, family, model)
    return checkpoint, family, model
