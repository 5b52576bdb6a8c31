"""Tiny ColPali checkpoints, and what Transformers makes of texts and images with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.colqwen2 import Vectors, VectorsReference
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

SPECIALS = ("<pad>", "<eos>", "<bos>", "<image>")
#: Numbers of a vector; rows of an image.
WIDTH, ROWS = 24, 9


def make_colpali(path: Path, hub: bool) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones."""
    tok = tokenizer(SPECIALS, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    config = transformers.ColPaliConfig(
        vlm_config={
            "model_type": "paligemma",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 21,
                "patch_size": 7,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "gemma",
                "vocab_size": len(tok) + 5,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 32,
                "max_position_embeddings": 512,
            },
            "image_token_index": SPECIALS.index("<image>"),
            "projection_dim": 64,
        },
        embedding_dim=WIDTH,
    )
    # Embeddings are multiplied by 8. Larger ones would hide what attention adds.
    model = spread(transformers.ColPaliForRetrieval(config), seed=9, embedding_std=0.1)
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = transformers.SiglipImageProcessorPil(size={"height": 21, "width": 21}).to_dict()
    images |= {"image_processor_type": "SiglipImageProcessor", "image_seq_length": ROWS}
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    if hub:
        rewrite_tensors(path, _as_on_the_hub)
        written = json.loads((path / "config.json").read_text())
        text = written["vlm_config"]["text_config"]
        text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"], "hidden_act": "gelu"}
        text.pop("use_bidirectional_attention", None)
        (path / "config.json").write_text(json.dumps(written))
        split_shards(path)
    else:
        prefixes = {"visual_prompt_prefix": "Look!", "query_prefix": "Find: "}
        (path / "processor_config.json").write_text(json.dumps(prefixes))
    return path


def _as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the names of the public checkpoints, with a head that nothing uses."""
    tower = "vlm.vision_tower."
    renamed = {name.replace(tower, tower + "vision_model.", 1): value for name, value in tensors.items()}
    return {**renamed, "vlm.language_model.lm_head.weight": torch.zeros(3)}


class ColPaliReference(VectorsReference):
    """Transformers' ColPaliForRetrieval and its processor; ``rows`` of an image."""

    def __init__(self, path: Path, rows: int = ROWS) -> None:
        self._rows = rows
        self.model = transformers.ColPaliForRetrieval.from_pretrained(path, dtype=torch.float32).eval()
        self._vectors = Vectors(self.model)
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        # Its processor asks the tokenizer not to add what the prompts spell out.
        self.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        images = transformers.SiglipImageProcessorPil.from_pretrained(path)
        images.image_seq_length = rows
        stated = {}
        if (path / "processor_config.json").is_file():
            stated = json.loads((path / "processor_config.json").read_text())
        self.processor = transformers.ColPaliProcessor(images, self.tokenizer, **stated)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        text = prompt.text.replace("<image>", "<image>" * self._rows)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        arguments["token_type_ids"] = torch.zeros_like(ids)
        if prompt.pictures:
            made = self.processor.image_processor(list(prompt.pictures), return_tensors="pt")
            arguments["pixel_values"] = torch.as_tensor(made["pixel_values"])
        return Inputs(ids[0].tolist(), self._vectors, arguments)

    @torch.inference_mode()
    def query(self, text: str) -> torch.Tensor:
        """The vectors of a text's tokens, as the processor shows it."""
        return self._run(self.processor.process_queries(text=[text]))

    def _run(self, made: Any) -> torch.Tensor:
        return self.model(**{name: value for name, value in made.items() if name != "labels"}).embeddings[0]
