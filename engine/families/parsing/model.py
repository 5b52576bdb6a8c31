"""Reads a checkpoint's JSON files into a ModelConfig: the steps that all families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.quantisation import read_quantisation
from engine.errors import CheckpointError
from engine.families.base import ModelConfig
from engine.families.parsing.decoder import parse_decoder
from engine.families.parsing.defaults import DecoderKind, ties_by_default
from engine.families.parsing.fields import Json, integer
from engine.layers.decoder_config import DecoderConfig

TextFields = Callable[[Json], tuple[Json, DecoderKind]]
"""From config.json: the fields of the decoder, and its kind."""


def flat_text(kind: DecoderKind) -> TextFields:
    """The decoder's fields are those of config.json itself."""
    return lambda raw: (raw, kind)


def nested_text(*kinds: DecoderKind, text_may_tie: bool = True) -> TextFields:
    """The decoder's fields are in ``text_config``, whose ``model_type`` is one of ``kinds``.

    Args:
        kinds: the first is assumed where ``model_type`` is missing.
        text_may_tie: whether ``tie_word_embeddings`` in ``text_config`` ties the embeddings, as the field of
            the same name in config.json does.
    """

    def fields(raw: Json) -> tuple[Json, DecoderKind]:
        stated = raw.get("text_config") or {}
        kind = stated.get("model_type", kinds[0])
        if kind not in kinds:
            raise CheckpointError(
                f"config.json: text_config.model_type {kind!r} is not supported; {', '.join(kinds)} are",
                param="text_config",
            )
        filled = {"tie_word_embeddings": ties_by_default(cast(DecoderKind, kind)), **stated}
        return tied_text(raw, filled, text_may_tie), cast(DecoderKind, kind)

    return fields


def tied_text(raw: Json, text: Json, text_may_tie: bool = True) -> Json:
    """``text`` with ``tie_word_embeddings`` as config.json (``raw``) and perhaps itself state it."""
    tied = raw.get("tie_word_embeddings") or (text_may_tie and text.get("tie_word_embeddings"))
    return {**text, "tie_word_embeddings": bool(tied)}


def tied_unless_stated(fields: TextFields) -> TextFields:
    """``fields`` for families whose embeddings are tied if config.json has no ``tie_word_embeddings``."""
    return lambda raw: fields({"tie_word_embeddings": True, **raw})


TokenId = Callable[[Json, DecoderConfig], int | None]
"""From config.json and the decoder: the id of a placeholder token."""


def no_token(raw: Json, decoder: DecoderConfig) -> None:
    """The family has no such items."""


def named_tokens(checkpoint: Checkpoint, usual: Mapping[str, str]) -> dict[str, str]:
    """The text of the tokens that tokenizer_config.json names, by its fields.

    Args:
        usual: the fields, each with its token where the file has none.
    """
    stated = checkpoint.json("tokenizer_config.json")
    added = stated.get("extra_special_tokens")
    named = {**usual, **(added if isinstance(added, dict) else {}), **stated}
    texts = {field: named[field] for field in usual}
    return {field: token["content"] if isinstance(token, dict) else token for field, token in texts.items()}


def remember_tokens(usual: Mapping[str, str]) -> Callable[[ModelConfig, Checkpoint], ModelConfig]:
    """For :attr:`ConfigReader.finish`: ``extra`` becomes :func:`named_tokens` of ``usual``."""
    return lambda config, checkpoint: replace(config, extra=named_tokens(checkpoint, usual))


def token_field(*names: str, default: int) -> TokenId:
    """The first of the fields ``names`` that config.json states, else ``default``.

    A field that is no token id raises :class:`CheckpointError` when it is read.
    """
    return lambda raw, decoder: next((integer(raw, name, least=0) for name in names if name in raw), default)


def as_read(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The configuration without changes."""
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigReader:
    """Reads the configuration of one family's checkpoints.

    Attributes:
        text: finds the decoder's fields in config.json.
        vision: reads the vision part from config.json, the image processor's JSON and the decoder's hidden
            size; None if the family is text-only.
        image_token, video_token: find the ids of the placeholder tokens.
        end_tokens: tokens that end an answer whether or not the files name them.
        finish: completes a configuration with values of the family's own.
    """

    text: TextFields
    vision: Callable[[Json, Json, int], Any] | None = None
    image_token: TokenId = no_token
    video_token: TokenId = no_token
    end_tokens: tuple[int, ...] = ()
    finish: Callable[[ModelConfig, Checkpoint], ModelConfig] = as_read

    def read(self, checkpoint: Checkpoint, family: str, architecture: str) -> ModelConfig:
        """Read the files of ``checkpoint``.

        Raises:
            CheckpointError: naming the field that is missing or not supported.
        """
        raw = checkpoint.config
        require_objects(raw)
        read_quantisation(checkpoint)
        text, kind = self.text(raw)
        decoder = with_stored_biases(parse_decoder(text, kind), kind, text, checkpoint)
        vision = None
        if self.vision is not None:
            vision = self.vision(raw, checkpoint.preprocessor_config, decoder.hidden_size)
        config = ModelConfig(
            architecture=architecture,
            family=family,
            decoder=decoder,
            vision=vision,
            eos_token_ids=eos_ids(checkpoint, text, vocab_size=decoder.vocab_size, defaults=self.end_tokens),
            dtype=checkpoint_dtype(raw, text),
            image_token_id=self.image_token(raw, decoder),
            video_token_id=self.video_token(raw, decoder),
        )
        return self.finish(config, checkpoint)


def require_objects(raw: Json) -> None:
    """Refuse a config.json whose parts are not objects.

    Raises:
        CheckpointError: naming the part.
    """
    for field in ("text_config", "vision_config", "llm_config", "vlm_config"):
        if not isinstance(raw.get(field), dict | None):
            raise CheckpointError(
                f"config.json: {field} should be an object, not {raw[field]!r}", param=field
            )


def with_stored_biases(
    decoder: DecoderConfig, kind: DecoderKind, text: Json, checkpoint: Checkpoint
) -> DecoderConfig:
    """``decoder`` with the biases that a Mistral checkpoint states and stores.

    Transformers' Mistral class has no biases: it ignores ``attention_bias`` and ``mlp_bias``, and leaves out
    the tensors. Some checkpoints were made by Llama's class, which has them, and are computed as by that one.
    """
    if kind != "mistral":
        return decoder

    def stored(field: str, name: str) -> bool:
        # A tower's layers have the same names inside.
        of_decoder = re.compile(rf"(?:(?:model|language_model|text_model)\.)*layers\.\d+\.{re.escape(name)}")
        return text.get(field) is True and any(map(of_decoder.fullmatch, checkpoint.tensor_names))

    return replace(
        decoder,
        qkv_bias=stored("attention_bias", "self_attn.q_proj.bias"),
        o_bias=stored("attention_bias", "self_attn.o_proj.bias"),
        mlp_bias=stored("mlp_bias", "mlp.down_proj.bias"),
    )


def checkpoint_dtype(*configs: Json) -> str:
    """Read the dtype from the first of ``configs`` that has one; bfloat16 if none has."""
    for config in configs:
        for field in ("dtype", "torch_dtype"):
            if config.get(field) in ("float32", "float16", "bfloat16"):
                return str(config[field])
    return "bfloat16"


def eos_ids(
    checkpoint: Checkpoint, text: Json, *, vocab_size: int, defaults: Iterable[int] = ()
) -> tuple[int, ...]:
    """Collect the tokens that end an answer: from generation_config.json, config.json and the family.

    Args:
        text: the decoder's fields.
        defaults: the family's own.

    Raises:
        CheckpointError: one is no token id.
    """
    found: list[int] = []
    for source in (checkpoint.generation_config, checkpoint.config, text):
        value = source.get("eos_token_id")
        stated = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in stated):
            raise CheckpointError(f"eos_token_id should be token ids, not {value!r}", param="eos_token_id")
        found += stated
    return tuple(dict.fromkeys(i for i in [*found, *defaults] if 0 <= i < vocab_size))
