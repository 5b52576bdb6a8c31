"""A family's tiny checkpoint on disk, and how the engine's outputs are held against its reference's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from engine import LLM, SamplingParams
from tests.engine.families.case import TOKENS, CasePrompt, FamilyCase, Inputs, Reference
from tests.engine.families.compare import Asked, Tally, compare_completion, compare_vector
from tests.engine.families.expected import Expected

#: Ids from here on stand for text in every tokenizer of ours.
_FIRST_TEXT_ID = 32


class Made:
    """A family's checkpoint and what its reference says, each made when first asked for."""

    def __init__(self, case: FamilyCase, folder: Path, hub: bool = False) -> None:
        self.case = case
        self._folder, self._hub = folder, hub
        self._inputs: dict[Any, Inputs] = {}
        self._answers: dict[Any, Expected] = {}
        self._scores: dict[Any, torch.Tensor] = {}

    @cached_property
    def path(self) -> Path:
        self._folder.mkdir(exist_ok=True)
        self.case.make(self._folder, self._hub)
        return self._folder

    @cached_property
    def _reference(self) -> Reference:
        return self.case.reference(self.path)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        if prompt.key not in self._inputs:
            with torch.inference_mode():
                self._inputs[prompt.key] = self._reference.inputs(prompt)
        return self._inputs[prompt.key]

    def answer(self, prompt: CasePrompt) -> Expected:
        if prompt.key not in self._answers:
            self._answers[prompt.key] = Expected(self.inputs(prompt), TOKENS)
        return self._answers[prompt.key]

    def logprobs(self, prompt: CasePrompt, tokens: Sequence[int]) -> torch.Tensor:
        """The reference's log-probabilities of a prompt and an answer, see :meth:`Inputs.logprobs`."""
        key = prompt.key, tuple(tokens)
        if key not in self._scores:
            self._scores[key] = self.inputs(prompt).logprobs(tokens)
        return self._scores[key]

    @property
    def options(self) -> dict[str, Any]:
        """Options of every engine unless a law overrides them. On the CPU even where there is a GPU."""
        return {"max_model_len": 512, "kv_cache_bytes": 8 << 20, "device": "cpu", **self.case.options}

    def llm(self, **options: Any) -> LLM:
        return LLM(str(self.path), **{**self.options, **options})

    @cached_property
    def plain(self) -> LLM:
        """An engine without options of its own, for all tests that hold whatever its prefix cache has."""
        return self.llm()

    def release(self) -> None:
        """Give back the memory of :attr:`plain`."""
        self.__dict__.pop("plain", None)

    def check(
        self,
        llm: LLM,
        prompts: Sequence[CasePrompt],
        prompt_logprobs: int | None = None,
        block: int | None = None,
    ) -> list[Any]:
        """Compare ``llm``'s outputs for a batch with the reference, field by field; nothing is left behind.

        Args:
            prompt_logprobs: alternatives asked for at each token of the prompts.
            block: block size, if all full blocks of the prompts are in the prefix cache.

        Returns:
            The outputs.
        """
        outputs = self.run(llm, [prompt.entry for prompt in prompts], prompt_logprobs)
        for output, prompt in zip(outputs, prompts, strict=True):
            self.compare(output, self.answer(prompt), prompt_logprobs, block)
        llm.check_integrity()
        return outputs

    def check_closely(
        self, llm: LLM, prompts: Sequence[CasePrompt], prompt_logprobs: int = 0, most: float = 1e-4
    ) -> None:
        """As :meth:`check`; and all numbers of an output together are near the reference's.

        Args:
            most: the greatest distance: of a vector absolute, of log-probabilities a share of their spread.
        """
        outputs = self.check(llm, prompts, prompt_logprobs)
        for output, prompt in zip(outputs, prompts, strict=True):
            answer = self.answer(prompt)
            if self.case.embeds:
                distance = float((torch.tensor(output.embedding) - answer.vector).norm())
            else:
                distance = _distance(_logprobs(output), answer.logprobs(output.outputs[0].token_ids))
            assert distance < most

    def run(
        self, llm: LLM, entries: Sequence[dict[str, Any]], prompt_logprobs: int | None = None
    ) -> list[Any]:
        """Outputs for entries as ``LLM.generate`` takes them."""
        if self.case.embeds:
            return llm.embed(entries, use_tqdm=False)
        return llm.generate(entries, greedy(prompt_logprobs), use_tqdm=False)

    def check_all(self) -> None:
        """Tokens and all logits of a batch of all kinds of prompts are the reference's."""
        self.check_closely(self.llm(), self.case.prompts())

    def compare(
        self, output: Any, answer: Expected, prompt_logprobs: int | None = None, block: int | None = None
    ) -> None:
        """Everything that an output carries."""
        most = len(answer.ids) - 1
        least = 0 if block is None else most // block * block
        tally, some = Tally(), (least, most) if self.case.caches else (0, 0)
        if self.case.embeds:
            compare_vector(tally, output, answer, "last", True, some)
        else:
            asked = Asked(greedy(prompt_logprobs), answer.ends, self._tokenizer, some)
            compare_completion(tally, output, answer, asked)
        assert tally.differences == []

    @cached_property
    def _tokenizer(self) -> Any:
        return PreTrainedTokenizerFast.from_pretrained(self.path)

    def check_ends(self, llm: LLM) -> None:
        """Every token that ends the reference's answers ends ours, and no other does."""
        prompt = self.case.text_prompts()[0]
        ends = self.answer(prompt).ends
        tokens = [*ends, _FIRST_TEXT_ID]
        params = [
            SamplingParams(temperature=0.0, max_tokens=3, allowed_token_ids=[token]) for token in tokens
        ]
        outputs = llm.generate([prompt.entry] * len(tokens), params, use_tqdm=False)
        for token, output in zip(tokens, outputs, strict=True):
            found = output.outputs[0].token_ids, output.outputs[0].finish_reason
            assert found == (([token], "stop") if token in ends else ([token] * 3, "length"))

    def distances(self, llm: LLM, given: Sequence[CasePrompt], prompts: Sequence[CasePrompt]) -> list[float]:
        """Return distances of ``llm``'s outputs for the batch ``given`` from the reference's for ``prompts``.

        Those of vectors, which have length 1, are absolute. Those of log-probabilities, of prompts and of
        answers to them, are a share of the reference's spread.
        """
        entries = [prompt.entry for prompt in given]
        if self.case.embeds:
            vectors = [torch.tensor(output.embedding) for output in self.run(llm, entries)]
            pairs = zip(vectors, prompts, strict=True)
            return [float((vector - self.answer(prompt).vector).norm()) for vector, prompt in pairs]
        text = list(range(_FIRST_TEXT_ID, 256))
        params = SamplingParams(
            temperature=0.0,
            max_tokens=TOKENS,
            ignore_eos=True,
            allowed_token_ids=text,
            logprobs=0,
            prompt_logprobs=0,
        )
        outputs, found = llm.generate(entries, params, use_tqdm=False), []
        for output, prompt in zip(outputs, prompts, strict=True):
            theirs = self.logprobs(prompt, output.outputs[0].token_ids)
            found.append(_distance(_logprobs(output), theirs))
        return found


def check_answer(path: Path, prompt: CasePrompt, inputs: Inputs, steps: int = 10) -> None:
    """Check the greedy answer of a checkpoint to a prompt, which the reference takes as ``inputs``."""
    theirs = Expected(inputs, steps)
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    (ours,) = LLM(str(path), max_model_len=512).generate(prompt.entry, params, use_tqdm=False)
    assert ours.prompt_token_ids == theirs.ids
    assert ours.outputs[0].token_ids == theirs.tokens


def greedy(prompt_logprobs: int | None = None) -> SamplingParams:
    """Parameters of the requests whose outputs :meth:`Made.compare` takes."""
    return SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=2, prompt_logprobs=prompt_logprobs
    )


def _logprobs(output: Any) -> torch.Tensor:
    """Log-probabilities of a prompt's tokens but the first, and of its answer's."""
    (completion,) = output.outputs
    rows = [*output.prompt_logprobs[1:], *completion.logprobs]
    tokens = [*output.prompt_token_ids[1:], *completion.token_ids]
    return torch.tensor([row[token].logprob for row, token in zip(rows, tokens, strict=True)])


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """How far ``ours`` are from ``theirs``, as a share of their spread; NaN in ``theirs`` stands for none."""
    known = ~theirs.isnan()
    ours, theirs = ours[known], theirs[known]
    return float((ours - theirs).norm() / (theirs - theirs.mean()).norm())
