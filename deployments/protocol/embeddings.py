"""Vectors on the wire, of OpenAI's ``input``, or of ``messages`` as in a chat."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field

from deployments.protocol.base import RequestBody, unsupported
from deployments.protocol.plain_fields import MESSAGE, Shape
from deployments.protocol.usage import UsageBody
from engine.errors import InvalidRequest
from engine.pooling_params import PoolingParams

#: OpenAI's own limit.
MAX_INPUTS = 2048


Messages = list[dict[str, Any]]


class Chat(NamedTuple):
    """A conversation in OpenAI's form, and the field that holds it."""

    messages: Messages
    field: str


class VectorBody(RequestBody):
    """Fields of every endpoint that answers with vectors. ``input`` is one text, token list or conversation,
    or a list of one kind; ``messages`` is a conversation or a list of them."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"input": ["a red circle", "a blue square"]}
    TASKS: ClassVar[tuple[str, ...]] = ("embed",)
    REFUSED: ClassVar[Mapping[str, str]] = {
        "chat_template": "it is set where the model is configured",
        "padding": "inputs are never padded",
    }
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {
        "padding": ("do_not_pad",),
    }
    SILENT: ClassVar[Mapping[str, str]] = {
        "priority": "prompts are pooled in the order of their arrival",
        "request_id": "the header x-request-id names a request",
        "user": "a note for the provider's records",
    }
    PLAIN: ClassVar[Mapping[str, Shape]] = {"input": MESSAGE, "messages": MESSAGE}

    input: str | list[str] | list[int] | list[list[int]] | Messages | list[Messages] | None = None
    messages: Messages | list[Messages] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    # Beyond OpenAI.
    embed_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    endianness: Literal["native", "little", "big"] = "native"
    instruction: str | None = Field(default=None, max_length=16384)
    pooling: str = "last"
    normalize: bool | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    cache_salt: str = Field(default="", max_length=256)

    def check(self) -> None:
        """Refuse fields that don't fit together.

        Raises:
            InvalidRequest: naming the field to change.
        """
        if (self.input is None) == (self.messages is None):
            raise InvalidRequest("Give input or messages, one of the two.", param="input")
        field, entries = ("input" if self.messages is None else "messages"), self.inputs
        if not 1 <= len(entries) <= MAX_INPUTS:
            raise InvalidRequest(
                f"{field} must have 1 to {MAX_INPUTS} entries, not {len(entries)}.", param=field
            )
        if any(not entry for entry in entries):
            raise InvalidRequest(
                f"{field} must not hold an empty text, token list or conversation.", param=field
            )
        if self.truncate_prompt_tokens is not None and not (
            self.truncate_prompt_tokens == -1 or self.truncate_prompt_tokens > 0
        ):
            raise InvalidRequest(
                "truncate_prompt_tokens must be a number of tokens, or -1 for the model's context.",
                param="truncate_prompt_tokens",
            )
        if any(isinstance(entry, Chat) for entry in entries):
            if self.add_special_tokens:
                raise unsupported("add_special_tokens", "the chat template writes them")
            if self.truncate_prompt_tokens is not None:
                raise unsupported("truncate_prompt_tokens", "shorten the messages")
        for name, usual in (("embed_dtype", ("float32",)), ("endianness", ("native", "little"))):
            if self.encoding_format != "base64" and getattr(self, name) not in usual:
                raise InvalidRequest(f"{name} is for encoding_format base64.", param=name)
        if self.normalize is not None and self.use_activation not in (None, self.normalize):
            raise InvalidRequest(
                "normalize and use_activation contradict each other.", param="use_activation"
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other.",
                param="continue_final_message",
            )

    @property
    def normalized(self) -> bool:
        """Vectors have length 1. ``use_activation`` is vLLM's name for it."""
        return self.normalize is not False and self.use_activation is not False

    @property
    def inputs(self) -> list[str | list[int] | Chat]:
        """All texts, token lists or conversations."""
        field, given = ("input", self.input) if self.messages is None else ("messages", self.messages)
        if isinstance(given, str):
            return [given]
        first = given[0] if given else None
        if isinstance(first, int):
            return [given]  # type: ignore[list-item]
        if isinstance(first, dict):
            return [Chat(given, field)]  # type: ignore[arg-type]
        if isinstance(first, list) and first and isinstance(first[0], dict):
            return [Chat(each, f"{field}[{index}]") for index, each in enumerate(given or ())]  # type: ignore[arg-type]
        return list(given or ())  # type: ignore[arg-type]

    def pooling_params(self) -> PoolingParams:
        """Return the request's pooling parameters.

        Raises:
            InvalidRequest: naming the field that is out of range.
        """
        return PoolingParams(pooling=self.pooling, normalize=self.normalized)  # type: ignore[arg-type]


class EmbeddingRequest(VectorBody):
    """Body of ``POST /v1/embeddings``."""

    dimensions: int | None = None

    def check(self) -> None:
        super().check()
        if self.pooling == "all":
            raise InvalidRequest("An embedding is one vector; /pooling gives all.", param="pooling")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest("dimensions must be at least 1.", param="dimensions")


class PoolingRequest(VectorBody):
    """Body of ``POST /pooling``."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **VectorBody.REFUSED,
        "activation": "use normalize",
        "dimensions": "use /v1/embeddings",
    }

    task: Literal["token_embed", "embed"] = "token_embed"

    def check(self) -> None:
        super().check()
        if self.task == "token_embed" and self.pooling not in ("last", "all"):
            raise InvalidRequest(
                "pooling makes one vector, which task 'embed' asks for; task 'token_embed' gives all.",
                param="pooling",
            )

    def pooling_params(self) -> PoolingParams:
        if self.task == "token_embed":
            return PoolingParams(pooling="all", normalize=self.normalized)
        return super().pooling_params()


class EmbeddingObject(BaseModel):
    """One vector: numbers, or base64 of little-endian float32, unless ``embed_dtype`` and ``endianness`` ask
    for something else."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class PoolingObject(BaseModel):
    """The vectors of one input: one of numbers, a list of those of its tokens, or base64, token after token,
    as of :class:`EmbeddingObject`. ``shape`` tells how to read base64."""

    object: Literal["pooling"] = "pooling"
    index: int
    data: list[list[float]] | list[float] | str
    shape: list[int]


class PoolingResponse(BaseModel):
    """The vectors of all inputs, in their order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[PoolingObject]
    usage: UsageBody


class EmbeddingResponse(BaseModel):
    """All vectors, in the order of the input."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingObject]
    usage: UsageBody
