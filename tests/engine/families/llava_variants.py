"""Tiny LLaVA checkpoints with other towers and image processors than LLaVA-1.5's, and their references."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import as_on_the_hub
from tests.engine.families.references import with_scaled_logits
from tests.engine.tiny import TEXT_SIZES, spread, tokenizer

SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
_TOWER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
#: Not a multiple of the patch: the tower drops the rest.
_SQUARE = {**_TOWER, "intermediate_size": 64, "image_size": 30, "patch_size": 7}
TOWERS = {
    "clip": lambda: transformers.CLIPVisionConfig(**_SQUARE, projection_dim=32),
    "siglip": lambda: transformers.SiglipVisionConfig(**_SQUARE),
    "pixtral": lambda: transformers.PixtralVisionConfig(
        **_TOWER, intermediate_size=48, image_size=64, patch_size=8, hidden_act="silu"
    ),
}
PROCESSORS = {
    "CLIP": {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}},
    "Siglip": {"size": {"height": 30, "width": 30}},
    "Llava": {"size": {"shortest_edge": 30}, "crop_size": {"height": 30, "width": 30}, "do_pad": True},
    "Pixtral": {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
}


def make_llava_variant(
    path: Path,
    hub: bool = False,
    *,
    tower: str = "clip",
    processor: str = "CLIP",
    layer: int | list[int] = -2,
    strategy: str = "full",
    text: str = "llama",
    **options: Any,
) -> Path:
    """A checkpoint as Transformers saves it, or in the layout of the public ones.

    Args:
        processor: the image processor's class, without its ending; ``options`` are fields of it.
    """
    tok = tokenizer(SPECIALS, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    config = transformers.LlavaConfig(
        vision_config=TOWERS[tower](),
        text_config={
            "model_type": text,
            "vocab_size": len(tok),
            **TEXT_SIZES,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 4,
        },
        image_token_index=SPECIALS.index("[IMG]" if tower == "pixtral" else "<image>"),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    model = spread(transformers.LlavaForConditionalGeneration(config), seed=11)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tok.save_pretrained(path)
    images = image_processor_class(processor)(**{**PROCESSORS[processor], **options})
    images.save_pretrained(path)
    if hub:
        as_on_the_hub(path, **images.to_dict())
    return path


def image_processor_class(kind: str) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")


class LlavaVariantReference:
    """Transformers' model and image processor; placeholders are expanded as its processors do."""

    def __init__(self, path: Path) -> None:
        cls = transformers.LlavaForConditionalGeneration
        self.model = with_scaled_logits(cls.from_pretrained(path, dtype=torch.float32).eval())
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
        stated, _ = transformers.CLIPImageProcessorPil.get_image_processor_dict(path)
        kind = stated["image_processor_type"].removesuffix("ImageProcessor")
        self.images = image_processor_class(kind).from_pretrained(path)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        arguments: dict[str, torch.Tensor] = {}
        text = prompt.text
        if prompt.pictures:
            given = self.images(list(prompt.pictures), return_tensors="pt")
            config = self.model.config
            token = SPECIALS[config.image_token_id]
            pieces = text.split(token)
            text = pieces[0]
            for index, piece in enumerate(pieces[1:]):
                text += self.placeholder(given, index, token) + piece
            arguments = {name: torch.as_tensor(value) for name, value in given.items()}
        made = self.tokenizer(text, return_tensors="pt")
        arguments |= {name: made[name] for name in ("input_ids", "attention_mask")}
        return Inputs(arguments["input_ids"][0].tolist(), self.model, arguments)

    def placeholder(self, given: Any, index: int, token: str) -> str:
        config = self.model.config
        patch = config.vision_config.patch_size
        if config.vision_config.model_type == "pixtral":
            # As PixtralProcessor, which can't be imported without torchvision.
            height, width = (int(side) // patch for side in given["image_sizes"][index])
            return "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"
        described = SimpleNamespace(
            patch_size=patch,
            image_token=token,
            num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return transformers.LlavaProcessor.replace_image_token(described, given, index)
