"""A caller's request and the text of its answer, while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.outputs import OutputDelta, StreamUpdate, Usage
from engine.progress import ChoiceProgress, Progress
from engine.repetition import RepetitionWatch
from engine.request import Request
from engine.text.detokenizer import IncrementalDetokenizer
from engine.text.token_texts import TokenTexts
from engine.text.tokenizer import Tokenizer
from engine.token_rows import Row, UnsettledRows

#: Prompt tokens a detokenizer sees before the first output token: some decoders depend on the left context.
_PROMPT_TAIL = 8


@dataclass(slots=True)
class ChoiceText:
    """The text of one of a request's ``n`` completions.

    Attributes:
        index: which of them.
        request: the engine's request for it.
        unsettled: tokens and rows that wait for their text; None if none ever do.
        num_characters: of the text so far.
        num_given: characters at the text's beginning that the caller has from another engine.
        plain: a token adds its text and nothing else, unless it ends the text: the usual, kept cheap.
        watch: looks for repetitions; None if they don't end the text.
        done: nothing will follow.
    """

    index: int
    request: Request
    detokenizer: IncrementalDetokenizer
    texts: TokenTexts
    unsettled: UnsettledRows | None = None
    num_characters: int = 0
    num_given: int = 0
    plain: bool = False
    watch: RepetitionWatch | None = None
    done: bool = False

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer, known: ChoiceProgress) -> ChoiceText:
        """The text of ``request`` after what is ``known`` of it, without giving anything."""
        params = request.params
        detokenizer = IncrementalDetokenizer(
            tokenizer,
            prompt_tail=request.token_ids[: request.num_prompt][-_PROMPT_TAIL:],
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )
        skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        found = cls(request.choice, request, detokenizer, TokenTexts(tokenizer, skipped=skipped))
        if params.stop and params.logprobs is not None:
            found.unsettled = UnsettledRows()
        if params.repetition_detection is not None:
            found.watch = RepetitionWatch(params.repetition_detection)
        for token in known.token_ids:
            found._pass_over(token)
        found.num_given = known.num_characters
        found.plain = (
            not params.stop and params.logprobs is None and found.watch is None and not known.num_characters
        )
        return found

    def _pass_over(self, token: int) -> None:
        self.num_characters += len(self.detokenizer.append_one(token))
        if self.watch is not None:
            self.watch.add(token)
        if self.request.params.logprobs is not None:
            text, piece = self.texts.take(token)
            if self.unsettled is not None:
                self.unsettled.pass_over(text, piece)

    def give(self, delta: OutputDelta, text: str) -> None:
        """Add new text to ``delta``, without what the caller has already."""
        delta.text += text[max(0, self.num_given - self.num_characters) :]
        self.num_characters += len(text)

    def give_row(self, delta: OutputDelta, token: int, row: Row) -> None:
        """Add a token and its log-probabilities to ``delta``, once their text has come out."""
        if self.unsettled is None:
            _append(delta, token, row)
        else:
            self.unsettled.add(token, row)
            self.settle(delta)

    def settle(self, delta: OutputDelta) -> None:
        """Add the tokens and rows that wait to ``delta``, as far as their text has come out."""
        if self.unsettled is None:
            return
        settle = self.unsettled.end if self.done else self.unsettled.settle
        for token, row in settle(self.num_characters):
            _append(delta, token, row)


@dataclass(slots=True, eq=False)
class RequestGroup:
    """A caller's request: one prompt, ``n`` sequences. Equal to itself alone, so that it may be a key.

    Attributes:
        id: the caller's request id.
        requests: the engine's requests, by completion index; without those that another engine finished.
        usage: token counts so far.
        progress: what the caller had of the answer when it came here.
        sequences: the texts of the completions, by the id of their request.
        last_token_at: when its last token was read, in seconds of the monotonic clock; None before the first.
        num_scored: positions of the prompt whose log-probabilities were given, the first one's None included.
        prompt_texts: texts of the prompt's tokens, as far as they are scored.
        held: the part of the answer that waits for more tokens.
    """

    id: str
    requests: list[Request]
    usage: Usage
    progress: Progress = field(default_factory=Progress)
    sequences: dict[str, ChoiceText] = field(default_factory=dict)
    last_token_at: float | None = None
    num_scored: int = 0
    prompt_texts: TokenTexts | None = None
    held: StreamUpdate | None = None

    @classmethod
    def of(
        cls, group_id: str, requests: Sequence[Request], num_prompt: int, progress: Progress | None = None
    ) -> RequestGroup:
        """The group of one caller's request.

        Args:
            num_prompt: tokens of its prompt.
            progress: what the caller has of the answer already.
        """
        progress = progress or Progress()
        usage = Usage(num_prompt, progress.num_tokens, progress.cached_tokens or 0)
        return cls(group_id, list(requests), usage, progress, num_scored=progress.num_scored)

    @property
    def finished(self) -> bool:
        return all(sequence.done for sequence in self.sequences.values())


def _append(delta: OutputDelta, token: int, row: Row) -> None:
    delta.token_ids.append(token)
    delta.logprobs = delta.logprobs or []
    delta.logprobs.append(row)
