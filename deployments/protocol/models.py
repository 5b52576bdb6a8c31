"""The list of models on the wire."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One model that is served.

    Attributes:
        created: when this server began to serve it.
        root: the same name: clients such as ``vllm bench serve`` look for a tokenizer by it. Where the model
            lies on the server is nobody's business.
        parent: no model here is an adapter of another.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sightline"
    root: str
    parent: None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
