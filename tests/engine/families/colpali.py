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
from tests.engine.families.paligemma import SPECIALS, paligemma_arguments, paligemma_tokenizer
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tiny_siglip

#: Numbers of a vector; rows of an image.
WIDTH, ROWS = 24, 9


def make_colpali(path: Path, hub: bool) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones."""
    tok = paligemma_tokenizer()
    config = transformers.ColPaliConfig(
        vlm_config={
            "model_type": "paligemma",
            "vision_config": tiny_siglip(21, 7),
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
        images = self.processor.image_processor
        ids, arguments = paligemma_arguments(prompt, self.tokenizer, images, self._rows)
        return Inputs(ids, self._vectors, arguments)

    @torch.inference_mode()
    def query(self, text: str) -> torch.Tensor:
        """The vectors of a text's tokens, as the processor shows it."""
        return self._run(self.processor.process_queries(text=[text]))

    def _run(self, made: Any) -> torch.Tensor:
        return self.model(**{name: value for name, value in made.items() if name != "labels"}).embeddings[0]
