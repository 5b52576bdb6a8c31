"""A drawn checkpoint on disk: written once, then read by the engine and by the reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.engine.families.case import Reference
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.prompts import Style
from tests.engine.families.drawn.rope import Lengths
from tests.engine.tiny import split_shards, spread

#: Answer tokens of every request, at most.
STEPS = 6


class NotAModel(Exception):
    """Transformers itself refuses the drawn configuration, so there is nothing to compare with."""


class Unavailable(Exception):
    """The installed release of Transformers lacks what the family's reference needs."""


@dataclass(frozen=True)
class Drawn:
    """A checkpoint and what is known about it.

    Attributes:
        path: folder of the checkpoint.
        reference: reads the same folder.
        style: of the family's prompts.
        tokens: longest sequence, answer included.
        options: of every engine that loads the checkpoint.
        media: token ids that stand for rows of media.
        lengths: how the rotary embedding depends on the length of a sequence.
        ends: tokens that end an answer whatever the files state.
        together: most tokens that attend to each other, so that a step computes all of them and the prefix
            cache may keep fewer blocks than are full; 1 where every token attends to earlier ones only.
        vectors: the model makes vectors and no answers.
    """

    path: Path
    reference: Reference
    style: Style
    tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)
    media: frozenset[int] = frozenset()
    lengths: Lengths = field(default_factory=Lengths)
    ends: frozenset[int] = frozenset()
    together: int = 1
    vectors: bool = False


class Family(Protocol):
    """Draws checkpoints of one family.

    Attributes:
        architectures: all that config.json may name.
    """

    name: str
    architectures: tuple[str, ...]

    def make(self, draw: Draw, path: Path) -> Drawn:
        """Write a checkpoint into the empty folder ``path``.

        Raises:
            NotAModel, Unavailable: see there.
        """


def write_model(
    draw: Draw,
    path: Path,
    raw: Mapping[str, Any],
    architecture: str,
    rename: Callable[[str], str] | None = None,
    most_embedding: float = 1.0,
) -> torch.nn.Module:
    """Write config.json as drawn, and random weights for the model that Transformers makes of it; the model.

    Args:
        architecture: name of Transformers' class.
        rename: from the names that Transformers saves to those to write.
        most_embedding: standard deviation of embeddings that are not tied to the head.
    """
    write_json(path / "config.json", {"architectures": [architecture], **raw})
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        model = getattr(transformers, architecture)(config)
    except Exception as error:
        raise NotAModel(f"{type(error).__name__}: {error}") from error
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    save(draw, path, spread_for(draw, model, 0.05 if tied else most_embedding), rename)
    # Transformers has written its own spelling.
    write_json(path / "config.json", {"architectures": [architecture], **raw})
    return model


R = TypeVar("R")


def same_weights(reference: R, model: torch.nn.Module) -> R:
    """``reference``, which has read all weights of ``model``: Transformers draws new ones for names that it
    doesn't find."""
    theirs = dict(reference.model.named_parameters())  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), f"{name} was not read"
    return reference


def spread_for(draw: Draw, model: torch.nn.Module, embedding_std: float) -> torch.nn.Module:
    """The model with weights that make every part count; bfloat16 numbers where a GPU will round to them."""
    model = spread(model, seed=draw.seed % 1000, embedding_std=embedding_std)
    if draw.coarse:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())
    return model


def save(draw: Draw, path: Path, model: Any, rename: Callable[[str], str] | None) -> None:
    model.save_pretrained(path)
    file = path / "model.safetensors"
    if rename is not None:
        tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    if draw.varies("shards", 0.15):
        split_shards(path)


def place_tied(draw: Draw, raw: dict[str, Any], text: dict[str, Any]) -> None:
    """Move ``tie_word_embeddings`` from the decoder's fields to config.json, in some cases."""
    tied = text.pop("tie_word_embeddings", None)
    if tied is not None:
        (raw if draw.varies("tied stated outside", 0.5) else text)["tie_word_embeddings"] = tied


def draw_ends(draw: Draw, path: Path, raw: dict[str, Any], end: int, other: int) -> None:
    """State the tokens that end an answer, in config.json's fields, generation_config.json, or both."""
    raw["eos_token_id"] = draw.variant("eos spelled", (end, [end, other], [end]), 0.3)
    how = draw.variant("generation config", ("saved", "absent", "list", "another"), 0.4)
    file = path / "generation_config.json"
    if how == "absent":
        file.unlink(missing_ok=True)
    elif how != "saved":
        write_json(file, {"eos_token_id": [end, other] if how == "list" else other})


def ends_of(path: Path) -> frozenset[int]:
    """The union of what the checkpoint's files state."""
    found: set[int] = set()
    config = read_json(path / "config.json")
    text = config.get("text_config") or config.get("llm_config") or {}
    for source in (read_json(path / "generation_config.json"), config, text):
        value = source.get("eos_token_id")
        found |= set(value) if isinstance(value, list) else set() if value is None else {value}
    return frozenset(found)


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value))
