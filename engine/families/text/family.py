"""Language models without pictures: Llama, Mistral, Qwen2, Qwen3, Phi3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.rules import DECODER_RULES, ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import ConfigError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.parsing.decoder import (
    DecoderKind,
    checkpoint_dtype,
    eos_ids,
    parse_decoder,
    refuse_quantised,
)
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_KINDS: dict[str, DecoderKind] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class TextFamily:
    """Decoder-only language models; media are refused."""

    name = "text"
    architectures = tuple(_KINDS)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw = checkpoint.config
        architecture = next(name for name in raw["architectures"] if name in _KINDS)
        decoder = parse_decoder(raw, _KINDS[architecture])
        return ModelConfig(
            architecture=architecture,
            family=self.name,
            decoder=decoder,
            eos_token_ids=eos_ids(checkpoint, raw, vocab_size=decoder.vocab_size),
            dtype=checkpoint_dtype(raw),
            bos_token_id=raw.get("bos_token_id"),
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat()

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        return item.placeholder

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return None

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        if options:
            raise ConfigError(f"{config.architecture} takes no pictures", param="mm_processor_kwargs")
        return None

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(language=DECODER_RULES, ignore=(ROTARY_BUFFERS, *tied))

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        raise AssertionError("a text-only model has no encoder")


FAMILY = TextFamily()
