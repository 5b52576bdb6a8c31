"""Turns texts, token ids or a conversation into vectors, for every endpoint that answers with them."""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deployments.caller_fields import caller_fields
from deployments.pipeline import EncodedPrompt, Pipeline
from deployments.protocol.embeddings import Chat, VectorBody
from deployments.tasks import all_or_none
from engine.errors import InvalidRequest
from engine.inputs.media_options import with_options
from engine.inputs.messages import parse_messages
from engine.outputs import EmbeddingOutput, Usage
from engine.prompt import EngineInput, MediaItem, PagesItem

#: Inputs of one request that are in the engine at a time: one caller's list doesn't push out all others.
AT_A_TIME = 64

#: Most numbers of one answer.
MAX_NUMBERS = 1 << 24


async def vectors(pipeline: Pipeline, name: str, body: VectorBody) -> list[EmbeddingOutput]:
    """Pool all inputs of a checked body.

    Args:
        name: of the request.

    Raises:
        SightlineError: under the caller's field names.
    """
    params = body.pooling_params()
    places = asyncio.Semaphore(AT_A_TIME)
    numbers = 0

    async def pool(index: int, given: str | list[int] | Chat) -> EmbeddingOutput:
        nonlocal numbers
        async with places:
            with caller_fields(_field_names(given)):
                prompt = await (
                    _chat(pipeline, body, given) if isinstance(given, Chat) else _plain(pipeline, body, given)
                )
                output = await pipeline.embed(f"{name}-{index}", prompt, params)
        numbers += len(output.embedding)
        if output.token_embeddings is not None:
            numbers += output.token_embeddings.size
        if numbers > MAX_NUMBERS:
            raise InvalidRequest(
                f"The answer would have more than {MAX_NUMBERS} numbers; send fewer inputs.",
                param="input" if body.messages is None else "messages",
            )
        return output

    return await all_or_none(pool(index, given) for index, given in enumerate(body.inputs))


def _field_names(given: str | list[int] | Chat) -> dict[str, str]:
    """The caller's fields by the names under which the engine knows an input."""
    if not isinstance(given, Chat):
        return {"prompt": "input"}
    messages = {f"messages[{index}]": f"{given.field}[{index}]" for index in range(len(given.messages))}
    return {"prompt": given.field, "messages": given.field, **messages}


def total_usage(outputs: list[EmbeddingOutput]) -> Usage:
    """The tokens of all outputs."""
    return sum((output.usage for output in outputs), Usage())


def encoded(vector: np.ndarray, body: VectorBody) -> str:
    """Base64 of numbers in the dtype and byte order that ``body`` asks for."""
    found = vector.astype(np.float16 if body.embed_dtype == "float16" else np.float32)
    if body.embed_dtype == "bfloat16":
        # The upper half of a float32, rounded to the nearest, ties to even.
        bits = found.view(np.uint32)
        found = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    ordered = found.dtype.newbyteorder(">" if body.endianness == "big" else "<")
    return base64.b64encode(found.astype(ordered).tobytes()).decode()


async def chat_prompt(
    pipeline: Pipeline,
    messages: Sequence[Mapping[str, Any]],
    instruction: str | None,
    salt: str,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
    options: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None),
) -> EncodedPrompt:
    """The prompt of a conversation that is to be one vector, or one vector for each token.

    Args:
        messages: in OpenAI's form.
        instruction: the caller's, see :meth:`engine.inputs.retrieval.Retrieval.instructed`.
        options: of the media's processor and of their files.

    Raises:
        SightlineError: naming ``messages`` or ``instruction``.
    """
    parsed, sources = parse_messages(messages)
    parsed, begins = pipeline.retrieval.instructed(parsed, instruction)

    def build(items: list[MediaItem | PagesItem]) -> EngineInput:
        return pipeline.builder.from_messages(
            parsed,
            items,
            add_generation_prompt=(add_generation_prompt or begins) and not continue_final_message,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            cache_salt=salt,
        )

    return await pipeline.prepare(build, with_options(sources, *options), salt=salt)


async def text_prompt(pipeline: Pipeline, text: str, instruction: str | None, salt: str) -> EncodedPrompt:
    """The prompt of a text: as it stands; or as a user's message, if there is an instruction or the model has
    a template for texts. Errors as :func:`chat_prompt`, naming ``prompt``.
    """
    if pipeline.retrieval.shows_as_message(instruction):
        with caller_fields({"messages": "prompt"}):
            return await chat_prompt(pipeline, [{"role": "user", "content": text}], instruction, salt)

    written = pipeline.retrieval.written(text, instruction)

    def build(_: list[MediaItem | PagesItem]) -> EngineInput:
        return pipeline.builder.from_text(written, cache_salt=salt, placeholders_are_text=True)

    return await pipeline.prepare(build, salt=salt)


async def _chat(pipeline: Pipeline, body: VectorBody, given: Chat) -> EncodedPrompt:
    return await chat_prompt(
        pipeline,
        given.messages,
        body.instruction,
        body.cache_salt,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=body.chat_template_kwargs,
        options=(body.mm_processor_kwargs, body.media_io_kwargs),
    )


async def _plain(pipeline: Pipeline, body: VectorBody, given: str | list[int]) -> EncodedPrompt:
    limit = body.truncate_prompt_tokens
    if limit is not None:
        most = await pipeline.max_model_len()
        limit = most if limit == -1 else min(limit, most)
    if isinstance(given, str) and pipeline.retrieval.shows_as_message(body.instruction):
        if limit is not None:
            raise InvalidRequest(
                "A prompt of several parts can't be truncated: shorten the text, or leave out "
                "truncate_prompt_tokens.",
                param="truncate_prompt_tokens",
            )
        return await text_prompt(pipeline, given, body.instruction, body.cache_salt)

    def build(_: list[MediaItem | PagesItem]) -> EngineInput:
        special = isinstance(given, str) and body.add_special_tokens is not False
        if isinstance(given, str):
            inputs = pipeline.builder.from_text(
                pipeline.retrieval.written(given, body.instruction),
                add_special_tokens=special,
                cache_salt=body.cache_salt,
                placeholders_are_text=True,
            )
        else:
            inputs = pipeline.builder.from_token_ids(given, cache_salt=body.cache_salt)
        if limit is None:
            return inputs
        with caller_fields({"prompt": "truncate_prompt_tokens"}):
            return pipeline.builder.truncated(inputs, limit, body.truncation_side, add_special_tokens=special)

    return await pipeline.prepare(build, salt=body.cache_salt)
