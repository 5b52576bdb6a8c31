"""Tiny ColQwen2 checkpoints, and what Transformers makes of texts and images with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

from tests.engine.families import qwen
from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.tiny import make_qwen2_vl, rewrite_tensors, split_shards, spread

#: Numbers of a vector.
WIDTH = 24


def make_colqwen2(path: Path, hub: bool) -> Path:
    """A ColQwen2 checkpoint around the tiny Qwen2-VL, or Qwen2.5-VL.

    Args:
        hub: write it as public checkpoints are: tensors and rotary fields as earlier releases spelled them,
            with a head that nothing uses, and several shards. Then it is Qwen2.5-VL inside.
    """
    if hub:
        qwen.make_qwen2_5_vl(path)
    else:
        make_qwen2_vl(path)
    stated = json.loads((path / "config.json").read_text())
    config = transformers.ColQwen2Config(vlm_config=stated, embedding_dim=WIDTH)
    spread(transformers.ColQwen2ForRetrieval(config), seed=7).save_pretrained(path)
    if hub:
        rewrite_tensors(path, _as_on_the_hub)
        written = json.loads((path / "config.json").read_text())
        text = written["vlm_config"]["text_config"]
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": {**rope, "type": "default"}}
        (path / "config.json").write_text(json.dumps(written))
        split_shards(path)
    else:
        prefixes = {"visual_prompt_prefix": qwen.IMAGE + "Look!", "query_prefix": "Find: "}
        processor = json.loads((path / "preprocessor_config.json").read_text())
        (path / "preprocessor_config.json").unlink()
        (path / "processor_config.json").write_text(json.dumps({"image_processor": processor, **prefixes}))
    return path


def _as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {name.replace("vlm.", "vlm.model.", 1): tensor for name, tensor in tensors.items()}
    head = torch.zeros_like(renamed["vlm.model.language_model.embed_tokens.weight"])
    return {**renamed, "vlm.lm_head.weight": head}


class Vectors(torch.nn.Module):
    """The model in the form in which references are called: its vectors are the last hidden states."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *, output_hidden_states: bool, use_cache: bool, **arguments: Any) -> SimpleNamespace:
        vectors = self.model(**arguments).embeddings
        return SimpleNamespace(logits=vectors, hidden_states=[vectors])


class VectorsReference:
    """What references whose answers are vectors of tokens have in common."""

    processor: Any

    @torch.inference_mode()
    def document(self, image: Image.Image) -> torch.Tensor:
        return self._run(self.processor.process_images(images=[image]))

    def score(self, queries: Sequence[torch.Tensor], documents: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.processor.score_retrieval(list(queries), list(documents))

    def _run(self, made: Any) -> torch.Tensor:
        """The vectors of what the processor has made."""
        raise NotImplementedError


class ColQwen2Reference(VectorsReference):
    """Transformers' ColQwen2ForRetrieval and its processor."""

    def __init__(self, path: Path) -> None:
        self.model = transformers.ColQwen2ForRetrieval.from_pretrained(path, dtype=torch.float32).eval()
        self._vectors = Vectors(self.model)
        tok = PreTrainedTokenizerFast.from_pretrained(path)
        images = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
        stated = {}
        if (path / "processor_config.json").is_file():
            stated = json.loads((path / "processor_config.json").read_text())
            stated = {name: stated[name] for name in ("visual_prompt_prefix", "query_prefix")}
        self.processor = transformers.ColQwen2Processor(images, tok, **stated)
        plain = type("Plain", (transformers.Qwen2VLProcessor,), {"get_attributes": classmethod(_two)})
        self._plain = plain(images, tok)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        made = self._plain(text=[prompt.text], images=list(prompt.pictures) or None, return_tensors="pt")
        return self._inputs(dict(made.items()))

    @torch.inference_mode()
    def query(self, text: str) -> torch.Tensor:
        """The vectors of a text's tokens, as the processor shows it.

        Without the line feed that it puts behind a query since version 5: the model was trained without.
        """
        made = dict(self.processor.process_queries(text=[text]))
        assert self.processor.tokenizer.decode(made["input_ids"][0, -1]) == "\n"
        return self._run({name: value[:, :-1] for name, value in made.items()})

    def _run(self, made: Any) -> torch.Tensor:
        arguments = {name: value for name, value in made.items() if name != "labels"}
        if arguments.get("pixel_values") is not None:
            arguments["pixel_values"] = arguments["pixel_values"].flatten(0, 1)
        return self.model(**self._inputs(arguments).arguments).embeddings[0]

    def _inputs(self, made: dict[str, Any]) -> Inputs:
        """The arguments with the positions that the model inside gives them.

        ColQwen2ForRetrieval passes no ids to it, and images would have the positions of text.
        """
        ids, grid = made["input_ids"], made.get("image_grid_thw")
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if grid is not None:
            kinds = (ids == self.model.config.vlm_config.image_token_id).int()
            arguments["position_ids"] = self.model.vlm.get_rope_index(
                ids, image_grid_thw=grid, mm_token_type_ids=kinds, attention_mask=torch.ones_like(ids)
            )[0]
            patches = made["pixel_values"].split(grid.prod(-1).tolist())
            arguments["pixel_values"] = torch.nn.utils.rnn.pad_sequence(patches, batch_first=True)
            arguments["image_grid_thw"] = grid
        return Inputs(ids[0].tolist(), self._vectors, arguments)


def _two(cls: type) -> list[str]:
    """The attributes of a processor without its video half, which needs torchvision."""
    return ["image_processor", "tokenizer"]
