"""Shows queries and documents to retrieval models, and compares what comes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import ConfigError, InvalidRequest
from engine.families.base import ModelConfig
from engine.families.family import Family
from engine.families.retrieval import Part, RetrievalFormat
from engine.inputs.builder import PromptBuilder
from engine.outputs import EmbeddingOutput
from engine.pooling_params import Pooling, PoolingParams
from engine.prompt import Message, Prompt, TextPart

Item = Prompt
"""A text, or an object with ``text``, an image's ``image`` or ``image_url``, or chat parts in ``content``."""


def check_task(task: str, family: Family, model: ModelConfig) -> None:
    """Refuse a task that models of a family can't do.

    Raises:
        ConfigError: see above.
    """
    retrieval = family.retrieval(model)
    if task == "score" and retrieval.pairs is None:
        raise ConfigError(
            f"task score: {model.architecture} has no rerankers. Use task embed, whose vectors are compared.",
            param="task",
        )
    if task != "embed" and retrieval.per_token:
        raise ConfigError(f"{model.architecture} makes vectors only: set task to embed", param="task")


def parts_of(item: Item, field: str) -> list[Part]:
    """The parts of an item's content, images before texts.

    Raises:
        InvalidRequest: it is empty, or no item.
    """
    if isinstance(item, str):
        item = {"text": item}
    if not isinstance(item, Mapping):
        raise InvalidRequest(f"{field} must be a text or a dict, not {type(item).__name__}.", param=field)
    content = item.get("content", item.get("multi_modal"))
    if isinstance(content, list):
        return content
    parts: list[Part] = []
    image, text = item.get("image", item.get("image_url")), item.get("text")
    if isinstance(image, Mapping):
        parts.append({"type": "image_url", "image_url": image})
    elif isinstance(image, str):
        parts.append({"type": "image_url", "image_url": {"url": image}})
    elif image is not None:
        parts.append({"type": "image", "image": image})
    if text == "" and not parts:
        raise InvalidRequest(f"{field} must not hold an empty text.", param=field)
    if isinstance(text, str):
        parts.append({"type": "text", "text": text})
    if not parts:
        raise InvalidRequest(
            f"{field} must hold texts, or objects with text, image, or a content list.", param=field
        )
    return parts


def only_text(item: Item) -> str | None:
    """The item's text if it is nothing else."""
    if not isinstance(item, Mapping):
        return item if isinstance(item, str) else None
    text = item.get("text")
    return text if set(item) == {"text"} and isinstance(text, str) else None


def item_key(item: Item) -> str:
    """Equal for equal items."""
    return json.dumps(item, sort_keys=True, default=id)


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Puts queries and documents into the form that one model reads, and compares its outputs.

    Attributes:
        format: the family's.
        instruction: of inputs that bring none; None leaves these as they stand.
        between: the tokens of a reranker's two answers; None for a model that makes vectors.
        reranker: builds the prompts of a reranker.
    """

    format: RetrievalFormat
    instruction: str | None = None
    between: tuple[int, int] | None = None
    reranker: PromptBuilder | None = None

    @classmethod
    def of(
        cls, task: str, format: RetrievalFormat, builder: PromptBuilder, instruction: str | None
    ) -> Retrieval:
        """The retrieval of a model that is loaded for ``task``.

        Args:
            builder: the model's own.
            instruction: the configured one.

        Raises:
            ConfigError: an answer of a reranker is no token of its tokenizer, or the model takes no
                instructions.
        """
        if instruction is not None and format.per_token:
            raise ConfigError("instruction: this model takes none", param="instruction")
        pairs = format.pairs
        if task != "score" or pairs is None:
            return cls(format, instruction)
        yes, no = (builder.tokenizer.token_id(text) for text in (pairs.yes, pairs.no))
        if yes is None or no is None:
            raise ConfigError(
                f"task score: the tokenizer has no single token for {pairs.yes!r} or for {pairs.no!r}. "
                "Is it a reranker's?",
                param="task",
            )
        return cls(format, instruction, (yes, no), builder.with_template(pairs.template))

    @property
    def ranks_pairs(self) -> bool:
        """The model reads a query and a document together, and gives a score instead of vectors."""
        return self.between is not None

    @property
    def pair_builder(self) -> PromptBuilder:
        """Builds the prompts of pairs."""
        assert self.reranker is not None
        return self.reranker

    def params(self, pooling: Pooling = "last") -> PoolingParams:
        """Parameters of what is to be compared."""
        if self.between is not None:
            return PoolingParams(between=self.between)
        return PoolingParams(pooling="all" if self.format.per_token else pooling)

    def pair(self, query: Item, document: Item, instruction: str | None) -> list[dict[str, Any]]:
        """The messages that show a pair to a reranker.

        Raises:
            InvalidRequest: naming ``query`` or ``document``.
        """
        assert self.format.pairs is not None
        return self.format.pairs.messages(
            parts_of(query, "query"), parts_of(document, "document"), instruction or self.instruction
        )

    def shows_as_message(self, instruction: str | None) -> bool:
        """Return whether the model gets a text as a user's message, and not as it stands.

        Args:
            instruction: the caller's, see :meth:`instructed`.
        """
        if self.format.per_token:
            return True
        return self.format.write_text is None and self._stated(instruction) is not None

    def written(self, text: str, instruction: str | None) -> str:
        """The prompt of a text that is not shown as a message; arguments as :meth:`shows_as_message`."""
        stated = self._stated(instruction)
        if stated is None or self.format.write_text is None:
            return text
        return self.format.write_text(stated, text)

    def instructed(self, messages: Sequence[Message], instruction: str | None) -> tuple[list[Message], bool]:
        """Messages with an embedding model's instruction before them, and whether the prompt ends where the
        model's answer would begin, as it does in these models' format.

        Args:
            instruction: the caller's; empty for the models' own. None takes the configured one, which doesn't
                replace a system message.

        Raises:
            InvalidRequest: the caller gives both an instruction and a system message, or the model takes no
                instructions.
        """
        if instruction is not None and self.format.per_token:
            raise InvalidRequest("This model takes no instruction.", param="instruction")
        stated = self._stated(instruction)
        has_system = messages[0].role in ("system", "developer")
        if stated is None or (has_system and instruction is None):
            return list(messages), False
        if has_system:
            raise InvalidRequest(
                "instruction stands in place of a system message: give one of them.", param="instruction"
            )
        system = Message("system", [TextPart(self.format.write_instruction(stated))], {}, "string")
        return [system, *messages], True

    def _stated(self, instruction: str | None) -> str | None:
        """The instruction to be shown: the caller's, the configured one, or the models' own; None without."""
        given = self.instruction if instruction is None else instruction
        return None if given is None else given.strip() or self.format.default_instruction or None


def pair_score(output: EmbeddingOutput) -> float:
    """The probability that a reranker answers yes."""
    (gap,) = output.embedding
    # Each form stays finite for large numbers of its sign.
    return 1 / (1 + math.exp(-gap)) if gap >= 0 else math.exp(gap) / (1 + math.exp(gap))


def compare(query: EmbeddingOutput, document: EmbeddingOutput) -> float:
    """The similarity of two items of one model that makes vectors.

    The cosine of their vectors; with a vector for each token MaxSim, the sum over the query's tokens of the
    greatest cosine with a token of the document.
    """
    if query.token_embeddings is not None and document.token_embeddings is not None:
        cosines = query.token_embeddings @ document.token_embeddings.T
        return float(cosines.max(axis=1).sum())
    # Of equal vectors it may be rounded to a number above 1.
    return float(np.clip(np.array(query.embedding) @ np.array(document.embedding), -1.0, 1.0))
