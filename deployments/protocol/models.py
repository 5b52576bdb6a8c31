"""The list of models on the wire."""

from typing import Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    """One model that is served; ``created`` is when this server began to serve it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "sightline"
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
