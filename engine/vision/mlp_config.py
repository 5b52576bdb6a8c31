"""The configuration of MLP connectors. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """Two linear layers from a tower's features to embedding rows; the hidden layer is as wide as a row.

    Attributes:
        activation: between them, by its Hugging Face name.
        bias: whether both have biases.
    """

    activation: str = "gelu"
    bias: bool = True
