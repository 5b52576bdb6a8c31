"""Ways to serve the same prompts: each must give what the reference gives."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import transformers

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from engine.executor.launch import Launcher
from tests.engine.executor.threads import ThreadLauncher
from tests.engine.families.case import CasePrompt
from tests.engine.families.compare import Asked, Tally, compare_completion, compare_vector
from tests.engine.families.drawn.checkpoint import STEPS, Drawn, ends_of
from tests.engine.families.drawn.choices import Draw
from tests.engine.families.drawn.constraints import CONSTRAINTS, draw_constraints, processors_of
from tests.engine.families.drawn.prompts import as_seen
from tests.engine.families.embedded import as_embeddings
from tests.engine.families.expected import Expected

#: Enough for all states of a case.
_STATE_BYTES = 16 << 20


@dataclass
class Question:
    """A prompt of the case, what the reference makes of it, and what is asked of the engine."""

    number: int
    prompt: CasePrompt
    expected: Expected
    params: SamplingParams

    @property
    def length(self) -> int:
        return len(self.expected.ids)


class Session:
    """The questions of one case, and the engines that answer them.

    Args:
        options: of every engine, over the checkpoint's own.
    """

    def __init__(self, draw: Draw, drawn: Drawn, options: Mapping[str, Any]) -> None:
        self.draw, self.drawn, self._options = draw, drawn, dict(options)
        self.questions: list[Question] = []

    def ask(self, number: int, prompt: CasePrompt) -> str | None:
        """Add a question about ``prompt``; the reason if it can't be one."""
        try:
            inputs = self.drawn.reference.inputs(as_seen(prompt))
        except ValueError as error:
            return f"the reference refuses the prompt: {error}"
        steps, lengths = STEPS, self.drawn.lengths
        if lengths.original and not lengths.crosses and len(inputs.ids) <= lengths.original:
            steps = min(steps, lengths.original - len(inputs.ids) + 1)
        if len(inputs.ids) + steps > self.drawn.tokens:
            return "the prompt is too long"
        expected = Expected(inputs, steps)
        if self.drawn.vectors:
            self.questions.append(Question(number, prompt, expected, SamplingParams()))
            return None
        try:
            params = self._params(f"prompt {number}", expected)
        except RuntimeError as error:
            # Mistral3's class fails where the only image has one token.
            return f"the reference fails: {error}"
        self.questions.append(Question(number, prompt, expected, params))
        return None

    def _params(self, name: str, expected: Expected) -> SamplingParams:
        rng, tokens = self.draw.stream(name + " params"), expected.tokens
        stop, count = [], rng.randint(1, expected.steps) if rng.random() < 0.3 else expected.steps
        if self.draw.varies(f"{name} stops", 0.2):
            stop = [tokens[rng.randrange(count)]]
        constraints: dict[str, Any] = {}
        own = self.draw.stream(f"{name} constraints")
        if self.draw.varies(CONSTRAINTS, 0.6) and own.random() < 0.6:
            constraints = draw_constraints(own, tokens, count, expected.vocab_size, {*self._ends, *stop})
        return SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=stop,
            logprobs=rng.choice((None, 0, 1, 3, 20)),
            prompt_logprobs=rng.choice((None, None, 0, 2)),
            **constraints,
        )

    @cached_property
    def _tokenizer(self) -> Any:
        return transformers.PreTrainedTokenizerFast.from_pretrained(self.drawn.path)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return ends_of(self.drawn.path) | self.drawn.ends

    def llm(self, launcher: Launcher | None = None, **options: Any) -> LLM:
        given = {**self.drawn.options, **self._options, **options}
        return LLM(str(self.drawn.path), launcher=launcher, **given)

    @cached_property
    def plain(self) -> LLM:
        """An engine that keeps nothing of earlier requests, for several modes."""
        return self.llm(enable_prefix_caching=False)

    def budget(self, rng: random.Random, sizes: Sequence[int], steps: int) -> int:
        """Tokens of a step: one of ``sizes``, or more, so that prompts take at most about ``steps`` steps."""
        length = sum(question.length for question in self.questions)
        return max(rng.choice(sizes), length // steps, self.drawn.together)

    def full_blocks(self, question: Question, known: int, size: int) -> tuple[int, int]:
        """The fewest and the most cached tokens of a prompt whose first ``known`` tokens were computed."""
        if question.params.prompt_logprobs is not None:
            return 0, 0
        # What attends both ways is taken from the cache as a whole or not at all.
        least = known // size * size if self.drawn.together == 1 else 0
        return least, (question.length - 1) // size * size

    def check(
        self,
        tally: Tally,
        llm: LLM,
        questions: Sequence[Question],
        *,
        cached: Callable[[Question], tuple[int, int]] = lambda question: (0, 0),
        entries: Sequence[dict[str, Any]] | None = None,
    ) -> list[Any]:
        """Ask ``questions`` in one call and compare all that comes back."""
        entries = entries or [question.prompt.entry for question in questions]
        if self.drawn.vectors:
            return self.check_vectors(tally, llm, questions, "last", True, cached=cached, entries=entries)
        outputs = llm.generate(entries, [question.params for question in questions], use_tqdm=False)
        for question, output in zip(questions, outputs, strict=True):
            before, params = len(tally.differences), question.params
            processors = processors_of(params, question.expected.vocab_size, question.length, self._ends)
            asked = Asked(params, self._ends, self._tokenizer, cached(question), processors)
            compare_completion(tally, output, question.expected, asked)
            _number(tally, before, question)
        llm.check_integrity()
        return outputs

    def check_vectors(
        self,
        tally: Tally,
        llm: LLM,
        questions: Sequence[Question],
        pooling: Any,
        normalize: bool,
        *,
        cached: Callable[[Question], tuple[int, int]],
        entries: Sequence[dict[str, Any]],
    ) -> list[Any]:
        """Ask for vectors of ``questions`` in one call and compare all that comes back."""
        outputs = llm.embed(entries, pooling=pooling, normalize=normalize, use_tqdm=False)
        for question, output in zip(questions, outputs, strict=True):
            before = len(tally.differences)
            compare_vector(tally, output, question.expected, pooling, normalize, cached(question))
            _number(tally, before, question)
        llm.check_integrity()
        return outputs

    def with_other_images(self) -> Question | None:
        """The first question about images or a video, with others of the same sizes; None without one."""
        for question in self.questions:
            if question.prompt.pictures or question.prompt.frames:
                prompt, steps = question.prompt.other(), question.expected.steps
                # A prompt whose tokens are scored would not be taken from the cache.
                params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True, logprobs=2)
                expected = Expected(self.drawn.reference.inputs(prompt), steps)
                return Question(question.number, prompt, expected, params)
        return None

    def following(self, question: Question, answer: Sequence[int]) -> tuple[Question, list[int]]:
        """The next turn after ``answer``: its question, and the token ids behind this prompt's."""
        kept = [token for token in answer if token not in self.drawn.media]
        rng = self.draw.stream(f"prompt {question.number} second turn")
        # Whole characters: nothing of the next answer's first one stands in the prompt.
        more = kept + self._tokenizer.encode(
            " and then" + " more" * rng.randint(1, 4), add_special_tokens=False
        )
        expected = Expected(question.expected.inputs.extended(more), STEPS)
        params = self._params(f"prompt {question.number} second turn", expected)
        return Question(question.number, question.prompt, expected, params), more


def alone(session: Session, tally: Tally) -> Iterator[str]:
    """Each prompt by itself, nothing cached. Prompts that are refused leave the case; yields why."""
    llm = session.plain
    for question in list(session.questions):
        try:
            session.check(tally, llm, [question])
        except InvalidRequest as error:
            session.questions.remove(question)
            llm.check_integrity()
            yield str(error)


def batch(session: Session, tally: Tally) -> None:
    """All prompts in one call, nothing cached."""
    session.check(tally, session.plain, session.questions)


def chunked(session: Session, tally: Tally) -> None:
    """Few tokens a step and small blocks, which cut prompts and images anywhere."""
    rng = session.draw.stream("chunks")
    llm = session.llm(
        max_num_batched_tokens=session.budget(rng, (1, 2, 5, 13, 40), 40),
        max_num_seqs=rng.randint(1, 5),
        block_size=rng.choice((1, 2, 4, 8, 16)),
        enable_prefix_caching=rng.random() < 0.5,
        run_ahead=rng.choice((0, 1, 2)),
    )
    session.check(tally, llm, session.questions, cached=_anything)


def preempted(session: Session, tally: Tally) -> None:
    """Blocks for two prompts, but not for their answers: requests are interrupted and computed again."""
    rng = session.draw.stream("preemption")
    pair = rng.sample(session.questions, min(2, len(session.questions)))
    size = rng.choice((1, 2, 4))
    blocks = sum(-(-question.length // size) for question in pair) + 2
    # One request must fit when it is alone.
    blocks = max(blocks, *(-(-(question.length + STEPS) // size) + 1 for question in pair))
    llm = session.llm(
        num_kv_blocks=blocks,
        block_size=size,
        enable_prefix_caching=False,
        max_num_batched_tokens=session.budget(rng, (7, 32, 512), 20),
        max_num_seqs=rng.randint(2, 4),
    )
    session.check(tally, llm, pair * 2)


def cached(session: Session, tally: Tally) -> None:
    """All prompts twice, one with other images of the same sizes, and the next turn of each conversation,
    twice: from the cache what was computed."""
    rng = session.draw.stream("cache")
    size = rng.choice((1, 2, 4, 8, 16))
    # Nothing is evicted: room for every prompt three times, with what follows it, and for recurrent states.
    blocks = sum(-(-(3 * question.length + 16 * STEPS) // size) for question in session.questions)
    llm = session.llm(
        block_size=size,
        num_kv_blocks=blocks,
        state_snapshot_bytes=_STATE_BYTES,
        run_ahead=rng.choice((1, 0, 2)),
    )
    outputs = session.check(tally, llm, session.questions, cached=_anything)
    session.check(tally, llm, session.questions, cached=lambda q: session.full_blocks(q, q.length - 1, size))
    if other := session.with_other_images():
        session.check(tally, llm, [other], cached=_anything)
    if session.drawn.vectors:
        # There is no answer, and so no next turn.
        return
    turns, entries, known = [], [], {}
    for question, output in zip(session.questions, outputs, strict=True):
        (completion,) = output.outputs
        turn, more = session.following(question, completion.token_ids)
        if turn.length + STEPS > session.drawn.tokens or _stops_short(session, turn):
            continue
        data = _in_order(question.prompt).entry["multi_modal_data"]
        ids = [*output.prompt_token_ids, *more]
        entries.append({"prompt_token_ids": ids, "multi_modal_data": data})
        turns.append(turn)
        known[id(turn)] = _reusable(session, question, turn)
    if not turns:
        return
    session.check(
        tally, llm, turns, entries=entries, cached=lambda q: session.full_blocks(q, known[id(q)], size)
    )
    session.check(
        tally, llm, turns, entries=entries, cached=lambda q: session.full_blocks(q, q.length - 1, size)
    )


def vectors(session: Session, tally: Tally) -> None:
    """Pooled hidden states in place of answers, in one step or in chunks."""
    rng = session.draw.stream("vectors")
    pooling, normalize = rng.choice(("last", "last", "mean", "cls", "all")), rng.random() < 0.7
    if session.drawn.vectors:
        # The reference's have length 1.
        pooling, normalize = rng.choice(("all", "all", "cls")), True
    options: dict[str, Any] = {}
    if rng.random() < 0.6:
        options = {"max_num_batched_tokens": session.budget(rng, (3, 7, 30), 15), "block_size": 4}
    llm = session.llm(task="embed", **options)
    entries = [question.prompt.entry for question in session.questions]
    session.check_vectors(
        tally, llm, session.questions, pooling, normalize, cached=_anything, entries=entries
    )


def embeddings(session: Session, tally: Tally) -> None:
    """Embedding rows in place of images, item by item or in one tensor."""
    shown = [q for q in session.questions if q.prompt.pictures and not q.prompt.frames]
    if not shown:
        return
    ways = as_embeddings(session.plain.config, [question.prompt for question in shown])
    pairs = [(question, data) for question, forms in zip(shown, ways, strict=True) for data in forms]
    entries = [{"prompt": q.prompt.text, "multi_modal_data": {"image": data}} for q, data in pairs]
    session.check(tally, session.plain, [question for question, _ in pairs], entries=entries)


def ranks(session: Session, tally: Tally) -> None:
    """The decoder split over two ranks, which are threads of this process."""
    llm = session.llm(ThreadLauncher(), tensor_parallel_size=2)
    try:
        session.check(tally, llm, session.questions, cached=_anything)
    finally:
        llm._engine.core.runner.close()


#: The first of all is :func:`alone`.
MODES: dict[str, Callable[[Session, Tally], None]] = {
    "batch": batch,
    "chunked": chunked,
    "preempted": preempted,
    "cached": cached,
    "vectors": vectors,
    "embeddings": embeddings,
    "ranks": ranks,
}


def _anything(question: Question) -> tuple[int, int]:
    """Any number of cached tokens but all of them."""
    return 0, question.length - 1


def _in_order(prompt: CasePrompt) -> CasePrompt:
    """The prompt with its images in the order of their places: token ids don't show numbered placeholders."""
    numbers = [int(number) - 1 for number in re.findall(r"<\|image_(\d+)\|>", prompt.text)]
    return replace(prompt, pictures=tuple(prompt.pictures[i] for i in numbers)) if numbers else prompt


def _reusable(session: Session, question: Question, turn: Question) -> int:
    """Tokens of ``turn`` whose keys the engine has computed for ``question``."""
    original = session.drawn.lengths.original
    if original is not None and turn.length > original:
        # Its keys have other frequencies.
        return 0
    return question.length - 1


def _stops_short(session: Session, turn: Question) -> bool:
    """Return whether an answer to ``turn`` would go where the reference has none."""
    lengths = session.drawn.lengths
    if lengths.original is None or lengths.crosses:
        return False
    return turn.length <= lengths.original < turn.length + STEPS


def _number(tally: Tally, before: int, question: Question) -> None:
    tally.differences[before:] = [f"prompt {question.number}: {d}" for d in tally.differences[before:]]
