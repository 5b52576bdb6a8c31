"""Holds every field of an output against the reference's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from engine import SamplingParams
from tests.engine.families.expected import Expected

#: Log-probabilities of two float32 programs that add in another order differ by less than this.
TOLERANCE = 1e-3
#: The reference's two likeliest tokens are a tie if they are nearer than this: either one is right.
NEAR_TIE = 2 * TOLERANCE
#: Components of vectors of length 1.
VECTOR_TOLERANCE = 1e-4


@dataclass
class Tally:
    """Results of a comparison.

    Attributes:
        outputs: number of outputs that were compared.
        tokens: number of greedy tokens that were compared.
        ties: greedy tokens other than the reference's that were as likely, and accepted.
        differences: in words, each beginning with the field that differs.
    """

    outputs: int = 0
    tokens: int = 0
    ties: int = 0
    differences: list[str] = field(default_factory=list)

    def same(self, field_name: str, ours: Any, theirs: Any) -> None:
        if ours != theirs:
            self.differences.append(f"{field_name}: {_short(ours)}, not {_short(theirs)}")

    def near(self, field_name: str, ours: torch.Tensor, theirs: torch.Tensor, most: float) -> None:
        if ours.shape != theirs.shape:
            self.differences.append(f"{field_name}: {tuple(ours.shape)} numbers, not {tuple(theirs.shape)}")
            return
        distance = (ours - theirs).abs()
        if len(distance) and not bool((distance <= most).all()):
            place = int(distance.nan_to_num(1e9).argmax())
            self.differences.append(
                f"{field_name}: {float(ours[place]):.5f}, not {float(theirs[place]):.5f} at {place} "
                f"of {len(distance)}; {int((distance > most).sum())} differ"
            )


@dataclass(frozen=True)
class Asked:
    """A request's parameters, and the facts known about how it was served.

    Attributes:
        ends: tokens that end an answer, unless ``params`` say otherwise.
        tokenizer: Transformers' for the checkpoint.
        cached: fewest and most prompt tokens that can have come from the prefix cache.
        processors: Transformers' for the constraints of ``params``.
    """

    params: SamplingParams
    ends: frozenset[int]
    tokenizer: Any
    cached: tuple[int, int] = (0, 0)
    processors: Sequence[Any] = ()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, token: int) -> str:
        """The text of one token, special or not."""
        return _piece(self.tokenizer, token)


@lru_cache(maxsize=1 << 12)
def _piece(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def compare_completion(tally: Tally, output: Any, expected: Expected, asked: Asked) -> None:
    """All fields of a :class:`engine.outputs.RequestOutput` of a greedy request."""
    tally.outputs += 1
    _compare_prompt(tally, output, expected, asked.cached)
    (completion,) = output.outputs
    tokens, params = completion.token_ids, asked.params
    tally.same("index", completion.index, 0)
    tally.same("finished", output.finished, True)
    tally.same("usage.completion_tokens", output.usage.completion_tokens, len(tokens))
    if not tokens:
        tally.differences.append("token_ids: none")
        return
    table = expected.table(tokens)
    scores = _processed(expected.logits(tokens), [*output.prompt_token_ids, *tokens], asked)
    _compare_tokens(tally, tokens, scores)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else asked.ends)}
    stopped = tokens[-1] in ends
    tally.same("token_ids after an end", [t for t in tokens[:-1] if t in ends], [])
    if not stopped:
        tally.same("number of token_ids", len(tokens), params.max_tokens)
    tally.same("finish_reason", completion.finish_reason, "stop" if stopped else "length")
    reason = tokens[-1] if stopped and tokens[-1] in params.stop_token_ids else None
    tally.same("stop_reason", completion.stop_reason, reason)
    tally.same("text", completion.text, asked.decode(tokens[:-1] if stopped else tokens))
    _compare_logprobs(tally, "logprobs", completion.logprobs, tokens, table, params.logprobs, asked)
    if completion.logprobs is not None and len(completion.logprobs) == len(tokens):
        chosen = [row[t] for row, t in zip(completion.logprobs, tokens, strict=True) if t in row]
        joined = "".join(entry.decoded_token or "" for entry in chosen if entry.bytes)
        # An answer that ends within a character has a replacement character for it, which no token has.
        tally.same("joined decoded_tokens", joined.rstrip("\ufffd"), completion.text.rstrip("\ufffd"))
        total = sum(row[t].logprob for row, t in zip(completion.logprobs, tokens, strict=True) if t in row)
        tally.near(
            "cumulative_logprob",
            torch.tensor([completion.cumulative_logprob or 0.0]),
            torch.tensor([total]),
            1e-4,
        )
    _compare_prompt_logprobs(tally, output, expected, asked)


def compare_vector(
    tally: Tally, output: Any, expected: Expected, pooling: str, normalize: bool, cached: tuple[int, int]
) -> None:
    """All fields of a :class:`engine.outputs.EmbeddingOutput`."""
    tally.outputs += 1
    _compare_prompt(tally, output, expected, cached)
    tally.same("usage.completion_tokens", output.usage.completion_tokens, 0)
    tally.same("whether there is one vector", bool(output.embedding), pooling != "all")
    tally.same("whether there are token_embeddings", output.token_embeddings is not None, pooling == "all")
    if (pooling == "all") != (output.token_embeddings is not None):
        return
    hidden = expected.hidden
    pooled = {"last": hidden[-1:], "cls": hidden[:1], "mean": hidden.mean(0, keepdim=True), "all": hidden}
    vectors = pooled[pooling]
    scales = vectors.norm(dim=-1, keepdim=True)
    given = output.embedding if pooling != "all" else output.token_embeddings
    ours = torch.as_tensor(given).view(-1, vectors.shape[1])
    tally.same("number of vectors", len(ours), len(vectors))
    if len(ours) != len(vectors):
        return
    ours = ours if normalize else ours / scales
    tally.near("embedding", ours.flatten(), (vectors / scales).flatten(), VECTOR_TOLERANCE)


def _compare_prompt(tally: Tally, output: Any, expected: Expected, cached: tuple[int, int]) -> None:
    ours, theirs = list(output.prompt_token_ids), expected.ids
    tally.same("number of prompt_token_ids", len(ours), len(theirs))
    # An image's rows may stand under an id of their own choice, where the reference has none.
    wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if b not in (None, a)]
    if wrong:
        tally.same(f"prompt_token_ids from {wrong[0]}", ours[wrong[0] :][:6], theirs[wrong[0] :][:6])
    tally.same("usage.prompt_tokens", output.usage.prompt_tokens, len(theirs))
    low, high = cached
    if not low <= output.usage.cached_tokens <= high:
        tally.differences.append(
            f"usage.cached_tokens: {output.usage.cached_tokens}, not {low} to {high} of {len(theirs)}"
        )


def _processed(logits: torch.Tensor, ids: Sequence[int], asked: Asked) -> torch.Tensor:
    """What the processors make of the logits ``(n, vocabulary)`` before each of the last ``n`` of ``ids``."""
    if not asked.processors:
        return logits
    first, rows = len(ids) - len(logits), []
    for place, row in enumerate(logits):
        before, scores = torch.tensor([ids[: first + place]]), row[None].clone()
        for processor in asked.processors:
            scores = processor(before, scores)
        rows.append(scores)
    return torch.cat(rows)


def _compare_tokens(tally: Tally, tokens: Sequence[int], scores: torch.Tensor) -> None:
    """Each token has the greatest score ``(n, vocabulary)`` after those before it, or one as great."""
    likeliest = scores.argmax(-1).tolist()
    tally.tokens += len(tokens)
    for place, (ours, theirs) in enumerate(zip(tokens, likeliest, strict=True)):
        if ours == theirs:
            continue
        gap = float(scores[place, theirs] - scores[place, ours]) if 0 <= ours < scores.shape[1] else 1e9
        if gap <= NEAR_TIE:
            tally.ties += 1
            continue
        tally.differences.append(
            f"token_ids: {_short(tokens)}; {ours} at {place}, not {theirs}, by {gap:.4f}"
        )
        return


def _compare_logprobs(
    tally: Tally,
    name: str,
    rows: Sequence[dict[int, Any]] | None,
    tokens: Sequence[int],
    table: torch.Tensor,
    count: int | None,
    asked: Asked,
) -> None:
    """Each row has its token first, then the ``count`` likeliest, each with its rank and its text."""
    if count is None or rows is None:
        tally.same(name, rows, None) if count is None else tally.differences.append(f"{name}: none")
        return
    tally.same(f"number of {name}", len(rows), len(tokens))
    given = [(i, row, token) for i, (row, token) in enumerate(zip(rows, tokens, strict=False))]
    chosen = [next(iter(row)) for _, row, _ in given]
    tally.same(f"first token of each of {name}", chosen, [token for _, _, token in given])
    flat = [(i, token, entry) for i, row, _ in given for token, entry in row.items()]
    if any(not 0 <= token < table.shape[1] for _, token, _ in flat):
        tally.differences.append(f"{name}: tokens beyond the vocabulary")
        return
    places = torch.tensor([i for i, _, _ in flat], dtype=torch.long)
    ids = torch.tensor([token for _, token, _ in flat], dtype=torch.long)
    theirs = table[places, ids]
    ours = torch.tensor([entry.logprob for _, _, entry in flat])
    tally.near(name, ours, theirs, TOLERANCE)
    ranks = torch.tensor([entry.rank for _, _, entry in flat])
    least = (table[places] > theirs[:, None] + NEAR_TIE).sum(-1) + 1
    most = (table[places] >= theirs[:, None] - NEAR_TIE).sum(-1)
    outside = ((ranks < least) | (ranks > most)).nonzero().flatten().tolist()
    if outside:
        i = outside[0]
        tally.differences.append(
            f"rank in {name}: {int(ranks[i])}, not {int(least[i])} to {int(most[i])} at {int(places[i])}"
        )
    for _, token, entry in flat:
        # A part of a character has the text that the characters before it let it complete.
        if "\ufffd" not in asked.piece(token) + (entry.decoded_token or ""):
            tally.same(f"decoded_token of {token}", entry.decoded_token, asked.piece(token))
    likeliest = table.topk(min(count, table.shape[1]), dim=-1).values if count else None
    for i, row, token in given:
        listed = [t for t in row if row[t].rank is not None and row[t].rank <= count]
        others = [t for t in row if t != token]
        if likeliest is None:
            tally.same(f"alternatives in {name}", others, [])
            continue
        # The listed tokens are the likeliest: none that is left out is likelier than the last of them.
        if len(listed) < min(count, table.shape[1]) or len(row) > count + 1:
            tally.differences.append(f"alternatives in {name}: {len(listed)}, not {count} at {i}")
            return
        if float(table[i, listed].min()) < float(likeliest[i, -1]) - NEAR_TIE:
            tally.differences.append(f"alternatives in {name}: not the likeliest ones at {i}")
            return


def _compare_prompt_logprobs(tally: Tally, output: Any, expected: Expected, asked: Asked) -> None:
    count, rows = asked.params.prompt_logprobs, output.prompt_logprobs
    if count is None:
        tally.same("prompt_logprobs", rows, None)
        return
    if rows is None:
        tally.differences.append("prompt_logprobs: none")
        return
    tally.same("number of prompt_logprobs", len(rows), len(expected.ids))
    if not rows or len(rows) != len(expected.ids):
        return
    tally.same("first of prompt_logprobs", rows[0], None)
    tokens = output.prompt_token_ids[1:]
    known = [i for i, token in enumerate(expected.ids[1:]) if token is not None]
    _compare_logprobs(
        tally,
        "prompt_logprobs",
        [rows[1:][i] for i in known],
        [tokens[i] for i in known],
        expected.prompt_table[:-1][known],
        count,
        asked,
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
