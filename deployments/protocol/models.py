"""The list of models on the wire."""

from datetime import UTC, datetime
from typing import Any, Literal

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

    def anthropic(self) -> dict[str, Any]:
        """The model in Anthropic's form."""
        return {
            "type": "model",
            "id": self.id,
            "display_name": self.id,
            "created_at": datetime.fromtimestamp(self.created, UTC).isoformat(),
            "lifecycle": "active",
            "max_input_tokens": self.max_model_len,
            "max_tokens": self.max_model_len,
        }


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
