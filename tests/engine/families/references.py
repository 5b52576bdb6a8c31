"""Transformers' LLaVA-1.5 and text models, as references of the laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.tiny import HYBRIDS, make_llava, make_text, split_shards


def make_llava_1_5(path: Path, hub: bool, **variant: str) -> None:
    make_llava(path, hub_names=hub, **variant)
    if hub:
        as_on_the_hub(
            path,
            image_processor_type="CLIPImageProcessor",
            processor_class="LlavaProcessor",
            size={"shortest_edge": 30},
            crop_size={"height": 30, "width": 30},
            do_center_crop=True,
            resample=3,
        )


class ImagesReference:
    """A model of Transformers, and its processor of texts with images."""

    def __init__(self, model: torch.nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        arguments = dict(self.processor(text=prompt.text, images=pictures, return_tensors="pt"))
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)


class LlavaReference(ImagesReference):
    def __init__(self, path: Path) -> None:
        cls = transformers.LlavaForConditionalGeneration
        model = cls.from_pretrained(path, dtype=torch.float32).eval()
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(
            path, extra_special_tokens={"image_token": "<image>"}
        )
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil.from_pretrained(path),
            tok,
            patch_size=model.config.vision_config.patch_size,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
        )
        super().__init__(model, processor)


def with_scaled_logits(model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with the logits of its text model: divided where that is a Granite, multiplied in a Cohere.

    Transformers 5's classes of LLaVA, Aya Vision and Command A Vision have a head of their own and leave this
    out.
    """
    text = model.config.text_config
    factor = getattr(text, "logit_scale", 1) / getattr(text, "logits_scaling", 1)
    if factor != 1:
        model.lm_head.register_forward_hook(lambda head, given, logits: logits * factor)
    return model


#: Command R has no norms of queries and keys, Command R+ has; and Cohere's experts differ.
_HUB_FIELDS: dict[str, dict[str, Any]] = {
    "cohere": {"use_qk_norm": True},
    "cohere2_moe": {
        "rms_norm_eps": 1e-5,
        "expert_selection_fn": "sigmoid",
        "shared_expert_combination_strategy": "sum",
        "prefix_dense_sliding_window_pattern": 2,
    },
}


def make_text_model(path: Path, hub: bool, kind: str) -> None:
    if kind == "cohere2_moe" and not hasattr(transformers, "Cohere2MoeConfig"):
        pytest.skip("this release of Transformers has no Cohere 2 with experts")
    if kind == "lfm3" and not hasattr(transformers, "Lfm3Config"):
        pytest.skip("this release of Transformers has no LFM3")
    make_text(path, kind, seed=7, **(_HUB_FIELDS.get(kind, {}) if hub else {}))
    if not hub:
        return
    if kind in HYBRIDS:
        config = json.loads((path / "config.json").read_text())
        kinds = config.pop("layer_types")
        if kind == "lfm3":
            # As published; Transformers saves the layers' names otherwise.
            config["layer_types"] = kinds
        if kind == "lfm2":
            config["full_attn_idxs"] = [layer for layer, mixer in enumerate(kinds) if mixer != "conv"]
            config["block_ff_dim"], config["intermediate_size"] = config["intermediate_size"], 48
            config["tie_embedding"], config["theta"] = config.pop("tie_word_embeddings"), 10000.0
        (path / "config.json").write_text(json.dumps(config))
        split_shards(path)
        return
    if kind == "gemma4":
        # Public files have the spelling of Transformers 5.
        split_shards(path)
        return
    if kind == "olmo3":
        config = json.loads((path / "config.json").read_text())
        full = config.pop("rope_parameters")["full_attention"]
        config |= {"rope_theta": full.pop("rope_theta"), "rope_scaling": full}
        (path / "config.json").write_text(json.dumps(config))
    if kind == "gemma3":
        config = json.loads((path / "config.json").read_text())
        ropes = config.pop("rope_parameters")
        config |= {
            "rope_local_base_freq": ropes["sliding_attention"]["rope_theta"],
            "sliding_window_pattern": 2,
        }
        config |= {"rope_parameters": ropes["full_attention"]}
        del config["tie_word_embeddings"]
        (path / "config.json").write_text(json.dumps(config))
    as_on_the_hub(path)


class TextReference:
    def __init__(self, path: Path) -> None:
        cls, options = transformers.AutoModelForCausalLM, {}
        if getattr(transformers.AutoConfig.from_pretrained(path), "attn_logit_softcapping", None):
            # Transformers 5.17's Gemma 2 chooses SDPA, which leaves the cap out; 5.23's chooses this.
            options["attn_implementation"] = "eager"
        self.model = cls.from_pretrained(path, dtype=torch.float32, **options).eval()
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        ids = self.tokenizer(prompt.text, return_tensors="pt").input_ids
        # Without a mask, generation would leave out what looks like padding.
        arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return Inputs(ids[0].tolist(), self.model, arguments)
