"""A tiny Molmo 2 checkpoint, and Transformers' model and processor of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedTokenizerFast

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.without_torchvision import WithoutTorchvision, imported
from tests.engine.tiny import rewrite_tensors, split_shards, spread, tokenizer

#: In pixels. torch has another way to resize to sides that are 128 together, or fewer.
PATCH, SIDE = 14, 70
IMAGE, VIDEO = "<|image|>", "<|video|>"
HAS_MOLMO2 = hasattr(transformers, "Molmo2Config")
FRAME = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PICTURES = (
    *("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>"),
    *("<frame_start>", "<frame_end>", "<im_low>", IMAGE, VIDEO),
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
#: Crops of 5x5 patches of which 1 at the left and upper and 1 at the other side are shared.
PROCESSOR: dict[str, Any] = {
    "size": {"height": SIDE, "width": SIDE},
    "patch_size": PATCH,
    "overlap_margins": [1, 1],
    "pooling_size": [2, 2],
    "max_crops": 4,
}
#: Of frames; windows of 3x3 patches don't fill them. Without the first two Transformers leaves bytes as they
#: are.
VIDEOS: dict[str, Any] = {
    "do_rescale": True,
    "do_normalize": True,
    "size": {"height": SIDE, "width": SIDE},
    "patch_size": PATCH,
    "pooling_size": [3, 3],
}


def make_molmo2(path: Path, hub: bool, olmo: bool = False) -> Path:
    """A checkpoint whose tokens of images have embeddings, but no logits.

    Args:
        hub: config.json in the spelling of the first releases, whose tower has more layers than the weights;
            columns of the whole image without tokens, and of frames with them; and several shards.
        olmo: norms behind attention and MLP and over all heads, and scaling of angles in one of the layers.
    """
    if not HAS_MOLMO2:
        pytest.skip("this release of Transformers has no Molmo 2")
    tok = molmo_tokenizer()
    first = tok.convert_tokens_to_ids(PICTURES[0])
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "image_size": [SIDE, SIDE],
        "patch_size": PATCH,
    }
    adapter = {
        "vision_feature_layer": [2, 0],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 40,
        "text_hidden_size": 64,
        "mlp_bias": not hub,
    }
    config = transformers.Molmo2Config(
        text_config={
            "vocab_size": first,
            "additional_vocab_size": len(tok) - first,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "attention_bias": not hub,
            **(_OLMO if olmo else {}),
        },
        vision_config=vision,
        adapter_config=adapter,
        image_patch_id=tok.convert_tokens_to_ids("<im_patch>"),
    )
    model = transformers.Molmo2ForConditionalGeneration(config)
    spread(model, seed=8)
    with torch.no_grad():
        # No norm comes before it.
        model.model.multi_modal_projector.image_projector.down_proj.weight *= 0.08
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tok.save_pretrained(path)
    texts = {"use_single_crop_col_tokens": False, "video_use_col_tokens": True} if hub else {}
    images = {"image_processor_type": "Molmo2ImageProcessor", **PROCESSOR}
    videos = {"video_processor_type": "Molmo2VideoProcessor", **VIDEOS}
    stated = {"image_processor": images, "video_processor": videos, **texts}
    (path / "processor_config.json").write_text(json.dumps(stated))
    if hub:
        _as_on_the_hub(path, first)
    return path


_OLMO: dict[str, Any] = {
    "norm_after": True,
    "qk_norm_type": "olmo",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "rope_scaling_layers": [1],
}


def molmo_tokenizer() -> PreTrainedTokenizerFast:
    """Its last tokens are those of images."""
    tok = tokenizer(SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>")
    tok.add_tokens([transformers.AddedToken(text, special=True, normalized=False) for text in PICTURES])
    return tok


def _as_on_the_hub(path: Path, first: int) -> None:
    config = json.loads((path / "config.json").read_text())
    vision, adapter = config.pop("vision_config"), config["adapter_config"]
    for old, new in (("image_size", "image_default_input_size"), ("patch_size", "image_patch_size")):
        vision[new] = vision.pop(old)
    vision["image_num_pos"] = vision.pop("num_position_embeddings")
    vision["num_hidden_layers"] += 2
    adapter["vit_layers"] = [
        index - vision["num_hidden_layers"] for index in adapter.pop("vision_feature_layer")
    ]
    text = config["text_config"]
    text["qkv_bias"], text["layer_norm_eps"] = text.pop("attention_bias"), text.pop("rms_norm_eps")
    scaling = text.pop("rope_parameters")
    text["rope_theta"] = scaling.pop("rope_theta")
    text["rope_scaling"] = scaling if text["norm_after"] else None
    if not text["norm_after"]:
        text["rope_scaling_layers"] = None
    (path / "config.json").write_text(json.dumps({**config, "vit_config": vision}))

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = [f"model.transformer.wte.{name}" for name in ("embedding", "new_embedding")]
        table = torch.cat([tensors.pop(name) for name in names])
        return {**tensors, names[0]: table[:first].clone(), names[1]: table[first:].clone()}

    rewrite_tensors(path, change)
    split_shards(path)


class _Images(WithoutTorchvision):
    """Images are resized without antialiasing by torch, as torchvision does it."""

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        before = torch.get_num_threads()
        # With one thread torch takes another kernel, which rounds in other places.
        torch.set_num_threads(2)
        try:
            return F.interpolate(image, (size.height, size.width), mode="bilinear", align_corners=False)
        finally:
            torch.set_num_threads(before)


def image_processor_of(path: Path, **options: Any) -> Any:
    """Transformers' image processor of a checkpoint, with ``options``."""
    (images,) = imported("molmo2.image_processing_molmo2")
    both = type("Molmo2ImageProcessor", (_Images, images.Molmo2ImageProcessor), {})
    return both(**{**json.loads((path / "processor_config.json").read_text())["image_processor"], **options})


def video_processor_of(path: Path) -> Any:
    """Transformers' video processor of a checkpoint."""
    (videos,) = imported("molmo2.video_processing_molmo2")
    both = type("Molmo2VideoProcessor", (_Images, videos.Molmo2VideoProcessor), {})
    return both(**json.loads((path / "processor_config.json").read_text()).get("video_processor", {}))


def processor_of(path: Path, **options: Any) -> Any:
    """Transformers' processor of a checkpoint, with ``options`` of its image processor."""
    (texts,) = imported("molmo2.processing_molmo2")
    stated = json.loads((path / "processor_config.json").read_text())
    del stated["image_processor"]
    stated.pop("video_processor", None)

    class Processor(texts.Molmo2Processor):
        """Of classes that don't need torchvision."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> None:
            pass

    tok = PreTrainedTokenizerFast.from_pretrained(path)
    return Processor(image_processor_of(path, **options), video_processor_of(path), tok, **stated)


class Molmo2Reference:
    """Transformers' model and processor."""

    def __init__(self, path: Path, **options: Any) -> None:
        cls = transformers.Molmo2ForConditionalGeneration
        self.model = cls.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = processor_of(path, **options)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in prompt.frames] or [0])
        arguments = dict(
            self.processor(
                text=[prompt.text],
                images=list(prompt.pictures) or None,
                videos=[frames] if prompt.frames else None,
                do_sample_frames=False,
                return_tensors="pt",
            )
        )
        if prompt.pictures and prompt.frames:
            video_first = prompt.text.index(VIDEO) < prompt.text.index(IMAGE)
            arguments = _together(arguments, video_first)
        known = self.model.config.text_config.vocab_size
        # Tokens of images have no logits.
        ids = [token if token < known else None for token in arguments["input_ids"][0].tolist()]
        return Inputs(ids, self.model, arguments)


def _together(arguments: dict[str, Any], video_first: bool) -> dict[str, Any]:
    """The arguments of images beside a video with the frames as images, which the model computes alike: it
    refuses to be given both, and so gives them no order."""
    frames, lines, columns = arguments.pop("video_grids")[0].tolist()
    parts = [
        (arguments["pixel_values"], arguments["image_token_pooling"], arguments["image_grids"]),
        (
            arguments.pop("pixel_values_videos"),
            arguments.pop("video_token_pooling"),
            torch.tensor([[frames * lines, columns, 0, 0]]),
        ),
    ]
    (first, windows, grids), (second, others, more) = parts[::-1] if video_first else parts
    others = torch.where(others < 0, others, others + first.shape[0] * first.shape[1])
    width = max(windows.shape[1], others.shape[1])
    pooling = [F.pad(each, (0, width - each.shape[1]), value=-1) for each in (windows, others)]
    del arguments["image_num_crops"]
    return arguments | {
        "pixel_values": torch.cat([first, second]),
        "image_token_pooling": torch.cat(pooling),
        "image_grids": torch.cat([grids, more]),
    }
