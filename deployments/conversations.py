"""Turns a conversation into its running answer, for every endpoint that speaks of messages."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.answers import AnswerReader, WholeAnswer, gather
from deployments.caller_fields import caller_fields
from deployments.pipeline import Build, Pipeline
from deployments.protocol.generation import ConversationBody
from deployments.protocol.usage import usage_extras
from deployments.report import current_report
from deployments.sse import EventRelay
from deployments.tools import NO_TOOLS, ToolUse
from engine.inputs.media_options import with_options
from engine.inputs.messages import parse_messages
from engine.media.source import MediaSource
from engine.outputs import StreamUpdate
from engine.prompt import EngineInput, MediaItem, Message, PagesItem, TextPart
from engine.sampling_params import SamplingParams, StructuredSpec

#: The most messages, and bytes of theirs, of a prompt that the event loop makes; an image counts as a text of
#: usual length.
_SHORT_MESSAGES, _SHORT_BYTES, _IMAGE_BYTES = 4, 512, 64
#: Fields of a message that is nothing but its content.
_PLAIN = frozenset({"role", "content"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation to be answered.

    Attributes:
        messages: in OpenAI's form.
        params: how to sample, without the constraint.
        tools: what may be called.
        constraint: on the form of the visible answer.
        constraint_field: the field of the body that asks for ``constraint``.
        thinking_budget: the most tokens of a thought.
        template_options: variables for the chat template.
        add_generation_prompt, continue_final_message: see
            :meth:`engine.inputs.builder.PromptBuilder.from_messages`.
        cache_salt: keeps the caches of tenants apart.
        priority: requests with a smaller number are scheduled first.
        field_names: the caller's fields by the name under which the engine knows what they ask for.
        include_timings: the usage tells times and media too.
        include_reasoning: thoughts are in the answer.
        processor_options, reading_options: of all media, see
            :func:`engine.inputs.media_options.with_options`.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: ToolUse = NO_TOOLS
    constraint: StructuredSpec | None = None
    constraint_field: str | None = None
    thinking_budget: int | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    cache_salt: str = ""
    priority: int = 0
    field_names: Mapping[str, str] = field(default_factory=dict)
    include_timings: bool = False
    include_reasoning: bool = True
    processor_options: Mapping[str, Any] | None = None
    reading_options: Mapping[str, Any] | None = None


@dataclass(slots=True)
class RunningAnswer:
    """An answer on its way.

    Attributes:
        prompt_token_ids: of the whole prompt.
        prompt_text: what the chat template wrote, in which each image is its placeholder.
        params: how it is sampled.
        updates: what the engine gives; refusals and failures are raised under the caller's field names.
        reader: parses the updates.
        relay: may take some of the updates past ``updates``.
        include_timings: as in :class:`Conversation`.
    """

    prompt_token_ids: list[int]
    prompt_text: str
    params: SamplingParams
    updates: AsyncGenerator[StreamUpdate, None]
    reader: AnswerReader
    relay: EventRelay
    include_timings: bool = False

    def usage_extras(self) -> dict[str, Any]:
        """Further fields of the usage, once the answer has ended."""
        return usage_extras(current_report()) if self.include_timings else {}

    async def whole(self) -> WholeAnswer:
        """Wait for the end."""
        return await gather(self.updates, self.reader)


def conversation(
    body: ConversationBody,
    pipeline: Pipeline,
    messages: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    **options: Any,
) -> Conversation:
    """The conversation that a checked body asks to answer.

    Args:
        messages: in OpenAI's form.
        names: the body's fields by the name under which the engine knows what they ask for.
        options: further fields of the conversation.

    Raises:
        InvalidRequest: naming the field that can't be used.
    """
    with caller_fields(names):
        params = body.sampling_params(pipeline.sampling_defaults)
        tools = body.tool_use()
        constraint, constraint_field = body.constraint()
    return Conversation(
        messages,
        params,
        tools,
        constraint,
        constraint_field,
        body.budget(),
        body.template_options(),
        cache_salt=body.cache_salt,
        priority=body.priority,
        field_names=names,
        include_timings=body.include_timings,
        include_reasoning=body.include_reasoning,
        processor_options=body.mm_processor_kwargs,
        reading_options=body.media_io_kwargs,
        **options,
    )


async def start(pipeline: Pipeline, request_id: str, given: Conversation) -> RunningAnswer:
    """Prepare the media, build the prompt, and start the answer.

    Raises:
        SightlineError: a refusal, before any expensive work, or a failure.
    """
    current_report().answer = request_id
    names = dict(given.field_names)
    if given.constraint_field is not None:
        names["structured"] = given.constraint_field
    elif given.tools.choice != "none":
        names["structured"] = "tools"
    with caller_fields(names):
        pipeline.format.check(given.tools)
        if given.constraint is not None:
            # Refuses a constraint that other parameters exclude before any image is fetched.
            replace(given.params, structured=given.constraint)
        build, sources, short = _prompt(pipeline, given)
        prompt = await pipeline.prepare(
            build, sources, params=given.params, salt=given.cache_salt, short=short
        )
        text = prompt.text
        constraint = pipeline.format.constraint(given.tools, given.constraint, text, given.thinking_budget)
        # A copy is checked once more, which takes longer than all else here.
        params = given.params if constraint is None else replace(given.params, structured=constraint)
    if pipeline.format.parser(given.tools, text) is not None:
        # Tags of calls and thoughts may be special tokens.
        params = replace(params, skip_special_tokens=False)
    relay = EventRelay()
    updates = pipeline.generate(request_id, prompt, params, priority=given.priority, names=names, relay=relay)
    reader = AnswerReader(
        lambda: pipeline.format.parser(given.tools, text),
        pipeline.builder.tokenizer,
        shows_thoughts=given.include_reasoning,
    )
    return RunningAnswer(
        prompt.inputs.token_ids, text or "", params, updates, reader, relay, given.include_timings
    )


def _is_short(given: Conversation, messages: Sequence[Message], sources: Sequence[MediaSource]) -> bool:
    """Return whether the event loop may make the prompt, which takes 0.1 to 0.3 ms then. To have a thread do
    it costs as much again: two threads wake, one after the other. Tools, options and media other than images
    are not looked into: a document may be read as text."""
    plain = not (given.tools.functions or given.template_options) and all(
        message.keys() <= _PLAIN for message in given.messages
    )
    shown = all(source.kind == "image" and not (source.pages or source.rows) for source in sources)
    if not (plain and shown) or len(messages) > _SHORT_MESSAGES:
        return False
    texts = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
    size = sum(len(text) * (1 if text.isascii() else 4) for text in texts)
    return size + _IMAGE_BYTES * len(sources) < _SHORT_BYTES


def _prompt(pipeline: Pipeline, given: Conversation) -> tuple[Build, list[MediaSource], bool]:
    """Return the function that makes a conversation's prompt from its media items, its media, and whether the
    function is short, see :func:`_is_short`."""
    messages, sources = parse_messages(given.messages)
    sources = with_options(sources, given.processor_options, given.reading_options)

    def build(items: list[MediaItem | PagesItem]) -> EngineInput:
        return pipeline.builder.from_messages(
            messages,
            items,
            add_generation_prompt=given.add_generation_prompt and not given.continue_final_message,
            continue_final_message=given.continue_final_message,
            tools=given.tools.functions if given.tools.choice != "none" else None,
            template_kwargs=given.template_options,
            cache_salt=given.cache_salt,
        )

    return build, sources, _is_short(given, messages, sources)


async def tokenize(pipeline: Pipeline, given: Conversation) -> EngineInput:
    """Build a conversation's prompt without encoding its media.

    Raises:
        SightlineError: under the caller's field names.
    """
    with caller_fields(given.field_names):
        build, sources, _ = _prompt(pipeline, given)
        return await pipeline.tokenize(build, sources, salt=given.cache_salt)
