"""Scores of pairs and ranks of documents on the wire."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AliasChoices, BaseModel, Field, PrivateAttr

from deployments.protocol.base import RequestBody, unsupported
from deployments.protocol.plain_fields import SCORED, Shape
from deployments.protocol.usage import UsageBody
from engine.errors import InvalidRequest

#: Most documents of one request.
MAX_DOCUMENTS = 1024

#: A text, or an object with ``text``, an image's ``image`` or ``image_url``, or chat parts in ``content``.
Item = str | dict[str, Any]


class Pair(NamedTuple):
    """Two items to be scored, and the caller's fields that hold them."""

    one: Item
    other: Item
    fields: tuple[str, str]


def named(field: str, items: Sequence[Item]) -> list[tuple[Item, str]]:
    """Each item of a list with the name of its place."""
    return [(item, f"{field}[{index}]") for index, item in enumerate(items)]


class ScoringBody(RequestBody):
    """Fields of every endpoint that answers with scores.

    ``mm_processor_kwargs`` and ``media_io_kwargs`` hold for all media of it, see
    :func:`engine.inputs.media_options.with_options`.
    """

    TASKS: ClassVar[tuple[str, ...]] = ("embed", "score")
    REFUSED: ClassVar[Mapping[str, str]] = {
        "activation": "scores are cosines, or a reranker's probabilities",
        "chat_template": "it is set where the model is configured",
        "chat_template_kwargs": "the template of pairs has no options",
        "max_chunks_per_doc": "cut documents into chunks, and send each",
        "padding": "texts are never padded",
        "rank_fields": "send the text of each document",
        "truncate_prompt_tokens": "use max_tokens_per_doc",
    }
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {"padding": ("do_not_pad",)}
    SILENT: ClassVar[Mapping[str, str]] = {
        "priority": "prompts are pooled in the order of their arrival",
        "request_id": "the header x-request-id names a request",
        "truncation_side": "texts are never cut",
        "user": "a note for the provider's records",
    }

    # Beyond Cohere's and Jina's.
    instruction: str | None = Field(default=None, max_length=16384)
    use_activation: bool = True
    max_tokens_per_query: int = Field(default=0, ge=0)
    max_tokens_per_doc: int = Field(default=0, ge=0)
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    cache_salt: str = Field(default="", max_length=256)

    def check(self) -> None:
        """Check the request's fields.

        Raises:
            InvalidRequest, UnsupportedParameter: naming the field that can't be used.
        """
        if not self.use_activation:
            raise unsupported("use_activation", "scores are cosines, or a reranker's probabilities")


#: The names of the two sides of pairs, in other servers' words too.
_FIRST = ("text_1", "queries", "data_1")
_SECOND = ("text_2", "documents", "data_2", "items")


class ScoreRequest(ScoringBody):
    """Body of ``POST /v1/score``. One item against many, many against one, or pairs of equally long lists."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"text_1": "a red circle", "text_2": ["a circle", "a square"]}
    PLAIN: ClassVar[Mapping[str, Shape]] = dict.fromkeys((*_FIRST, *_SECOND), SCORED)

    text_1: Item | list[Item] = Field(validation_alias=AliasChoices(*_FIRST))
    text_2: Item | list[Item] = Field(validation_alias=AliasChoices(*_SECOND))
    _fields: tuple[str, str] = PrivateAttr(default=("text_1", "text_2"))

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """Read a parsed JSON object, and keep the names of its two sides; errors as the base's."""
        body = super().read(data)
        first, second = (
            next(name for name in names if data.get(name) is not None) for names in (_FIRST, _SECOND)
        )
        body._fields = first, second
        return body

    def pairs(self) -> list[Pair]:
        """The pairs to be scored.

        Raises:
            InvalidRequest: the lists don't fit together.
        """
        one_side, other_side = self._fields
        first, second = (
            named(field, given) if isinstance(given, list) else [(given, field)]
            for field, given in zip(self._fields, (self.text_1, self.text_2), strict=True)
        )
        if not first or not second or max(len(first), len(second)) > MAX_DOCUMENTS:
            raise InvalidRequest(
                f"{one_side} and {other_side} must have 1 to {MAX_DOCUMENTS} entries.", param=other_side
            )
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InvalidRequest(
                f"{one_side} has {len(first)} entries and {other_side} {len(second)}; "
                "give one against many, or pairs.",
                param=other_side,
            )
        return [
            Pair(one, other, (field, other_field))
            for (one, field), (other, other_field) in zip(first, second, strict=True)
        ]


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    """Scores in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: UsageBody


class RerankRequest(ScoringBody):
    """Body of ``POST /v1/rerank``, as Cohere's and Jina's clients send it."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"query": "a red circle", "documents": ["a circle", "a square"]}

    PLAIN: ClassVar[Mapping[str, Shape]] = {"query": SCORED, "documents": SCORED}

    query: Item
    documents: list[Item]
    top_n: int | None = None
    return_documents: bool = True

    def pairs(self) -> list[Pair]:
        """The query with each document."""
        return [
            Pair(self.query, document, ("query", field))
            for document, field in named("documents", self.documents)
        ]

    def check(self) -> None:
        super().check()
        if not 1 <= len(self.documents) <= MAX_DOCUMENTS:
            raise InvalidRequest(
                f"documents must have 1 to {MAX_DOCUMENTS} entries, not {len(self.documents)}.",
                param="documents",
            )
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequest("top_n must be at least 1.", param="top_n")


class RankedDocument(BaseModel):
    """``index`` is the document's place in the request."""

    index: int
    document: dict[str, Any] | None = None
    relevance_score: float


class RerankResponse(BaseModel):
    """The best documents first."""

    id: str
    model: str
    usage: UsageBody
    results: list[RankedDocument]
