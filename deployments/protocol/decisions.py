"""Decisions on the wire: OpenAI's questions about an input, and their answers as probabilities."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, StrictBool, StrictStr, Tag, field_validator

from deployments.protocol.base import Part, RequestBody
from deployments.protocol.plain_fields import DECISION, Shape
from deployments.protocol.responses import input_messages
from engine.errors import InvalidRequest

#: Most questions of a request, choices of a question, and levels of a score.
MAX_QUESTIONS, MAX_CHOICES, MAX_LEVELS = 400, 255, 10

#: A choice's value. A string and a boolean of the same text are two values.
ChoiceValue = StrictStr | StrictBool


class Question(Part):
    """What all questions have.

    Attributes:
        instructions: what is asked, as a text, or as a list of texts, images and JSON.
        name: the caller's name for the question, which its answer has too.
    """

    instructions: str | list[Any]
    name: str | None = None


class PredicateQuestion(Question):
    """Asks how likely a statement is true."""

    type: Literal["predicate"]


class ChoiceOption(Part):
    value: ChoiceValue
    description: str = ""


class ChoiceQuestion(Question):
    """Asks for one of several values."""

    type: Literal["choice"]
    choices: list[ChoiceOption] = Field(min_length=2, max_length=MAX_CHOICES)

    @field_validator("choices")
    @classmethod
    def _values_differ(cls, choices: list[ChoiceOption]) -> list[ChoiceOption]:
        if len({(type(each.value), each.value) for each in choices}) < len(choices):
            raise ValueError("the values must differ")
        return choices


class ScoreLevel(Part):
    label: str
    description: str = ""


class ScoreQuestion(Question):
    """Asks for a level of an ordered scale, the lowest first."""

    type: Literal["score"]
    levels: list[ScoreLevel] = Field(min_length=2, max_length=MAX_LEVELS)


AnyQuestion = PredicateQuestion | ChoiceQuestion | ScoreQuestion


def _kind(question: Any) -> str | None:
    kind = question.get("type") if isinstance(question, Mapping) else None
    return f"a {kind}" if isinstance(kind, str) else None


#: A question by its type. Errors leave the tags out of the names of fields, since they are no identifiers.
_TaggedQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("a predicate")]
    | Annotated[ChoiceQuestion, Tag("a choice")]
    | Annotated[ScoreQuestion, Tag("a score")],
    Discriminator(
        _kind,
        custom_error_type="question_type",
        custom_error_message="type must be predicate, choice or score",
    ),
]


class DecisionRequest(RequestBody):
    """Body of ``POST /v1/decisions``.

    ``input`` stays plain data, which :func:`deployments.protocol.responses.input_messages` checks.
    """

    EXAMPLE: ClassVar[Mapping[str, Any]] = {
        "input": "A red circle.",
        "questions": [{"type": "predicate", "instructions": "Is the circle red?"}],
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        "chat_template": "it is set where the model is configured",
        "background": "decisions are answered at once",
        "conversation": "send the whole conversation as input",
        "instructions": "write a system message into input",
        "joint": "each question is answered by itself",
        "previous_response_id": "send the whole conversation as input",
        "stream": "decisions are answered at once",
        "temperature": "probabilities are the model's own; nothing is sampled",
        "tools": "decisions call none",
    }
    DEFAULTS: ClassVar[Mapping[str, Collection[Any]]] = {"temperature": (1,)}
    SILENT: ClassVar[Mapping[str, str]] = {
        "prompt_cache_key": "every prompt is cached; cache_salt keeps callers apart",
        "prompt_cache_options": "every prompt is cached",
        "request_id": "the header x-request-id names a request",
        "safety_identifier": "a note for the provider's records",
    }
    PLAIN: ClassVar[Mapping[str, Shape]] = DECISION

    input: str | list[Any]
    questions: list[_TaggedQuestion] = Field(min_length=1, max_length=MAX_QUESTIONS)
    # Beyond OpenAI.
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    priority: int = Field(default=0, ge=-(1 << 31), lt=1 << 31)
    cache_salt: str = Field(default="", max_length=256)

    def messages(self) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The input as chat messages; result and errors as those of
        :func:`deployments.protocol.responses.input_messages`."""
        given = self.input
        if not isinstance(given, str):
            given = [_plain_item(item, f"input[{index}]") for index, item in enumerate(given)]
        return input_messages(given)


def plain_parts(content: Any, where: str) -> Any:
    """A content with its parts ``input_json`` as texts: compact JSON.

    Args:
        where: the content's field.

    Raises:
        InvalidRequest: naming the part that holds neither an object nor a list of objects.
    """
    if not isinstance(content, list):
        return content
    return [_plain_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _plain_part(part: Any, where: str) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "input_json":
        return part
    data = part.get("data")
    if not isinstance(data, Mapping) and not (
        isinstance(data, list) and all(isinstance(each, Mapping) for each in data)
    ):
        raise InvalidRequest(f"{where}.data must be an object or a list of objects.", param=f"{where}.data")
    return {"type": "text", "text": json.dumps(data, ensure_ascii=False, separators=(",", ":"))}


def _plain_item(item: Any, where: str) -> Any:
    if not isinstance(item, Mapping):
        return item
    changed = {
        name: plain_parts(item[name], f"{where}.{name}") for name in ("content", "output") if name in item
    }
    return {**item, **changed}


class PredicateAnswer(BaseModel):
    """``probability`` is that of yes, against no. ``confidence`` as in :class:`ChoiceAnswer`."""

    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float
    confidence: float


class ChoiceProbability(BaseModel):
    value: ChoiceValue
    probability: float


class ChoiceAnswer(BaseModel):
    """The likeliest choice.

    Attributes:
        probabilities: of the choices, in their order; together 1.
        confidence: the probability of the likeliest choice among all that the model might say.
    """

    type: Literal["choice"] = "choice"
    name: str | None
    choice: ChoiceValue
    probabilities: list[ChoiceProbability]
    confidence: float


class ScoreProbability(BaseModel):
    """``value`` is the level's number, from 0."""

    value: int
    label: str
    probability: float


class ScoreAnswer(BaseModel):
    """``score`` is the mean of the levels' numbers, weighed by their probabilities; others as in
    :class:`ChoiceAnswer`."""

    type: Literal["score"] = "score"
    name: str | None
    score: float
    probabilities: list[ScoreProbability]
    confidence: float


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class DecisionUsage(BaseModel):
    """Tokens of the prompts of all questions, and one for each answer."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class Decision(BaseModel):
    """The answers, in the order of their questions."""

    model: str
    answers: list[Answer]
    usage: DecisionUsage


def answer_to(question: AnyQuestion, probabilities: Sequence[float], mass: float) -> Answer:
    """The answer to a question.

    Args:
        probabilities: of its options, together 1; of a predicate those of yes and no.
        mass: the probability of all options among all that the model might say.
    """
    name, likeliest = question.name, max(range(len(probabilities)), key=lambda i: probabilities[i])
    confidence = probabilities[likeliest] * mass
    if isinstance(question, PredicateQuestion):
        return PredicateAnswer(name=name, probability=probabilities[0], confidence=confidence)
    if isinstance(question, ChoiceQuestion):
        return ChoiceAnswer(
            name=name,
            choice=question.choices[likeliest].value,
            probabilities=[
                ChoiceProbability(value=choice.value, probability=each)
                for choice, each in zip(question.choices, probabilities, strict=True)
            ],
            confidence=confidence,
        )
    return ScoreAnswer(
        name=name,
        score=sum(value * each for value, each in enumerate(probabilities)),
        probabilities=[
            ScoreProbability(value=value, label=level.label, probability=each)
            for value, (level, each) in enumerate(zip(question.levels, probabilities, strict=True))
        ],
        confidence=confidence,
    )
