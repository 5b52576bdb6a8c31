"""Checks what a caller asks for, and makes the engine's requests of it."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.config import EngineConfig
from engine.constraints import check_constraints, constraint_names
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.families.base import ModelConfig
from engine.families.registry import family_named
from engine.goal_queue import deadline_of
from engine.pooling_params import PoolingParams
from engine.progress import Progress
from engine.prompt import EmbeddedMedia, EngineInput, MediaSpan
from engine.request import Request
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduling.scheduler import Scheduler
from engine.structured.grammar import GrammarCompiler
from engine.structured.matcher import Grammar
from engine.text.tokenizer import Tokenizer

Embedding = EmbeddedMedia | Any  # or a device tensor (num_tokens, width), where the encoder is in-process

_Ranges = list[tuple[int, int]]

#: Share of a goal for the first token that may have passed when the prompt gets its slot.
_WAITING_SHARE = 0.8

#: Most tokens of a prompt whose blocks are named by its caller's event loop. The step thread names those of
#: longer ones, which takes milliseconds.
_MOST_NAMED = 8192

#: Keeps the seeds of a request's ``n`` sequences apart.
_SEED_STRIDE = 0x9E3779B97F4A7C15


class RequestFactory:
    """Checks every request, whatever a server in front of it has checked: nothing behind it checks again.

    Args:
        config: the engine's configuration.
        model: the model's configuration.
        scheduler: refuses requests that could never run.
        tokenizer: the model's tokenizer.
        grammars: compiles structured output.
        num_positions: length of the model's rotary tables: every position must be below it.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        num_positions: int,
    ) -> None:
        self._config = config
        self._model = model
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._num_positions = num_positions
        self._random = random.Random(config.seed)

    @property
    def max_model_len(self) -> int:
        return self._scheduler.max_model_len

    def generation(
        self,
        request_id: str,
        inputs: EngineInput,
        params: SamplingParams,
        embeddings: Sequence[Embedding] = (),
        priority: int = 0,
        progress: Progress | None = None,
        asked: float | None = None,
    ) -> RequestGroup:
        """A group of ``params.n`` requests, or of those that have not finished.

        Args:
            embeddings: encoder rows of ``inputs.spans``, in their order (each distinct item once is enough
                if it carries its hash).
            progress: what another engine has given of the answer; ``params`` must then have a seed, unless
                they are greedy.
            asked: when the client asked, by ``time.time()``; None for now.

        Raises:
            InvalidRequest: a parameter, the length or an embedding is unusable.
        """
        progress = progress or Progress()
        first = self._generated(request_id, inputs, params, embeddings, priority)
        first.deadline = deadline_of(self._config.first_token_goal_s, _WAITING_SHARE, asked)
        params, grammar = first.params, self._grammar(first)
        # One of the sequences reports the prompt's log-probabilities for all.
        unscored = params
        if params.n > 1 and params.prompt_logprobs is not None:
            unscored = dataclasses.replace(params, prompt_logprobs=None)
        seed = params.seed if params.seed is not None else self._random.getrandbits(62)
        requests: list[Request] = []
        for index in range(params.n):
            known = progress.of(index)
            if known.finished:
                continue
            request = dataclasses.replace(
                first,
                id=f"{request_id}/{index}",
                choice=index,
                # All sequences share the prompt's list: there may be many, and it may be long.
                token_ids=first.token_ids + known.token_ids if known.token_ids else first.token_ids,
                params=params if index == 0 else unscored,
                seed=_signed64(seed + index * _SEED_STRIDE),
                embeddings=dict(first.embeddings),
                grammar=None if grammar is None else grammar.matcher(),
                appends_forced=self._appends_forced(params),
                takes_drafts=_takes_drafts(params),
                opening=[],
                blocks=[],
                block_hashes=[],
            )
            self._carry_on(request)
            self._name(request, requests[0] if requests else None)
            requests.append(request)
        return RequestGroup.of(request_id, requests, first.num_prompt, progress)

    def _appends_forced(self, params: SamplingParams) -> bool:
        """Return whether a token that alone may come next can be appended without being sampled: nothing else
        may ban it, and nobody may want its log-probabilities."""
        alone = constraint_names(params) == ["structured"]
        return self._config.append_forced_tokens and alone and params.logprobs is None

    def _carry_on(self, request: Request) -> None:
        """Bring a request into the state that it would have after the output that it has already, and append
        the tokens that its grammar forces there.

        Raises:
            ContextLengthExceeded: no token more fits; the engine that gave the output had more room.
        """
        count = len(request.token_ids)
        if count >= request.max_total:
            raise ContextLengthExceeded.by(request.max_total, count, 1)
        if request.grammar is not None:
            # A token that is not allowed leaves a matcher that allows none, as it does in a running answer.
            request.grammar.accept(request.token_ids[request.num_prompt :])
            # The scores of a prompt are computed apart from its answer.
            if request.appends_forced and request.params.prompt_logprobs is None:
                request.opening = request.grammar.open(request.max_total - 1 - count, request.stop_ids)
                request.token_ids = request.token_ids + request.opening
        longest = self._model.decoder.rope.recompute_beyond
        if longest is not None and len(request.token_ids) > longest:
            request.rope_variant = 1

    def _name(self, request: Request, like: Request | None = None) -> None:
        """Prepare what the step thread needs of a prompt's tokens: running answers wait for that one.

        Args:
            like: another sequence of the same caller's request, which was prepared.
        """
        if (
            like is not None
            and like.token_ids is request.token_ids
            and like.rope_variant == request.rope_variant
        ):
            request.take_ids(like)
            request.block_hashes = list(like.block_hashes)
        elif len(request.token_ids) <= _MOST_NAMED:
            self._scheduler.kv.name_blocks(request)

    def pooling(
        self,
        request_id: str,
        inputs: EngineInput,
        params: PoolingParams,
        embeddings: Sequence[Embedding] = (),
    ) -> RequestGroup:
        """A group of one request whose hidden states are pooled.

        Raises:
            InvalidRequest: the length or an embedding is unusable.
        """
        request = self._pooled(request_id, inputs, params, embeddings)
        self._name(request)
        return RequestGroup.of(request_id, [request], request.num_prompt)

    def check(self, inputs: EngineInput, params: SamplingParams | PoolingParams) -> None:
        """Refuse a request before its media are encoded.

        Raises:
            InvalidRequest: :meth:`generation` or :meth:`pooling` would refuse it, whatever its embeddings.
        """
        if isinstance(params, PoolingParams):
            self._pooled("", inputs, params, None)
            return
        self._grammar(self._generated("", inputs, params, None, 0))

    def _generated(
        self,
        request_id: str,
        inputs: EngineInput,
        params: SamplingParams,
        embeddings: Sequence[Embedding] | None,
        priority: int,
    ) -> Request:
        """The first of a group's requests, checked."""
        if self._config.task != "generate":
            made = "embeddings" if self._config.task == "embed" else "scores"
            raise InvalidRequest(f"This model makes {made}; it does not generate text.", param="model")
        eos_ids = self._model.eos_token_ids
        params.resolve_bad_words(lambda text: self._tokenizer.encode(text, add_special_tokens=False), eos_ids)
        params.verify(self._model.decoder.vocab_size, self.max_model_len)
        stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            # A checkpoint may name an id that its output layer doesn't have.
            size = self._model.decoder.vocab_size
            stop_ids |= {token for token in self._model.eos_token_ids if 0 <= token < size}
        first = self._request(request_id, inputs, params, embeddings, priority, stop_ids)
        first.params = params.for_prompt(first.num_prompt, first.max_total)
        count, max_tokens = first.num_prompt, first.params.max_tokens
        if max_tokens is not None:
            if count + max_tokens > first.max_total:
                raise ContextLengthExceeded.by(first.max_total, count, max_tokens)
            first.max_total = count + max_tokens
        self._scheduler.check(first)
        return first

    def _grammar(self, request: Request) -> Grammar | None:
        """The grammar of a request that has one; its constraints must leave tokens to begin and to end with.

        Raises:
            InvalidRequest: they don't, or the grammar is refused.
        """
        params, vocab_size = request.params, self._model.decoder.vocab_size
        grammar = None if params.structured is None else self._grammars.compile(params.structured)
        if len(constraint_names(params)) > (grammar is not None):
            check_constraints(
                params,
                vocab_size,
                request.stop_ids,
                self._model.eos_token_ids,
                None if grammar is None else grammar.first_mask(vocab_size),
                self._grammars.can_spell,
            )
        return grammar

    def _pooled(
        self,
        request_id: str,
        inputs: EngineInput,
        params: PoolingParams,
        embeddings: Sequence[Embedding] | None,
    ) -> Request:
        if self._config.task == "generate":
            raise InvalidRequest("This model generates text; it is not served for embeddings.", param="model")
        if (self._config.task == "score") != (params.between is not None):
            raise InvalidRequest("This model scores pairs of texts or images only.", param="model")
        request = self._request(request_id, inputs, SamplingParams(), embeddings, pooling=params)
        self._scheduler.check(request)
        return request

    def _request(
        self,
        request_id: str,
        inputs: EngineInput,
        params: SamplingParams,
        embeddings: Sequence[Embedding] | None,
        priority: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        pooling: PoolingParams | None = None,
    ) -> Request:
        if not inputs.token_ids:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        size = self._model.decoder.vocab_size
        # A comparison in Python for each token of a long prompt would take a millisecond.
        if min(inputs.token_ids) < 0 or max(inputs.token_ids) >= size:
            bad = next(i for i in inputs.token_ids if not 0 <= i < size)
            raise InvalidRequest(
                f"Token id {bad} is outside of the vocabulary of {size}.",
                param="prompt",
            )
        _check_salt(inputs.cache_salt)
        if not isinstance(priority, int):
            raise InvalidRequest(f"priority must be an integer, got {priority!r}.", param="priority")
        _check_spans(inputs.spans, len(inputs.token_ids))
        both_ways, one_way = self._both_ways(inputs)
        request = Request(
            id=request_id,
            token_ids=list(inputs.token_ids),
            num_prompt=len(inputs.token_ids),
            params=params,
            max_total=self.max_model_len,
            stop_ids=stop_ids,
            spans=inputs.spans,
            embeddings={} if embeddings is None else self._match(inputs.spans, embeddings),
            priority=priority,
            arrival=time.monotonic(),
            cache_salt=inputs.cache_salt,
            pooling=pooling,
            rope_variant=self._model.decoder.rope.variant(len(inputs.token_ids)),
            both_ways=both_ways,
            one_way=one_way,
        )
        self._place(request)
        return request

    def _both_ways(self, inputs: EngineInput) -> tuple[_Ranges, _Ranges]:
        """The ranges of :attr:`Request.both_ways`, of which those of one token change nothing and are left
        out, and those of :attr:`Request.one_way`.

        Raises:
            InvalidRequest: a whole prompt should attend both ways, and is longer than a sliding window.
        """
        kind, length = self._model.decoder.both_ways, len(inputs.token_ids)
        if kind == "prompt":
            window = min((each for each in self._model.decoder.windows if each is not None), default=length)
            if length > window:
                raise InvalidRequest(
                    f"All tokens of a prompt see each other in this model; one of {length} tokens, which is "
                    f"longer than its window of {window}, is not supported.",
                    param="prompt",
                )
            return [(0, length)], []
        if kind == "tokens":
            return _around(inputs.token_ids, self._model.decoder.seeing_tokens)
        runs = [run for span in inputs.spans for run in span.runs()] if kind == "images" else []
        return [(start, end) for start, end in runs if end - start > 1], []

    def _place(self, request: Request) -> None:
        """Set the rotary positions of ``request``, and end its answer where the positions end.

        Positions of a video count seconds, not tokens, so that they can pass the context's length where the
        tokens don't.

        Raises:
            InvalidRequest: the prompt's own positions pass it.
        """
        if self._model.decoder.rope.mrope_section is None or not request.spans:
            return
        if request.num_prompt > self.max_model_len:
            # Its length is the better reason to refuse it.
            return
        found = family_named(self._model.family).positions(
            self._model, request.token_ids[: request.num_prompt], request.spans
        )
        if found is None:
            return
        positions, request.position_delta = found
        request.positions = positions.astype(np.int32)
        room = 0 if request.pooling else 1
        last = max(int(positions.max()), request.num_prompt + request.position_delta - 1 + room)
        if last >= self._num_positions:
            raise InvalidRequest(
                f"The prompt's positions reach {last}, but this model's context ends at "
                f"{self._num_positions - 1}: its videos last too long at their frame rate. Send shorter "
                "videos, or raise fps.",
                param="prompt",
            )
        request.max_total = min(request.max_total, self._num_positions - request.position_delta)

    def _match(self, spans: Sequence[MediaSpan], embeddings: Sequence[Embedding]) -> dict[str, Embedding]:
        """Embeddings by item hash, each checked against its span."""
        by_hash = {e.hash: e for e in embeddings if isinstance(e, EmbeddedMedia)}
        if not by_hash and len(embeddings) == len(spans):
            by_hash = {s.item.hash: e for s, e in zip(spans, embeddings, strict=True)}
        for index, span in enumerate(spans):
            media = by_hash.get(span.item.hash)
            if media is None:
                raise InvalidRequest(f"There are no embeddings for image {index + 1} of the prompt.")
            rows = media.rows if isinstance(media, EmbeddedMedia) else media
            wanted = (span.item.num_tokens, self._model.embedding_width)
            if tuple(rows.shape) != wanted:
                raise InvalidRequest(
                    f"The embeddings of image {index + 1} have shape {tuple(rows.shape)}; its placeholders "
                    f"in the prompt want {wanted}."
                )
        return by_hash


def _takes_drafts(params: SamplingParams) -> bool:
    """Return whether only penalties make the choice of a token depend on the tokens before it."""
    words = any(len(ids) > 1 for ids in params.bad_sequences)
    return params.structured is None and not words and not params.no_repeat_ngram_size


def _check_salt(salt: Any) -> None:
    """Block hashes encode the salt within a step of all requests, where an error would reach the others."""
    try:
        salt.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InvalidRequest("cache_salt must be a string of valid Unicode.", param="cache_salt") from None


def _around(token_ids: Sequence[int], seeing: Sequence[int]) -> tuple[_Ranges, _Ranges]:
    """The range from the first to the last of the tokens ``seeing``, if there are several, and the runs of
    other tokens within it."""
    places = np.flatnonzero(np.isin(np.array(token_ids), seeing))
    if len(places) < 2:
        return [], []
    behind = np.flatnonzero(np.diff(places) > 1)
    gaps = zip((places[behind] + 1).tolist(), places[behind + 1].tolist(), strict=True)
    return [(int(places[0]), int(places[-1]) + 1)], list(gaps)


def _check_spans(spans: Sequence[MediaSpan], num_tokens: int) -> None:
    """Check that media lie inside the prompt, one behind the other.

    Raises:
        InvalidRequest: naming the item that doesn't.
    """
    end = 0
    for index, span in enumerate(spans):
        rows, places = span.item.num_tokens, span.embed_index
        fits = end <= span.offset and span.offset + span.length <= num_tokens
        if places is None:
            fits &= span.length == rows
        else:
            fits &= len(places) == rows and bool(np.all(np.diff(places) > 0))
            fits &= not rows or (places[0] >= 0 and places[-1] < span.length)
        if not fits:
            raise InvalidRequest(
                f"Image {index + 1} of the prompt takes tokens {span.offset} to {span.offset + span.length}, "
                f"which do not fit its {rows} embedding rows and the prompt's {num_tokens} tokens.",
                param="prompt",
            )
        end = span.offset + span.length


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
