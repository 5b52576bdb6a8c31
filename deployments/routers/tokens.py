"""Text to token ids and back, with media and tools as a chat has them."""

from functools import partial

from fastapi import APIRouter, Request

from deployments import conversations
from deployments.conversations import Conversation
from deployments.openapi import described
from deployments.pipeline import Pipeline
from deployments.protocol import tokens as wire
from deployments.protocol.chat import ends_with_prefix
from deployments.routers.models import read_request
from deployments.tools import read_tools
from engine.errors import InvalidRequest
from engine.prompt import EngineInput, MediaItem, PagesItem
from engine.sampling_params import SamplingParams

router = APIRouter()


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
@described(wire.TokenizeRequest, wire.TokenizeResponse)
async def tokenize(request: Request) -> wire.TokenizeResponse:
    """The token ids of a text or of a whole conversation, media expanded."""
    body, pipeline = await read_request(request, wire.TokenizeRequest)
    body.check()
    tools = read_tools(body.tools, None, None)
    if body.messages is not None:
        inputs = await conversations.tokenize(
            pipeline,
            Conversation(
                body.messages,
                SamplingParams(),
                tools,
                template_options=body.chat_template_kwargs or {},
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message or ends_with_prefix(body.messages),
                field_names={"prompt": "messages"},
                processor_options=body.mm_processor_kwargs,
                reading_options=body.media_io_kwargs,
            ),
        )
    else:
        inputs = await pipeline.tokenize(partial(_plain, pipeline, body))
    ids = inputs.token_ids
    strings = None
    if body.return_token_strs:
        decode = pipeline.builder.tokenizer.decode
        strings = [decode([token], skip_special_tokens=False) for token in ids]
    return wire.TokenizeResponse(
        count=len(ids), max_model_len=await pipeline.max_model_len(), tokens=ids, token_strs=strings
    )


def _plain(pipeline: Pipeline, body: wire.TokenizeRequest, _: list[MediaItem | PagesItem]) -> EngineInput:
    return pipeline.builder.from_text(
        body.prompt or "",
        add_special_tokens=body.add_special_tokens is not False,
        placeholders_are_text=True,
    )


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
@described(wire.DetokenizeRequest, wire.DetokenizeResponse)
async def detokenize(request: Request) -> wire.DetokenizeResponse:
    """The text of token ids, special tokens included."""
    body, pipeline = await read_request(request, wire.DetokenizeRequest)
    tokenizer = pipeline.builder.tokenizer
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise InvalidRequest(
                f"{token} is not a token id; the vocabulary has {tokenizer.vocab_size} tokens.",
                param="tokens",
            )
    return wire.DetokenizeResponse(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))
