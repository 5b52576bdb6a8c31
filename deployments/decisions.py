"""Reads answers to questions off the probabilities of a prompt's next token.

Each question stands behind the input in a prompt of its own, with a label for each option. The answer is how
likely the labels are as the first token of the model's reply.
"""

import asyncio
import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache

from deployments.caller_fields import caller_fields, renamed
from deployments.pipeline import EncodedPrompt, Pipeline, SharedMedia
from deployments.protocol.decisions import (
    Answer,
    AnyQuestion,
    ChoiceQuestion,
    DecisionRequest,
    PredicateQuestion,
    answer_to,
    plain_parts,
)
from deployments.report import current_report
from deployments.tasks import all_or_none
from engine.errors import InvalidRequest, RequestFailed
from engine.inputs.media_options import with_options
from engine.inputs.messages import parse_messages
from engine.media.source import MediaSource
from engine.outputs import TokenLogprob, Usage
from engine.prompt import EngineInput, MediaItem, MediaPart, Message, PagesItem, TextPart
from engine.sampling_params import MAX_LOGPROB_TOKEN_IDS, SamplingParams

#: Questions of one request that are in the engine at a time.
_AT_A_TIME = 16

#: Stands between the input and a question.
_GAP = "\n\n"

#: Gives the tokens that spell a label, alone or behind a space.
Spellings = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Reading:
    """One question of a request.

    Attributes:
        messages: the conversation that asks it; their media by their index in ``items``.
        items: the indices of those media among all of the request.
        labels: for each option the tokens that name it.
        names: the caller's fields by the names under which the engine knows them.
    """

    question: AnyQuestion
    messages: list[Message]
    items: list[int]
    labels: list[list[int]]
    names: Mapping[str, str]


async def decide(pipeline: Pipeline, name: str, body: DecisionRequest) -> tuple[list[Answer], Usage]:
    """Answer the questions of a request.

    Args:
        name: of the request.

    Returns:
        The answers, in the order of the questions, and the tokens of all prompts.

    Raises:
        SightlineError: under the caller's field names. What can't be read is refused before any work, and
            the first prompt before its media are encoded; a later one that is too long when its turn comes.
    """
    current_report().answer = name
    readings, sources = await asyncio.to_thread(_readings, pipeline, body)
    shared, places = SharedMedia(sources), asyncio.Semaphore(_AT_A_TIME)

    async def read(index: int, reading: _Reading) -> tuple[Answer, Usage]:
        async with places:
            return await _read(pipeline, f"{name}-{index}", body, reading, shared)

    # The first one prepares and encodes the media, and leaves the input in the prefix cache.
    first = await read(0, readings[0])
    others = await all_or_none(read(index, each) for index, each in enumerate(readings[1:], start=1))
    answers, usages = zip(first, *others, strict=True)
    return list(answers), sum(usages, Usage())


async def _read(
    pipeline: Pipeline, name: str, body: DecisionRequest, reading: _Reading, shared: SharedMedia
) -> tuple[Answer, Usage]:
    """The answer to one question, and its tokens."""
    wanted = [token for label in reading.labels for token in label]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprob_token_ids=wanted)
    options = {"enable_thinking": False, **(body.chat_template_kwargs or {})}

    def build(items: list[MediaItem | PagesItem]) -> EngineInput:
        inputs = pipeline.builder.from_messages(
            reading.messages,
            [items[index] for index in reading.items],
            template_kwargs=options,
            cache_salt=body.cache_salt,
        )
        if pipeline.format.begins_inside(inputs.text):
            raise InvalidRequest(
                "This model thinks before it answers, so its next token decides nothing. Choose a model that "
                "answers at once.",
                param="model",
            )
        return inputs

    with caller_fields(reading.names):
        prompt = await pipeline.prepare(build, shared, params=params, salt=body.cache_salt)
    row, usage = await _next_token(pipeline, name, prompt, params, body.priority, reading.names)
    # Tokens that spell one label are one option.
    chances = [math.fsum(math.exp(row[token].logprob) for token in label) for label in reading.labels]
    mass = math.fsum(chances)
    if not mass:
        # All are as unlikely as numbers can tell: compare them by their best spelling.
        best = [max(row[token].logprob for token in label) for label in reading.labels]
        chances = [math.exp(each - max(best)) for each in best]
    whole = math.fsum(chances)
    return answer_to(reading.question, [each / whole for each in chances], mass), usage


async def _next_token(
    pipeline: Pipeline,
    name: str,
    prompt: EncodedPrompt,
    params: SamplingParams,
    priority: int,
    names: Mapping[str, str],
) -> tuple[Mapping[int, TokenLogprob], Usage]:
    """The log-probabilities in the place of a prompt's next token, and the tokens of both."""
    rows: list[Mapping[int, TokenLogprob]] = []
    usage = Usage()
    async with aclosing(pipeline.generate(name, prompt, params, priority=priority, names=names)) as updates:
        async for update in updates:
            rows += [row for delta in update.deltas for row in delta.logprobs or ()]
            usage = update.usage
    if not rows:
        raise RequestFailed("The engine gave no probabilities.")
    return rows[0], usage


def _readings(pipeline: Pipeline, body: DecisionRequest) -> tuple[list[_Reading], list[MediaSource]]:
    """The questions of a request, and the media of its input and of all of them.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    with caller_fields({"messages": "input"}):
        given, fields = body.messages()
        fields = {"prompt": "input", "messages": "input", **fields}
    with caller_fields(fields):
        messages, sources = parse_messages(given)
    sources = [replace(each, where=renamed(each.where, fields)) for each in sources]
    tokenizer = pipeline.builder.tokenizer
    spellings = _spellings(tokenizer.encode_piece, tokenizer.role_id("unk_token"))
    shown, readings = len(sources), list[_Reading]()
    for index, question in enumerate(body.questions):
        where = f"questions[{index}]"
        names = {"messages[0].content": f"{where}.instructions", "messages": where}
        texts, labels = _options(question, where, spellings)
        with caller_fields(names):
            content = plain_parts(question.instructions, f"{where}.instructions")
            (asked,), own = parse_messages([{"role": "user", "content": content}])
        items = [*range(shown), *range(len(sources), len(sources) + len(own))]
        sources += [
            replace(each, index=len(sources) + number, where=renamed(each.where, names))
            for number, each in enumerate(own)
        ]
        parts = [
            replace(part, index=part.index + shown) if isinstance(part, MediaPart) else part
            for part in asked.parts
        ]
        asked = replace(asked, parts=_joined([*parts, TextPart(texts)], "\n"))
        # The first prompt was not too long, so the input is not what makes a later one so.
        known = {**fields, "prompt": where} if readings else fields
        readings.append(_Reading(question, _with_question(messages, asked), items, labels, known))
    return readings, with_options(sources, body.mm_processor_kwargs, body.media_io_kwargs)


def _options(question: AnyQuestion, where: str, spellings: Spellings) -> tuple[str, list[list[int]]]:
    """The text that lists a question's options and says how to answer, and the tokens of each option.

    Raises:
        InvalidRequest: the tokenizer has no such tokens.
    """
    if isinstance(question, PredicateQuestion):
        labels = _told_apart([[*spellings(word), *spellings(word.title())] for word in ("yes", "no")])
        if not all(labels):
            raise InvalidRequest("This model's tokenizer has no token for yes or no.", param=where)
        return "Answer yes or no.", labels
    if isinstance(question, ChoiceQuestion):
        field, sets, how = "choices", _letters(), "Answer with the letter of one option."
        options = [(_shown(each.value), each.description) for each in question.choices]
    else:
        field, sets, how = "levels", iter([string.digits]), "Answer with the number of one level."
        options = [(each.label, each.description) for each in question.levels]
    most = 0
    for names in sets:
        labels = _told_apart([spellings(name) for name in names])
        known = [(name, tokens) for name, tokens in zip(names, labels, strict=True) if tokens]
        used = known[: len(options)]
        if len(used) == len(options) and sum(len(tokens) for _, tokens in used) <= MAX_LOGPROB_TOKEN_IDS:
            lines = [
                f"{name}: {text} - {description}" if description else f"{name}: {text}"
                for (name, _), (text, description) in zip(used, options, strict=True)
            ]
            return "\n".join([*lines, how]), [tokens for _, tokens in used]
        most = max(most, len(known))
    raise InvalidRequest(
        f"A question to this model can have at most {most} {field}, since each is named by one token.",
        param=f"{where}.{field}",
    )


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _letters() -> Iterator[Sequence[str]]:
    """Names of choices: letters, or pairs of letters if there are more choices. None begins another one."""
    yield string.ascii_uppercase
    yield [one + other for one in string.ascii_uppercase for other in string.ascii_uppercase]


def _spellings(encode: Callable[[str], list[int]], unknown: int | None) -> Spellings:
    """Args: ``unknown`` is the token of all that the vocabulary lacks, which spells nothing."""

    @cache
    def spellings(label: str) -> tuple[int, ...]:
        found = (encode(text) for text in (label, f" {label}"))
        return tuple(dict.fromkeys(ids[0] for ids in found if len(ids) == 1 and ids[0] != unknown))

    return spellings


def _told_apart(labels: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of labels, each once, without those that spell several labels."""
    of_label = [dict.fromkeys(tokens) for tokens in labels]
    counts = Counter(token for tokens in of_label for token in tokens)
    return [[token for token in tokens if counts[token] == 1] for tokens in of_label]


def _with_question(messages: Sequence[Message], asked: Message) -> list[Message]:
    """A conversation that ends with a question: in the last message if that is the user's, since many chat
    templates want turns to alternate."""
    last = messages[-1]
    if last.role != "user":
        return [*messages, asked]
    whole = _joined([*last.parts, *asked.parts], _GAP)
    is_text = len(whole) == 1 and isinstance(whole[0], TextPart)
    return [*messages[:-1], replace(last, parts=whole, form="string" if is_text else "parts")]


def _joined(parts: Sequence[TextPart | MediaPart], gap: str) -> list[TextPart | MediaPart]:
    """Parts whose texts that follow each other are one, with ``gap`` between them."""
    found: list[TextPart | MediaPart] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, TextPart) and isinstance(before, TextPart):
            found[-1] = TextPart(f"{before.text}{gap}{part.text}")
        else:
            found.append(part)
    return found
