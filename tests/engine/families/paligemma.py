"""Tiny checkpoints of PaliGemma and PaliGemma 2, and Transformers' processing of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import TRANSFORMERS, rewrite_tensors, spread, tiny_siglip, tokenizer

SPECIALS = ("<pad>", "<eos>", "<bos>", "<image>")
FRAME = "<bos>{}\n"
SIDE, PATCH, ROWS = 21, 7, 9
#: Fields of the decoder that Gemma 2 has besides Gemma's. The window is longer than the prompts.
_GEMMA2 = {
    "query_pre_attn_scalar": 20,
    "sliding_window": 192,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": 10.0,
}


def paligemma_tokenizer() -> Any:
    tok = tokenizer(SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    # Prompts spell it out, and the public tokenizers add it all the same.
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tok


def make_paligemma(path: Path, hub: bool, kind: str = "gemma") -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        kind: of the decoder, ``gemma`` or ``gemma2``.
    """
    if TRANSFORMERS < (5, 23):
        pytest.skip("compared with later releases alone")
    tok = paligemma_tokenizer()
    config = transformers.PaliGemmaConfig(
        vision_config=tiny_siglip(SIDE, PATCH),
        text_config={
            "model_type": kind,
            "vocab_size": len(tok) + 5,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **(_GEMMA2 if kind == "gemma2" else {}),
        },
        image_token_index=SPECIALS.index("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    # Embeddings are multiplied by 8. Larger ones would hide what attention adds.
    model = spread(transformers.PaliGemmaForConditionalGeneration(config), seed=5, embedding_std=0.05)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).to_dict()
    images |= {"image_processor_type": "SiglipImageProcessor", "image_seq_length": ROWS}
    if hub:
        tower = "vision_tower."
        rewrite_tensors(
            path,
            lambda tensors: {
                name.replace(tower, tower + "vision_model.", 1): value for name, value in tensors.items()
            },
        )
        written = json.loads((path / "config.json").read_text())
        written["text_config"].pop("use_bidirectional_attention", None)
        written.pop("tie_word_embeddings", None)
        (path / "config.json").write_text(json.dumps(written))
        as_on_the_hub(path, **images)
    else:
        (path / "preprocessor_config.json").write_text(json.dumps(images))
    return path


class PaliGemmaReference:
    """Transformers' model; ``rows`` of an image.

    Its processor puts ``<bos>`` behind the last image and a line feed to the end. Prompts spell both out.
    """

    def __init__(self, path: Path, rows: int = ROWS) -> None:
        self._rows = rows
        cls = transformers.PaliGemmaForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        self.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        self.images = transformers.SiglipImageProcessorPil.from_pretrained(path)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        ids, arguments = paligemma_arguments(prompt, self.tokenizer, self.images, self._rows)
        return Inputs(ids, self.model, arguments, answer_type=1)


def paligemma_arguments(
    prompt: CasePrompt, tok: Any, images: Any, rows: int
) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The tokens of a prompt, and what a model with PaliGemma's forward pass takes.

    Args:
        images: Transformers' image processor.
        rows: of an image.
    """
    ids = tok(prompt.text.replace("<image>", "<image>" * rows), return_tensors="pt").input_ids
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    arguments["token_type_ids"] = torch.zeros_like(ids)
    if prompt.pictures:
        made = images(list(prompt.pictures), return_tensors="pt")
        arguments["pixel_values"] = torch.as_tensor(made["pixel_values"])
    return ids[0].tolist(), arguments
