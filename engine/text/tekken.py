"""Reads tekken.json, the tokenizer file of Mistral's own format, alone or beside a tokenizer.json."""

from __future__ import annotations

import base64
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.text.token_bytes import BYTE_OF_CHARACTER

FILE = "tekken.json"
#: Roles of the tokens that every version has; a folder without tokenizer_config.json names none.
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
#: Special tokens of the files that list none, in the order of their ids.
_UNLISTED = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)


def read_tekken(file: Path) -> tokenizers.Tokenizer:
    """Convert a tekken.json: special tokens have the first ids, tokens of bytes follow by rank.

    With ``add_special_tokens`` BOS is put before a text.

    Raises:
        CheckpointError: the file can't be read.
    """
    data = _read(file)
    try:
        config = data["config"]
        specials = _special_tokens(data.get("special_tokens"), config["default_num_special_tokens"])
        count = config["default_vocab_size"] - len(specials)
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in data["vocab"][:count]}
        pattern = Regex(config["pattern"])
        return _converted(specials, ranks, pattern)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file.name} can't be read: {error!r}") from error


def split_as(backend: tokenizers.Tokenizer, file: Path) -> None:
    """Let ``backend`` split texts by the pattern of a tekken.json before it merges them.

    Some published tokenizer.json files of Mistral's models have the pattern of another model; all else in
    them is as in tekken.json.

    Raises:
        CheckpointError: the file can't be read.
    """
    if backend.pre_tokenizer is None:
        return
    pattern = _config(file, _read(file)).get("pattern")
    if not isinstance(pattern, str):
        raise CheckpointError(f"{file.name} should state config.pattern")
    state = json.loads(backend.pre_tokenizer.__getstate__())
    for step in state.get("pretokenizers", []):
        if step["type"] == "Split" and "Regex" in step["pattern"]:
            step["pattern"]["Regex"] = pattern
            break
    changed = copy.deepcopy(backend.pre_tokenizer)
    changed.__setstate__(json.dumps(state).encode())
    backend.pre_tokenizer = changed


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """The fields of a tekken.json about chats.

    Attributes:
        version: such as ``v7``.
        efforts: values of a request's ``reasoning_effort``; empty if the model has none.
        default_effort: where a request has none.
    """

    version: str | None
    efforts: tuple[str, ...] = ()
    default_effort: str = ""


def chat_format(file: Path) -> ChatFormat:
    """Return the fields of a tekken.json about chats.

    Raises:
        CheckpointError: the file can't be read.
    """
    data = _read(file)
    version = _config(file, data).get("version")
    try:
        effort = (data.get("model_settings_builder") or {}).get("reasoning_effort")
        if effort is None:
            return ChatFormat(version)
        found = ChatFormat(version, tuple(effort["values"]), effort["default"])
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file.name}: model_settings_builder can't be read: {error!r}") from error
    if found.default_effort not in found.efforts:
        raise CheckpointError(
            f"{file.name}: reasoning_effort's default {found.default_effort!r} is none of {found.efforts}"
        )
    return found


def _config(file: Path, data: dict[str, Any]) -> dict[str, Any]:
    config = data.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{file.name} should hold an object named config")
    return config


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} should hold a JSON object")
    return value


def _special_tokens(listed: list[dict[str, Any]] | None, count: int) -> list[str]:
    """Texts of the ``count`` special tokens by id; ids that the file doesn't list have made-up texts."""
    named = dict(enumerate(_UNLISTED))
    if listed is not None:
        named = {token["rank"]: token["token_str"] for token in listed}
    return [named.get(token, f"<SPECIAL_{token}>") for token in range(count)]


def _converted(specials: list[str], ranks: dict[bytes, int], pattern: Regex) -> tokenizers.Tokenizer:
    letters = {byte: letter for letter, byte in BYTE_OF_CHARACTER.items()}
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    vocabulary = {text: token for token, text in enumerate(specials)}
    vocabulary |= {spelled[token]: len(specials) + rank for token, rank in ranks.items()}
    merges = [
        (spelled[left], spelled[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _splits(token, ranks)
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    bos = ROLES["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    return backend


def _splits(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of tokens that merge into ``token``.

    A merge's priority is the rank of its result, so all pairs of a token have neighbouring priorities.
    """
    cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
    pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
    return sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
