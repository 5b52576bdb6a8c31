"""MiniCPM-V 2.6, 4.0 and 4.5 composed of Transformers' and torch's parts, one piece of an image at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.engine.families.case import CasePrompt, Inputs
from tests.engine.families.hub import all_tensors
from tests.engine.tiny import spread, tokenizer

IMAGE = "(<image>./</image>)"
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "</image>",
    "<slice>",
    "</slice>",
    "<image_id>",
    "</image_id>",
    "<unk>",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 49,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
#: Transformers' decoder of each version.
DECODERS = {2.6: "Qwen2", 4.0: "Llama", 4.5: "Qwen3"}
QUERIES, RESOLUTION, PATCH, MAX_SLICES = 4, 28, 7, 9


def multiple(length: float, unit: int) -> int:
    return max(round(length / unit) * unit, unit)


def best_size(width: float, height: float, resolution: int, patch: int, upscale: bool) -> tuple[int, int]:
    if upscale or width * height > resolution * resolution:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return multiple(width, patch), multiple(height, patch)


def best_grid(width: int, height: int, resolution: int, limit: int) -> tuple[int, int] | None:
    """Columns and rows."""
    area = min(math.ceil(width * height / (resolution * resolution)), limit)
    if area <= 1:
        return None
    best, smallest = (1, 1), math.inf
    for count in (area - 1, area, area + 1):
        if count == 1 or count > limit:
            continue
        for columns in range(1, count + 1):
            rows, rest = divmod(count, columns)
            error = abs(math.log(width / height) - math.log(columns / rows))
            if not rest and error < smallest:
                best, smallest = (columns, rows), error
    return best


def cut(
    image: Image.Image, resolution: int = RESOLUTION, patch: int = PATCH, limit: int = MAX_SLICES
) -> tuple[list[Image.Image], tuple[int, int] | None]:
    """The overview and the slices, and the grid."""
    width, height = image.size
    grid = best_grid(width, height, resolution, limit)
    overview = image.resize(
        best_size(width, height, resolution, patch, grid is None), Image.Resampling.BICUBIC
    )
    if grid is None:
        return [overview], None
    columns, rows = grid
    w, h = best_size(
        multiple(width, columns) / columns, multiple(height, rows) / rows, resolution, patch, True
    )
    large = image.resize((w * columns, h * rows), Image.Resampling.BICUBIC)
    boxes = [(x * w, y * h, x * w + w, y * h + h) for y in range(rows) for x in range(columns)]
    return [overview, *(large.crop(box) for box in boxes)], grid


def normalised(image: Image.Image) -> torch.Tensor:
    """``(3, height, width)``."""
    return torch.from_numpy((np.asarray(image).astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)


def placeholder(
    size: tuple[int, int],
    index: int,
    numbered: bool = True,
    limit: int = MAX_SLICES,
    queries: int = QUERIES,
    resolution: int = RESOLUTION,
) -> str:
    text = f"<image_id>{index}</image_id>" if numbered else ""
    rows = "<unk>" * queries
    text += f"<image>{rows}</image>"
    grid = best_grid(*size, resolution, limit)
    lines = [f"<slice>{rows}</slice>" * grid[0] for _ in range(grid[1])] if grid else []
    return text + "\n".join(lines)


def positions(width: int, height: int, channels: int) -> torch.Tensor:
    """``(height * width, channels)``, one number at a time."""
    quarter = channels // 4
    table = np.empty((height, width, channels), dtype=np.float32)
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float32) / quarter)
    for y in range(height):
        for x in range(width):
            angles = x * frequencies, y * frequencies
            table[y, x] = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)])
    return torch.from_numpy(table).flatten(0, 1)


def position_ids(width: int, height: int, side: int) -> torch.Tensor:
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    x, y = (
        torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(n, dtype=torch.int32)), bounds, right=True)
        for n in (width, height)
    )
    return torch.cat([row * side + x for row in y])


class Resampler(nn.Module):
    def __init__(self, queries: int, width: int, heads: int, features: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.kv_proj = nn.Linear(features, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, features: torch.Tensor, width: int, height: int) -> torch.Tensor:
        values = self.ln_kv(self.kv_proj(features))
        keys = values + positions(width, height, values.shape[1])
        rows, _ = self.attn(self.ln_q(self.query), keys, values, need_weights=False)
        return self.ln_post(rows) @ self.proj


class Reference(nn.Module):
    """The model that config.json ``raw`` describes."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        fields = {name: raw["vision_config"][name] for name in VISION}
        # The last layer is in no file if it is dropped.
        fields["num_hidden_layers"] -= bool(raw.get("drop_vision_last_layer", True))
        vision = transformers.SiglipVisionConfig(
            **fields,
            vision_use_head=False,
            layer_norm_eps=1e-6,
            hidden_act="gelu_pytorch_tanh",
        )
        self.vpm = transformers.SiglipVisionModel(vision)
        kind = DECODERS[raw["version"]]
        self.llm = getattr(transformers, f"{kind}ForCausalLM")(_language(raw, kind))
        width = self.llm.config.hidden_size
        self.resampler = Resampler(raw["query_num"], width, width // 128, vision.hidden_size)
        self.patch, self.table_side = vision.patch_size, vision.image_size // vision.patch_size

    def rows(self, piece: Image.Image) -> torch.Tensor:
        tower = getattr(self.vpm, "vision_model", self.vpm)
        width, height = piece.width // self.patch, piece.height // self.patch
        patches = tower.embeddings.patch_embedding(normalised(piece)[None]).flatten(2).transpose(1, 2)
        places = tower.embeddings.position_embedding(position_ids(width, height, self.table_side))
        features = tower.encoder(inputs_embeds=patches + places).last_hidden_state
        return self.resampler(tower.post_layernorm(features)[0], width, height)

    def embeds(self, ids: Sequence[int], images: Sequence[Image.Image], **options: Any) -> torch.Tensor:
        """Embeddings ``(1, T, hidden)``; ``options`` are those of :func:`cut`."""
        tokens = torch.tensor(ids)
        embeds = self.llm.get_input_embeddings()(tokens)
        if images:
            rows = torch.cat([self.rows(piece) for image in images for piece in cut(image, **options)[0]])
            embeds[tokens == SPECIALS.index("<unk>")] = rows
        return embeds[None]


def _language(raw: Mapping[str, Any], kind: str) -> Any:
    cls = getattr(transformers, f"{kind}Config")
    names = cls().to_dict().keys() - {"architectures", "model_type"}
    more = {name: raw[name] for name in ("rope_theta", "rope_scaling") if name in raw}
    return cls(**{name: raw[name] for name in names if name in raw}, **more)


def configuration(vocabulary: int, **fields: Any) -> dict[str, Any]:
    """A config.json like the public one, for a tiny model."""
    return {
        **TEXT,
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "version": 2.6,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rope_theta": 1e6,
        "query_num": QUERIES,
        "image_size": 448,
        "patch_size": PATCH,
        "drop_vision_last_layer": False,
        "batch_vision_input": True,
        "slice_mode": True,
        "slice_config": {"max_slice_nums": MAX_SLICES, "patch_size": PATCH, "model_type": "minicpmv"},
        "use_image_id": True,
        "torch_dtype": "float32",
        "vision_config": {**VISION, "model_type": "siglip"},
        **fields,
    }


def processor_configuration(**fields: Any) -> dict[str, Any]:
    """A preprocessor_config.json like the public one, for small images."""
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "max_slice_nums": MAX_SLICES,
        "scale_resolution": RESOLUTION,
        "patch_size": PATCH,
        "use_image_id": True,
        "image_feature_size": QUERIES,
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "slice_mode": True,
        "norm_mean": [0.5, 0.5, 0.5],
        "norm_std": [0.5, 0.5, 0.5],
        "version": 2.6,
        **fields,
    }


def make(path: Path, *, seed: int = 0, processor: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A checkpoint with the names and the configuration of the public one.

    Args:
        processor: fields of preprocessor_config.json that differ.
        config: fields of config.json that differ.
    """
    tok = minicpm_v_tokenizer()
    tok.save_pretrained(path)
    raw = configuration(len(tok), **config)
    model = spread(Reference(raw), seed=seed)
    with torch.no_grad():
        for weight in (model.resampler.attn.in_proj_weight, model.resampler.proj):
            weight /= model.llm.config.hidden_size**0.5
    tensors = {
        name.replace("vpm.vision_model.", "vpm.", 1): value.contiguous()
        for name, value in model.state_dict().items()
    }
    if raw["tie_word_embeddings"]:
        del tensors["llm.lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(raw))
    (path / "preprocessor_config.json").write_text(json.dumps(processor_configuration(**(processor or {}))))
    return path


def minicpm_v_tokenizer() -> transformers.PreTrainedTokenizerFast:
    tok = tokenizer(
        SPECIALS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
    )
    tok.chat_template = TEMPLATE
    return tok


def load(path: Path) -> Reference:
    tensors = all_tensors(path)
    tensors.setdefault("llm.lm_head.weight", tensors["llm.model.embed_tokens.weight"])
    model = Reference(json.loads((path / "config.json").read_text()))
    infix = "vision_model." if hasattr(model.vpm, "vision_model") else ""
    given = {name.replace("vpm.", "vpm." + infix, 1): tensor for name, tensor in tensors.items()}
    model.load_state_dict(given)
    return model.eval()


def prompt_ids(path: Path, prompt: str, images: Sequence[Image.Image], **options: Any) -> list[int]:
    """The prompt with its images written out, and tokenised whole."""
    first, *rest = prompt.split(IMAGE)
    assert len(rest) == len(images)
    text = first
    for index, (image, chunk) in enumerate(zip(images, rest, strict=True)):
        text += placeholder(image.size, index, **options) + chunk
    tok = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    return tok(text, add_special_tokens=False).input_ids


class MiniCPMVReference:
    """The model of a checkpoint on disk.

    Args:
        limit: most slices of an image; the checkpoint's if not given.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.path, self.model = path, load(path)
        self.model.llm.generation_config.update(eos_token_id=[2], pad_token_id=0)
        stated = json.loads((path / "preprocessor_config.json").read_text())
        self._cut = {"resolution": stated["scale_resolution"], "limit": limit or stated["max_slice_nums"]}
        self._numbered, self._queries = stated["use_image_id"], stated["image_feature_size"]

    def inputs(self, prompt: CasePrompt) -> Inputs:
        options = {**self._cut, "numbered": self._numbered, "queries": self._queries}
        ids = prompt_ids(self.path, prompt.text, prompt.pictures, **options)
        embeds = self.model.embeds(ids, prompt.pictures, patch=self.model.patch, **self._cut)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return Inputs([*ids], self.model.llm, {"inputs_embeds": embeds, "attention_mask": mask})
