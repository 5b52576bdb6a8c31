"""The part of an answer that its reader has. Another engine needs nothing else to continue the answer.

Sampling is a function of the seed, the choice and the number of its tokens so far. So the rest of an answer
follows from its prompt, its parameters with a seed, and the values here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.outputs import StreamUpdate


@dataclass(slots=True)
class ChoiceProgress:
    """The part of one choice that its reader has.

    Attributes:
        token_ids: tokens in order.
        num_characters: characters of its text; may be more than the text of ``token_ids``, since a token's
            log-probabilities come out with its last character.
        finished: nothing will follow.
    """

    token_ids: list[int] = field(default_factory=list)
    num_characters: int = 0
    finished: bool = False


@dataclass(slots=True)
class Progress:
    """The part of an answer that its reader has.

    Attributes:
        choices: by index; choices of which nothing has come yet may be missing.
        num_scored: positions of the prompt whose log-probabilities have come.
        cached_tokens: as the first engine counted them; None until a token has come.
    """

    choices: dict[int, ChoiceProgress] = field(default_factory=dict)
    num_scored: int = 0
    cached_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def take(self, update: StreamUpdate) -> None:
        """Add what an update brought."""
        for delta in update.deltas:
            choice = self.choices.get(delta.index)
            if choice is None:
                choice = self.choices[delta.index] = ChoiceProgress()
            choice.token_ids += delta.token_ids
            choice.num_characters += len(delta.text)
            if delta.finish_reason is not None:
                choice.finished = True
        if update.prompt_logprobs is not None:
            self.num_scored += len(update.prompt_logprobs)
        if self.cached_tokens is None and update.usage.completion_tokens:
            self.cached_tokens = update.usage.cached_tokens

    def of(self, index: int) -> ChoiceProgress:
        """The progress of one choice."""
        return self.choices.get(index) or ChoiceProgress()

    def finished(self, count: int) -> bool:
        """Return whether all of ``count`` choices have ended."""
        return all(self.of(index).finished for index in range(count))
