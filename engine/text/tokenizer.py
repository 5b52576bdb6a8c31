"""A checkpoint's tokenizer, straight on the ``tokenizers`` library: ids, text, and bytes of single tokens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, normalizers

from engine.errors import CheckpointError, InvalidRequest
from engine.text import tekken
from engine.text.token_bytes import TokenBytes

_ADVICE = "Put a tokenizer.json there: load the tokenizer with Transformers and save it (save_pretrained)."


class Tokenizer:
    """Text to ids and back, equal to Transformers' fast tokenizer made of the same ``tokenizer.json``.

    Not thread-safe against its own construction, but every method may be called from any thread.

    Args:
        backend: the tokenizer proper; it is changed (padding and truncation off, named tokens added).
        config: the content of tokenizer_config.json.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        self.backend = backend
        self.config = dict(config)
        backend.no_truncation()
        backend.no_padding()
        self._add_configured_tokens()
        added = backend.get_added_tokens_decoder()
        self.added_tokens: dict[int, AddedToken] = dict(sorted(added.items()))
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._pieces = TokenBytes(backend)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder.

        ``tokenizer.json`` is taken as it stands; a ``tekken.json`` beside it decides how texts are split.
        Alone, ``tekken.json`` is converted. Only where there is neither, Transformers is imported to convert
        a vocabulary file, or a sentencepiece model if the package ``sentencepiece`` is installed.

        Raises:
            CheckpointError: the folder has no tokenizer that can be read.
        """
        folder = Path(path)
        config = _read_config(folder)
        file, publishers = folder / "tokenizer.json", folder / tekken.FILE
        if not file.is_file():
            if publishers.is_file():
                return cls(tekken.read_tekken(publishers), tekken.ROLES | config)
            return cls(_converted(folder), config)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file.name} can't be read: {error}") from error
        if publishers.is_file():
            tekken.split_as(backend, publishers)
        return cls(backend, config)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id that stands for something. A model's embedding may have more rows."""
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        return largest + 1

    def token_text(self, role: str) -> str | None:
        """The token of a role such as ``bos_token`` or ``eos_token``, as tokenizer_config.json has it."""
        return _content(self.config.get(role))

    def role_id(self, role: str) -> int | None:
        """Id of the token of a role; None if tokenizer_config.json names none or the vocabulary lacks it."""
        text = self.token_text(role)
        return None if text is None else self.token_id(text)

    def token_id(self, token: str) -> int | None:
        """Id of a token given exactly as the vocabulary spells it; None if it has none."""
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; special-token strings inside of it become their ids.

        Raises:
            InvalidRequest: the text holds lone surrogates.
        """
        return _encode(self.backend, text, add_special_tokens)

    def encode_plain(self, text: str, *, at_start: bool = True) -> list[int]:
        """Ids of ``text`` with nothing added, strings that look like added tokens read as plain text.

        No id of a special token ever comes out of it, but that for unknown characters.

        Args:
            at_start: the text opens a prompt; otherwise tokenizers that put a space before the first word do
                so only if they do it after every special token as well.
        """
        if not text:
            return []
        backend = self._plain_backend if at_start else self._plain_inner
        ids = _encode(backend, text, False)
        if self.special_ids.isdisjoint(ids):
            return ids
        # Some vocabularies (Unigram) hold control tokens as ordinary pieces: spell those out.
        found: list[int] = []
        for piece in self._inside_special.split(text):
            found += _encode(backend, piece, False)
            backend = self._plain_pieces
        unknown = self.role_id("unk_token")
        return [i for i in found if i == unknown or i not in self.special_ids]

    def encode_piece(self, text: str) -> list[int]:
        """Ids of ``text`` as a part of a longer one: nothing is added or put before it, and strings that look
        like added tokens are read as plain text."""
        return _encode(self._plain_pieces, text, False) if text else []

    def with_special_tokens(self, ids: Sequence[int]) -> list[int]:
        """``ids`` between the tokens that ``encode(..., add_special_tokens=True)`` puts around a text."""
        return [*self.special_prefix, *ids, *self.special_suffix]

    def truncated(
        self,
        ids: Sequence[int],
        most: int,
        side: Literal["left", "right"] | None = None,
        *,
        special: bool,
    ) -> list[int]:
        """At most ``most`` of ``ids``, without those of ``side`` that are too many.

        Args:
            side: None takes tokenizer_config.json's ``truncation_side``, or else the right.
            special: ``ids`` begin with :attr:`special_prefix` and end with :attr:`special_suffix`, which
                stay, as in Transformers. ``most`` must be more than those have.
        """
        if len(ids) <= most:
            return list(ids)
        prefix, suffix = self._surrounding if special else ([], [])
        inner, room = ids[len(prefix) : len(ids) - len(suffix)], most - len(prefix) - len(suffix)
        assert room > 0
        side = side or self.config.get("truncation_side")
        kept = inner[-room:] if side == "left" else inner[:room]
        return [*prefix, *kept, *suffix]

    @property
    def special_prefix(self) -> list[int]:
        """Ids put before a text by ``add_special_tokens``, such as BOS."""
        return self._surrounding[0]

    @property
    def special_suffix(self) -> list[int]:
        """Ids put after a text by ``add_special_tokens``."""
        return self._surrounding[1]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; ids outside of the vocabulary give nothing."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token adds to running text; possibly a part of a character, or nothing."""
        return self._pieces.of(token_id)

    @property
    def ascii_texts(self) -> Mapping[int, str]:
        """Texts of the tokens that :meth:`token_bytes` has found to be ASCII so far, by id."""
        return self._pieces.ascii

    def first_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token that begins a text: some decoders drop its leading space."""
        return self._pieces.of_first(token_id)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        return self._plain(())

    @cached_property
    def _plain_inner(self) -> tokenizers.Tokenizer:
        return self._plain(("first",))

    @cached_property
    def _plain_pieces(self) -> tokenizers.Tokenizer:
        return self._plain(("first", "always"))

    def _plain(self, unspaced: tuple[str, ...]) -> tokenizers.Tokenizer:
        """Copy the pipeline without added tokens, and without the space that Metaspace puts in front in these
        schemes. With ``always`` among them the normalizer puts none in front either."""
        plain = tokenizers.Tokenizer(self.backend.model)  # shares the vocabulary
        if self.backend.normalizer is not None:
            plain.normalizer = self.backend.normalizer
            if "always" in unspaced:
                plain.normalizer = _without_prepend(self.backend.normalizer)
        if self.backend.pre_tokenizer is None:
            return plain
        state = json.loads(self.backend.pre_tokenizer.__getstate__())
        for step in state.get("pretokenizers", [state]):
            if step["type"] == "Metaspace" and step["prepend_scheme"] in unspaced:
                step["prepend_scheme"] = "never"
        pre_tokenizer = copy.deepcopy(self.backend.pre_tokenizer)
        pre_tokenizer.__setstate__(json.dumps(state).encode())
        plain.pre_tokenizer = pre_tokenizer
        return plain

    @cached_property
    def _surrounding(self) -> tuple[list[int], list[int]]:
        encoding = self.backend.encode("a", add_special_tokens=True)
        inner = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        return encoding.ids[: inner[0]], encoding.ids[inner[-1] + 1 :]

    @cached_property
    def _inside_special(self) -> re.Pattern[str]:
        """Matches the empty place after the first character of every special token's string."""
        contents = {self.added_tokens[i].content for i in self.special_ids}
        places = [f"(?<={re.escape(c[0])})(?={re.escape(c[1:])})" for c in contents if len(c) > 1]
        return re.compile("|".join(places) or "(?!)")

    def _add_configured_tokens(self) -> None:
        """Tokens that tokenizer_config.json names; those that are new get the next free ids, in order.

        As in Transformers, what its ``added_tokens_decoder`` says of a token counts for more than
        tokenizer.json, and tokens that have a role (``..._token``) are special.
        """
        described = self.config.get("added_tokens_decoder") or {}
        tokens = [
            _added_token(value) for _, value in sorted(described.items(), key=lambda item: int(item[0]))
        ]
        self.backend.add_tokens(tokens)
        tokens = tokens or list(self.backend.get_added_tokens_decoder().values())
        known = {token.content: token for token in tokens}
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        extra = extra.values() if isinstance(extra, Mapping) else extra
        roles = [value for key, value in self.config.items() if key.endswith("_token") and _content(value)]
        values = roles + list(extra)
        self.backend.add_special_tokens(
            [known.get(_content(value) or "", _added_token(value)) for value in values]
        )


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    try:
        # A batch of one: only batches come without offsets, which take a third to a half of the time.
        return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except (TypeError, UnicodeError) as error:  # lone surrogates, which JSON can spell
        raise InvalidRequest("The text has characters that are not valid Unicode.") from error


def _without_prepend(normalizer: normalizers.Normalizer) -> normalizers.Normalizer | None:
    """``normalizer`` without the steps that put a string, the space of older Llama files, before a text."""
    state = json.loads(normalizer.__getstate__())
    if state["type"] == "Prepend":
        return None
    if state["type"] == "Sequence":
        state["normalizers"] = [step for step in state["normalizers"] if step["type"] != "Prepend"]
        normalizer = copy.deepcopy(normalizer)
        normalizer.__setstate__(json.dumps(state).encode())
    return normalizer


def _content(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_token(value: Any) -> AddedToken:
    if not isinstance(value, Mapping):
        return AddedToken(str(value), special=True, normalized=False)
    flags = {
        name: bool(value[name]) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in value
    }
    return AddedToken(value["content"], special=bool(value.get("special")), **flags)


def _read_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older checkpoints
        config |= _read_json(folder / "special_tokens_map.json")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file.name} is not valid JSON: {error}") from error


def _converted(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        reason = f"{error}"
        if "trust_remote_code" in reason:
            reason = "its class is code of the folder, which is never run"
        elif (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            reason = "tokenizer.model is read with the package sentencepiece, which is not installed"
        raise CheckpointError(
            f"there is no tokenizer in {folder.name} that can be read: {reason}. {_ADVICE}"
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError("the checkpoint's tokenizer has no fast form; convert it to tokenizer.json")
    return backend
