"""Tiny checkpoints of Aya Vision and Command A Vision, and Transformers' processing of their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.got_ocr2 import image_processor as got_image_processor
from tests.engine.families.hub import as_on_the_hub, under_vision_model
from tests.engine.families.references import with_scaled_logits
from tests.engine.families.without_torchvision import WithoutTorchvision, imported
from tests.engine.tiny import TEXT_SIZES, rewrite_json, rewrite_tensors, spread, tiny_siglip, tokenizer

TOKENS = {
    "image_token": "<|IMG_PATCH|>",
    "boi_token": "<|START_OF_IMG|>",
    "img_line_break_token": "<|IMG_LINE_BREAK|>",
    "eoi_token": "<|END_OF_IMG|>",
}
SPECIALS = ("<PAD>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>", *TOKENS.values())
FRAME = "<BOS_TOKEN><|START_OF_TURN_TOKEN|>{}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
#: What stands for an image in a prompt.
IMAGES = {"AyaVision": "<image>", "Cohere2Vision": TOKENS["image_token"]}
ROW = SPECIALS.index(TOKENS["image_token"])
SIDE, PATCH = 24, 6


def aya_tokenizer() -> Any:
    return tokenizer(
        SPECIALS, eos_token="<|END_OF_TURN_TOKEN|>", pad_token="<PAD>", extra_special_tokens=TOKENS
    )


def make_aya_vision(
    path: Path,
    hub: bool = False,
    *,
    kind: str = "AyaVision",
    text: str = "cohere2",
    processor: dict[str, Any] | None = None,
    **fields: Any,
) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones: 4 rows a crop.

    Args:
        kind: the beginning of the class names in Transformers.
        text: the decoder's ``model_type``.
        processor: further fields of the image processor.
        fields: further fields of config.json.
    """
    tok = aya_tokenizer()
    windows = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tiny_siglip(SIDE, PATCH),
        text_config={
            "model_type": text,
            "vocab_size": len(tok),
            **TEXT_SIZES,
            **(windows if text == "cohere2" else {}),
            "logit_scale": 3.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        **{"AyaVision": {"image_token_index": ROW}, "Cohere2Vision": {"image_token_id": ROW}}[kind],
        alignment_intermediate_size=40,
        tie_word_embeddings=hub,
        **fields,
    )
    model = spread(
        getattr(transformers, f"{kind}ForConditionalGeneration")(config),
        seed=31,
        embedding_std=0.05 if hub else 1.0,
    )
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = {
        "image_processor_type": f"{'GotOcr2' if kind == 'AyaVision' else kind}ImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "max_patches": 6,
        **({} if kind == "AyaVision" else {"patch_size": SIDE // PATCH // 2}),
        **(processor or {}),
    }
    (path / "preprocessor_config.json").write_text(json.dumps(images))
    if hub:
        rewrite_tensors(path, under_vision_model)
        if text == "cohere2":
            stated = json.loads((path / "config.json").read_text())["text_config"]
            rewrite_json(path / "config.json", {"text_config": {**stated, "sliding_window_pattern": 2}})
        as_on_the_hub(path, **images)
    return path


def image_processor(path: Path, kind: str) -> Any:
    """Transformers' image processor of a checkpoint, with Pillow."""
    if kind == "AyaVision":
        return got_image_processor().from_pretrained(path)
    (module,) = imported("cohere2_vision.image_processing_cohere2_vision")
    both = type("Cohere2VisionImageProcessor", (module.Cohere2VisionImageProcessor, WithoutTorchvision), {})
    return both(**json.loads((path / "preprocessor_config.json").read_text()))


class AyaVisionReference:
    """Transformers' model and processor, with the scale of logits that its model leaves out.

    Args:
        kind: as of :func:`make_aya_vision`.
        options: of the images' processor.
    """

    def __init__(self, path: Path, kind: str = "AyaVision", **options: Any) -> None:
        self.options = options
        cls = getattr(transformers, f"{kind}ForConditionalGeneration")
        self.model = with_scaled_logits(cls.from_pretrained(path, dtype=torch.float32).eval())
        tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        images, fields = image_processor(path, kind), {}
        if kind == "AyaVision":
            tower = self.model.config.vision_config
            fields = {"patch_size": tower.patch_size, "img_size": tower.image_size}
            fields["downsample_factor"] = self.model.config.downsample_factor
        self.processor = getattr(transformers, f"{kind}Processor")(images, tok, **fields)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        pictures = list(prompt.pictures) or None
        arguments = dict(
            self.processor(text=prompt.text, images=pictures, return_tensors="pt", **self.options)
        )
        arguments.pop("num_patches", None)
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)
