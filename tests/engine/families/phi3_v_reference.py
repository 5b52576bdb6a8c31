"""Phi-3.5-vision put together from Transformers' CLIP and Phi-3, and tiny checkpoints of it.

Transformers has no class for it. What joins the two is written here a second time, with loops instead of
views, from the description of the published model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import processors
from torch import nn

from engine.media.image_ops import CLIP_MEAN, CLIP_STD
from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import all_tensors
from tests.engine.tiny import spread, tokenizer

SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
    "<|image|>",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
UNIT, PATCH = 28, 7
#: Longest sequence with the short factors: some of the laws' prompts are longer, and no answer crosses it.
ORIGINAL = 80


def configuration(vocabulary: int, **fields: Any) -> dict[str, Any]:
    """A config.json like the public one, for a tiny model."""
    angles = 16 // 2
    return {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "torch_dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": ORIGINAL,
        "rms_norm_eps": 1e-5,
        "sliding_window": 262144,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + 0.02 * i for i in range(angles)],
            "long_factor": [1.1 + 0.7 * i for i in range(angles)],
        },
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {"name": "clip_vision_model", "image_dim_out": 32, "num_img_tokens": 4},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": UNIT,
            "patch_size": PATCH,
        },
        **fields,
    }


def _language(raw: Mapping[str, Any]) -> transformers.Phi3Config:
    """Phi-3's configuration; Transformers doesn't know longrope by its first name any more."""
    names = transformers.Phi3Config().to_dict().keys() - {"architectures", "model_type", "rope_parameters"}
    fields = {name: raw[name] for name in names if name in raw}
    rope = dict(raw.get("rope_scaling") or {})
    if rope.get("type") == "su":
        rope["type"] = "longrope"
    if rope:
        fields["rope_scaling"] = rope
    return transformers.Phi3Config(rope_theta=raw.get("rope_theta", 10000.0), **{"pad_token_id": 3, **fields})


class Phi3V(nn.Module):
    """The reference of the model that config.json ``raw`` describes."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        vision = raw["vision_config"]
        self.unit, self.side = vision["image_size"], vision["image_size"] // vision["patch_size"]
        self.tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(projection_dim=32, **vision))
        self.language = transformers.Phi3ForCausalLM(_language(raw))
        self.layer = (raw.get("img_processor") or {}).get("layer_idx", -2)
        self.width = vision["hidden_size"]
        hidden = self.language.config.hidden_size
        self.row_end = nn.Parameter(torch.zeros(4 * self.width))
        self.separator = nn.Parameter(torch.zeros(4 * self.width))
        self.project = nn.Sequential(nn.Linear(4 * self.width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def rows(self, image: Image.Image, num_crops: int) -> torch.Tensor:
        """Embedding rows of one image."""
        unit, side = self.unit, self.side
        canvas = canvas_of(image, num_crops, unit)
        pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        overview = F.interpolate(pixels[None], (unit, unit), mode="bicubic", align_corners=False)[0]
        down, across = pixels.shape[1] // unit, pixels.shape[2] // unit
        whole = torch.zeros(down * side, across * side, self.width)
        for i in range(down):
            for j in range(across):
                crop = pixels[:, i * unit : (i + 1) * unit, j * unit : (j + 1) * unit]
                whole[i * side : (i + 1) * side, j * side : (j + 1) * side] = self.features(crop)
        parts = [*self.lines(whole), self.separator, *self.lines(self.features(overview))]
        return self.project(torch.stack(parts))

    def features(self, crop: torch.Tensor) -> torch.Tensor:
        """The chosen layer's output, without the class token, as a square."""
        states = self.tower(crop[None], output_hidden_states=True).hidden_states[self.layer]
        return states[0, 1:].reshape(self.side, self.side, -1)

    def lines(self, picture: torch.Tensor) -> list[torch.Tensor]:
        """Vectors of four neighbours each, and the end of each line."""
        found = []
        for i in range(0, picture.shape[0], 2):
            for j in range(0, picture.shape[1], 2):
                corners = [picture[i, j], picture[i, j + 1], picture[i + 1, j], picture[i + 1, j + 1]]
                found.append(torch.cat(corners))
            found.append(self.row_end)
        return found

    @torch.inference_mode()
    def embeds(self, ids: list[int], pictures: dict[int, torch.Tensor]) -> torch.Tensor:
        """Embeddings ``(1, T, hidden)``; id ``-k`` stands for the rows of image ``k``."""
        table = self.language.model.embed_tokens.weight
        return torch.cat([pictures[-i] if i < 0 else table[i][None] for i in ids])[None]


def canvas_of(image: Image.Image, num_crops: int, unit: int = UNIT) -> Image.Image:
    """The image scaled to whole crops of ``unit`` pixels across, white above and below; upright ones are
    mirrored for it."""
    if image.width < image.height:
        return canvas_of(image.transpose(Image.TRANSPOSE), num_crops, unit).transpose(Image.TRANSPOSE)
    ratio = image.width / image.height
    across = max(n for n in range(1, num_crops + 1) if n == 1 or n * math.ceil(n / ratio) <= num_crops)
    width, height = across * unit, int(across * unit / ratio)
    down = math.ceil(height / unit)
    canvas = Image.new("RGB", (width, down * unit), "white")
    canvas.paste(image.resize((width, height), Image.BILINEAR), (0, int((down * unit - height) / 2)))
    return canvas


def make_phi3_v(
    path: Path, *, seed: int = 0, num_crops: int = 4, raw: Mapping[str, Any] | None = None
) -> Phi3V:
    """Write a tiny checkpoint under the public names; the reference that it holds.

    Args:
        raw: config.json; that of :func:`configuration` if not given.
    """
    tok = phi3_v_tokenizer()
    tok.save_pretrained(path)
    raw = raw or configuration(len(tok))
    model = spread(Phi3V(raw), seed=seed)
    save_file(hub_tensors(model), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(raw))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 6], "bos_token_id": 1}))
    (path / "preprocessor_config.json").write_text(json.dumps({"num_crops": num_crops}))
    return model


def phi3_v_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that, as Llama's, puts BOS before every text."""
    tok = tokenizer(
        SPECIALS, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tok.chat_template = TEMPLATE
    return tok


def hub_tensors(model: Phi3V) -> dict[str, torch.Tensor]:
    """All weights under the names, and in the shapes, of the public checkpoint."""
    shapes = {"row_end": (1, 1, 1, -1), "separator": (1, 1, -1)}
    return {
        _hub_name(name): value.view(shapes.get(name, value.shape)).contiguous().clone()
        for name, value in model.state_dict().items()
    }


def _hub_name(name: str) -> str:
    part, _, rest = name.partition(".")
    if part == "language":
        return rest
    prefix = "model.vision_embed_tokens."
    if part == "tower":
        return prefix + "img_processor.vision_model." + rest.removeprefix("vision_model.")
    if part == "project":
        return prefix + "img_projection." + rest
    return prefix + {"row_end": "sub_GN", "separator": "glb_GN"}[part]


class Phi3VReference:
    """The reference of a checkpoint on disk."""

    def __init__(self, path: Path, num_crops: int = 4) -> None:
        tensors = all_tensors(path)
        self.path, self.num_crops = path, num_crops
        self.model = Phi3V(json.loads((path / "config.json").read_text())).eval()
        own = self.model.state_dict()
        tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        self.model.load_state_dict(
            {name: {**tied, **tensors}[_hub_name(name)].view_as(value) for name, value in own.items()}
        )
        self.model.language.generation_config.update(eos_token_id=[2, 6], pad_token_id=3)

    def inputs(self, prompt: CasePrompt) -> Inputs:
        ids = reference_ids(self.path, prompt.text)
        rows = {i + 1: self.model.rows(image, self.num_crops) for i, image in enumerate(prompt.pictures)}
        embeds = self.model.embeds(ids, rows)
        expanded = [t for i in ids for t in ([None] * len(rows[-i]) if i < 0 else [i])]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return Inputs(expanded, self.model.language, {"inputs_embeds": embeds, "attention_mask": mask})


def reference_ids(path: Path, prompt: str) -> list[int]:
    """Each text between placeholders tokenised by itself, BOS included; ``-k`` for ``<|image_k|>``."""
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    ids: list[int] = []
    for index, piece in enumerate(re.split(r"<\|image_(\d+)\|>", prompt)):
        ids += [-int(piece)] if index % 2 else tok(piece).input_ids
    return ids
