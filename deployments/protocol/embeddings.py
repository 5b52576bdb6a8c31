"""Embeddings on the wire: OpenAI's ``input``, or ``messages`` as in a chat."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.protocol.usage import Usage
from engine.pooling_params import PoolingParams

#: OpenAI's own limit.
MAX_INPUTS = 2048


class EmbeddingRequest(BaseModel):
    """Body of ``POST /v1/embeddings``. ``input`` is one text or token list, or a list of either."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    input: str | list[str] | list[int] | list[list[int]] | None = None
    messages: list[dict[str, Any]] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None
    # Beyond OpenAI.
    pooling: str = "last"
    normalize: bool = True
    add_special_tokens: bool = True
    add_generation_prompt: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str = Field(default="", max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _no_template(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("chat_template") is not None:
            raise ValueError(
                "chat_template can't come with a request; it is set where the model is configured"
            )
        return data

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> "EmbeddingRequest":
        if (self.input is None) == (self.messages is None):
            raise ValueError("either input or messages must be given")
        if self.dimensions is not None:
            raise ValueError("dimensions can't be chosen: leave it out for the model's own")
        if not 1 <= len(self.inputs) <= MAX_INPUTS:
            raise ValueError(f"input must have 1 to {MAX_INPUTS} entries, not {len(self.inputs)}")
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """All texts or token lists; one placeholder entry for messages."""
        if self.input is None or isinstance(self.input, str):
            return [self.input or ""]
        if self.input and isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]

    def pooling_params(self) -> PoolingParams:
        """
        Raises:
            InvalidRequest: naming the field that is out of range.
        """
        return PoolingParams(pooling=self.pooling, normalize=self.normalize)  # type: ignore[arg-type]


class EmbeddingObject(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingResponse(BaseModel):
    """All vectors, in the order of the input."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[EmbeddingObject]
    usage: Usage
