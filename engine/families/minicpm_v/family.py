"""MiniCPM-V 2.6: an overview and slices of each picture, 64 rows for each of them, and a Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.checkpoint.rules import ROTARY_BUFFERS, TIED_HEAD, WeightRules
from engine.errors import CheckpointError
from engine.families.base import MediaEncoder, MediaProcessor, ModelConfig, PromptFormat
from engine.families.minicpm_v.config import SliceVisionConfig
from engine.families.minicpm_v.processor import MiniCPMVProcessor
from engine.families.parsing.clip import clip_rules
from engine.families.parsing.decoder import (
    checkpoint_dtype,
    eos_ids,
    integer,
    parse_decoder,
    refuse_quantised,
)
from engine.families.parsing.siglip import parse_siglip
from engine.prompt import MediaItem, MediaSpan, PlaceholderRun

if TYPE_CHECKING:
    from engine.checkpoint.folder import Checkpoint
    from engine.layers.build import BuildContext

_TOWER_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 980,
    "patch_size": 14,
}
_HEAD_DIM = 128  # of the resampler
_ROW = "<unk>"


class MiniCPMVFamily:
    """MiniCPM-V 2.6. Other versions have the same architecture name, and other parts."""

    name = "minicpm_v"
    architectures = ("MiniCPMV",)

    def parse(self, checkpoint: Checkpoint) -> ModelConfig:
        refuse_quantised(checkpoint)
        raw, processor = checkpoint.config, checkpoint.preprocessor_config
        if str(raw.get("version")) != "2.6":
            raise CheckpointError(
                f"config.json: version {raw.get('version')} of MiniCPMV is not supported; 2.6 is",
                param="version",
            )
        decoder = parse_decoder(raw, "qwen2")
        return ModelConfig(
            architecture=self.architectures[0],
            family=self.name,
            decoder=decoder,
            vision=_vision(raw, processor, decoder.hidden_size),
            eos_token_ids=eos_ids(checkpoint, raw, vocab_size=decoder.vocab_size, defaults=(151645, 151643)),
            dtype=checkpoint_dtype(raw),
            bos_token_id=raw.get("bos_token_id"),
            image_token_id=raw.get("image_token_id", 128244),
            extra={"numbered": bool(processor.get("use_image_id", True))},
        )

    def prompt_format(self, config: ModelConfig) -> PromptFormat:
        return PromptFormat(image="(<image>./</image>)", separator="\n")

    def placeholder(
        self, config: ModelConfig, item: MediaItem, index: int, encode: Callable[[str], list[int]]
    ) -> tuple[PlaceholderRun, ...]:
        assert config.extra is not None
        _, _, rows, columns, _, _ = item.grid
        text = f"<image_id>{index}</image_id>" if config.extra["numbered"] else ""
        text += f"<image>{_ROW}</image>"
        text += "\n".join([f"<slice>{_ROW}</slice>" * columns] * rows)
        row_token, *rest = encode(_ROW)
        if rest:
            raise CheckpointError(f"the tokenizer has no token {_ROW}, which this model's pictures need")
        return tuple(
            PlaceholderRun(token, config.vision.num_queries, True)
            if token == row_token
            else PlaceholderRun(token, 1, False)
            for token in encode(text)
        )

    def positions(
        self, config: ModelConfig, num_tokens: int, spans: Sequence[MediaSpan]
    ) -> tuple[np.ndarray, int] | None:
        return None

    def media_processor(
        self, checkpoint: Checkpoint, config: ModelConfig, options: Mapping[str, Any]
    ) -> MediaProcessor | None:
        return MiniCPMVProcessor.create(checkpoint.preprocessor_config, config, options)

    def weight_rules(self, config: ModelConfig) -> WeightRules:
        tied = (TIED_HEAD,) if config.decoder.tie_word_embeddings else ()
        return WeightRules(
            vision=((r"(resampler\..*)", r"\1"), *clip_rules(r"vpm\.")),
            language=((r"llm\.(lm_head\..*)", r"\1"), (r"llm\.model\.(.*)", r"\1")),
            ignore=(ROTARY_BUFFERS, r"resampler\.pos_embed", r"vpm\.embeddings\.position_ids", *tied),
        )

    def build_encoder(self, config: ModelConfig, build: BuildContext) -> MediaEncoder:
        from engine.families.minicpm_v.encoder import SliceVisionEncoder

        return SliceVisionEncoder(config.vision, build)


def _vision(raw: Mapping[str, Any], processor: Mapping[str, Any], hidden: int) -> SliceVisionConfig:
    tower, filled = parse_siglip(raw.get("vision_config") or {}, defaults=_TOWER_DEFAULTS)
    if raw.get("drop_vision_last_layer", True):
        tower = replace(tower, num_layers=tower.num_layers - 1)
    if hidden % _HEAD_DIM:
        raise CheckpointError(
            f"config.json: hidden_size {hidden} is no multiple of {_HEAD_DIM}", param="hidden_size"
        )
    return SliceVisionConfig(
        tower=tower,
        patch_size=filled["patch_size"],
        num_queries=integer({"query_num": 64, **raw}, "query_num"),
        num_heads=hidden // _HEAD_DIM,
        out_features=hidden,
        mean=tuple(processor.get("norm_mean") or (0.5, 0.5, 0.5)),
        std=tuple(processor.get("norm_std") or (0.5, 0.5, 0.5)),
    )


FAMILY = MiniCPMVFamily()
