"""The form in which a family's retrieval models read texts and images: data, without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Part = Any
"""A part of a chat message's content, in OpenAI's form."""

#: The question of Qwen's rerankers, as published with them.
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)

#: Padding tokens behind a query, in which models of a vector per token write further vectors for it.
_AUGMENTATION = 10

_CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFormat:
    """The prompt that asks a reranker whether a document meets a query. The score is the probability of
    ``yes`` against ``no`` as the next token.

    Attributes:
        instruction: stands where the caller gives none.
        before_query, before_document: texts before the two, in the user's message.
        template: Jinja chat template, in place of the checkpoint's.
        yes, no: the two answers, each one token.
    """

    instruction: str
    before_query: str
    before_document: str
    template: str
    yes: str = "yes"
    no: str = "no"

    def messages(
        self, query: Sequence[Part], document: Sequence[Part], instruction: str | None
    ) -> list[dict[str, Any]]:
        """The conversation for one pair, as OpenAI messages.

        Args:
            query, document: parts of their contents; without any, ``NULL`` stands in their place.
        """
        texts = (f"<Instruct>: {instruction or self.instruction}", self.before_query, self.before_document)
        before, of_query, of_document = ({"type": "text", "text": text} for text in texts)
        empty = ({"type": "text", "text": "NULL"},)
        content = [before, of_query, *(query or empty), of_document, *(document or empty)]
        return [{"role": "system", "content": _JUDGE}, {"role": "user", "content": content}]


QWEN3_VL_PAIRS = PairFormat(
    instruction="Given a search query, retrieve relevant candidates that answer the query.",
    before_query="<Query>:",
    before_document="\n<Document>:",
    template=_CHATML,
)
QWEN3_PAIRS = PairFormat(
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    before_query="\n<Query>: ",
    before_document="\n<Document>: ",
    template=_CHATML + "{{- '<think>\\n\\n</think>\\n\\n' -}}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalFormat:
    """The prompts of a family's retrieval models.

    Attributes:
        pairs: the prompt of its rerankers; None if it has none.
        per_token: its models make one vector for each token, and are compared by MaxSim; they make no text.
        default_instruction: of its embedding models, where the caller asks for theirs.
        write_instruction: how its embedding models are shown an instruction, in a system message.
        write_text: makes of an instruction and a text the prompt of its embedding models that take texts as
            they stand, without a chat template; None if they take messages.
    """

    pairs: PairFormat | None = None
    per_token: bool = False
    default_instruction: str = ""
    write_instruction: Callable[[str], str] = str.strip
    write_text: Callable[[str, str], str] | None = None


def vectors_template(*, document: str, query: str, end: str = "''") -> str:
    """Jinja chat template of a model with a vector for each token: an image is a document, a text a query.

    Args:
        document: Jinja expression of the prompt of an image.
        query: the same of a text, the variable ``text``, up to the padding tokens behind it.
        end: the same of what follows the padding tokens.
    """
    augmented = f"{{{{ {query} + pad_token * {_AUGMENTATION} + {end} }}}}"
    return (
        "{% macro query(text) %}" + augmented + "{% endmacro %}"
        "{% for message in messages %}"
        "{% if message['content'] is string %}{{ query(message['content']) }}"
        "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{{ " + document + " }}{% elif part['type'] == 'text' %}{{ query(part['text']) }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )


def qwen3_query(instruction: str, text: str) -> str:
    """A query as Qwen3-Embedding's published script writes it. Documents stand alone."""
    return f"Instruct: {instruction}\nQuery:{text}"
