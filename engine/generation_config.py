"""A checkpoint's ``generation_config.json``: the defaults of its sampling parameters.

Every field that Transformers reads there is in one of three tables: honoured as Transformers does, of no
effect here, or refused, since answers would differ from those of Transformers in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from engine.errors import CheckpointError

#: Fields of :class:`~engine.sampling_params.SamplingParams` by the field that is their default.
HONOURED = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "max_new_tokens": "default_max_tokens",
    "max_length": "max_length",
    "min_new_tokens": "min_tokens",
    "min_length": "min_length",
    "stop_strings": "stop",
    "do_sample": "temperature",
    "sequence_bias": "logit_bias",
}

#: Fields without effect, each with the reason.
IGNORED = {
    "eos_token_id": "ends answers; it belongs to the model's configuration here",
    "bos_token_id": "the tokenizer and the chat template put it in",
    "pad_token_id": "batches are not padded",
    "decoder_start_token_id": "for encoder-decoder models",
    "num_return_sequences": "a request says how many answers it wants",
    "max_time": "the server has its own time limits",
    "early_stopping": "for beam search",
    "length_penalty": "for beam search",
    "low_memory": "for beam search",
    "renormalize_logits": "changes no choice",
    "remove_invalid_values": "a row without a valid logit ends its request",
    "use_cache": "changes no token",
    "use_mtp": "changes no token",
    "cache_implementation": "changes no token",
    "cache_config": "changes no token",
    "max_cache_len": "changes no token",
    "return_legacy_cache": "changes no token",
    "prefill_chunk_size": "changes no token",
    "compile_config": "changes no token",
    "disable_compile": "changes no token",
    "continuous_batching_config": "changes no token",
    "is_assistant": "for assisted decoding, which changes no token",
    "num_assistant_tokens": "for assisted decoding, which changes no token",
    "num_assistant_tokens_schedule": "for assisted decoding, which changes no token",
    "assistant_confidence_threshold": "for assisted decoding, which changes no token",
    "assistant_early_exit": "for assisted decoding, which changes no token",
    "assistant_lookbehind": "for assisted decoding, which changes no token",
    "assistant_ensemble_weight": "for assisted decoding, which is not done here",
    "speculation_type": "for assisted decoding, which changes no token",
    "target_lookbehind": "for assisted decoding, which changes no token",
    "prompt_lookup_num_tokens": "for assisted decoding, which changes no token",
    "max_matching_ngram_size": "for assisted decoding, which changes no token",
    "output_attentions": "names an output of Transformers",
    "output_hidden_states": "names an output of Transformers",
    "output_scores": "names an output of Transformers",
    "output_logits": "names an output of Transformers",
    "return_dict_in_generate": "names an output of Transformers",
    "transformers_version": "says who wrote the file",
    "_from_model_config": "says who wrote the file",
    "_commit_hash": "says who wrote the file",
    "_original_object_hash": "says who wrote the file",
    "generation_kwargs": "of encoder-decoder models",
}

#: Fields that are refused, each with the values that change nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "token_healing": (False,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "top_h": (),
}

#: Of these, the ones that Transformers reads only where it samples.
_SAMPLING_ONLY = {"typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}


#: What earlier releases of Transformers wrote into a config.json where nobody had set anything.
_WRITTEN_UNSET: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


def from_model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json that Transformers takes where there is no ``generation_config.json``.

    Where config.json itself doesn't set a field, ``text_config`` may.
    """
    text = config.get("text_config")
    found: dict[str, Any] = {}
    for source in (text if isinstance(text, Mapping) else {}, config):
        for name in (*HONOURED, *REFUSED):
            value = source.get(name)
            if value is not None and value != _WRITTEN_UNSET.get(name):
                found[name] = value
    return found


def sampling_defaults(
    config: Mapping[str, Any],
    eos_ids: Collection[int] = (),
    vocab_size: int | None = None,
    file: str = "generation_config.json",
) -> dict[str, Any]:
    """The fields of :class:`~engine.sampling_params.SamplingParams` that a ``generation_config.json`` sets.

    ``do_sample: false`` is temperature 0. Where it is absent, OpenAI's temperature of 1 stays, though
    Transformers would be greedy; likewise Transformers' own default of ``top_k``, 50, is not taken over.

    Args:
        eos_ids: tokens that end an answer; as in Transformers, ``bad_words_ids`` can't forbid one alone.
        vocab_size: width of the logits.
        file: name of the file that has the fields.

    Raises:
        CheckpointError: a field is refused; names it.
    """
    for name, harmless in REFUSED.items():
        value = config.get(name)
        unread = name in _SAMPLING_ONLY and config.get("do_sample") is not True
        if value is not None and value not in harmless and not unread:
            raise _refused(file, name, value, "is not supported")
    given = {name: config[name] for name in HONOURED if config.get(name) is not None}
    samples, bias = given.pop("do_sample", None), given.pop("sequence_bias", None)
    defaults = {HONOURED[name]: value for name, value in given.items()}
    if samples is False:
        defaults["temperature"] = 0.0
    if bias:
        defaults["logit_bias"] = _token_bias(file, bias)
    if "bad_words_ids" in defaults:
        defaults["bad_words_ids"] = _forbidden(file, defaults["bad_words_ids"], eos_ids, vocab_size)
    if defaults.keys() & {"default_max_tokens", "max_length"}:
        defaults["max_tokens"] = None
    return defaults


def _token_bias(file: str, bias: Any) -> dict[int, float]:
    """``sequence_bias``, pairs of a token sequence and its bias; sequences of one token alone."""
    if any(len(ids) != 1 for ids, _ in bias):
        raise _refused(file, "sequence_bias", bias, "is supported for single tokens alone")
    return {ids[0]: value for ids, value in bias}


def _forbidden(file: str, words: Any, eos_ids: Collection[int], vocab_size: int | None) -> list[list[int]]:
    if vocab_size is not None and any(token >= vocab_size for word in words for token in word):
        raise _refused(file, "bad_words_ids", words, f"names ids beyond the vocabulary of {vocab_size}")
    return [word for word in words if len(word) > 1 or word[0] not in eos_ids]


def _refused(file: str, name: str, value: Any, reason: str) -> CheckpointError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return CheckpointError(
        f"{file} sets {name} to {shown}, which {reason}. Remove the field to serve the checkpoint without it."
    )
