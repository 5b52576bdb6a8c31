"""Text to token ids and back, with media and tools as a chat has them."""

from fastapi import APIRouter, Request

from deployments.body import read_body
from deployments.conversations import caller_fields
from deployments.protocol import tokens as wire
from deployments.routers.models import find_pipeline
from deployments.tools import read_tools
from engine.errors import InvalidRequest
from engine.inputs.messages import parse_messages
from engine.prompt import EngineInput, MediaItem

router = APIRouter()


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(request: Request) -> wire.TokenizeResponse:
    """The token ids of a text or of a whole conversation, media expanded."""
    body = await read_body(request, wire.TokenizeRequest, request.app.state.config.max_body_bytes)
    pipeline = find_pipeline(request, body.model)
    body.check()
    tools = read_tools(body.tools, None, None)
    messages, sources = parse_messages(body.messages) if body.messages is not None else ([], [])

    def build(items: list[MediaItem]) -> EngineInput:
        if body.prompt is not None:
            return pipeline.builder.from_text(
                body.prompt, add_special_tokens=body.add_special_tokens, placeholders_are_text=True
            )
        return pipeline.builder.from_messages(
            messages,
            items,
            add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
            continue_final_message=body.continue_final_message,
            tools=tools.functions or None,
            template_kwargs=body.chat_template_kwargs,
        )

    with caller_fields({"prompt": "prompt" if body.prompt is not None else "messages"}):
        inputs = await pipeline.tokenize(build, sources)
    ids = inputs.token_ids
    strings = None
    if body.return_token_strs:
        decode = pipeline.builder.tokenizer.decode
        strings = [decode([token], skip_special_tokens=False) for token in ids]
    return wire.TokenizeResponse(
        count=len(ids), max_model_len=await pipeline.max_model_len(), tokens=ids, token_strs=strings
    )


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(request: Request) -> wire.DetokenizeResponse:
    """The text of token ids, special tokens included."""
    body = await read_body(request, wire.DetokenizeRequest, request.app.state.config.max_body_bytes)
    tokenizer = find_pipeline(request, body.model).builder.tokenizer
    for token in body.tokens:
        if not 0 <= token < tokenizer.vocab_size:
            raise InvalidRequest(
                f"{token} is not a token id; the vocabulary has {tokenizer.vocab_size} tokens.",
                param="tokens",
            )
    return wire.DetokenizeResponse(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))
