"""Tiny checkpoints with random weights, in Hugging Face layout, made by Transformers' own classes.

Weights are spread wide enough that logits depend on every part of the network: with the usual initialisation
they are nearly constant, and a wrong implementation goes unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

#: Major and minor number. References differ between releases; tests say so where it matters.
TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Sizes of the language model in tiny checkpoints, as fields of its config.json.
TEXT_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "describe this image in detail please",
    "what is shown in the picture? a red square on a blue background",
    "user assistant system human: hello world 0 1 2 3 4 5 6 7 8 9",
    "USER: ASSISTANT: You are a helpful assistant.\n",
]


def tokenizer(
    specials: Sequence[str], *, vocab_size: int = 320, words: Sequence[str] = (), **roles: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; ``specials`` get the first ids, in order; ``words`` are tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([*_CORPUS * 4, *list(words) * 99], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **roles)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB image."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8
    )
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


#: Makes a token's first expert weigh much more than its last. Which one is the last may change in bfloat16.
ROUTER_SCALE = 10.0
#: The same of routers whose scores are sigmoids, which are all 1 or 0 at that scale.
SIGMOID_ROUTER_SCALE = 2.0
#: What such a router adds to its scores.
CORRECTION_BIAS = "e_score_correction_bias"


def tiny_siglip(side: int, patch: int) -> dict[str, Any]:
    """Configuration of a SigLIP tower for images of ``side`` by ``side`` pixels."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": patch,
        "vision_use_head": False,
    }


def spread(model: torch.nn.Module, *, seed: int = 0, embedding_std: float = 1.0) -> torch.nn.Module:
    """Draw all weights anew: layers keep the scale of their input, norms and biases get noise."""
    generator = torch.Generator().manual_seed(seed)
    layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    experts, routers = (
        {
            id(parameter)
            for module in model.modules()
            if type(module).__name__.endswith(end)
            for parameter in module.parameters(recurse=False)
        }
        for end in ("Experts", "Router")
    )
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(CORRECTION_BIAS)}
    router_scale = SIGMOID_ROUTER_SCALE if biases else ROUTER_SCALE
    with torch.no_grad():
        for bias in biases.values():
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.3)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(CORRECTION_BIAS):
                # Ernie's, of scores that are shares of 1.
                parameter.copy_(noise * 0.1)
            elif name.endswith("A_log"):
                # A gated delta net remembers some tens of tokens, instead of none.
                parameter.copy_(noise * 0.5 - 3)
            elif id(parameter) in tables:
                parameter.copy_(noise * embedding_std)
            elif name.endswith("class_embedding"):
                # The only vector that models initialise at random.
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                fan_in = parameter[0].numel() if id(parameter) in weights else 1
                if id(parameter) in experts:
                    fan_in = parameter.shape[-1]
                if id(parameter) in routers:
                    fan_in = parameter.shape[-1] / router_scale**2
                parameter.copy_(noise * 1.3 / fan_in**0.5)
            else:
                parameter.add_(noise * 0.2)
    return model.eval()


def make_qwen2_vl(
    path: Path,
    *,
    tied: bool = False,
    gqa_ratio: int = 2,
    hub_names: bool = False,
    seed: int = 0,
    num_layers: int = 2,
    max_position: int = 1024,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Qwen2-VL checkpoint: 4 heads of 16, images of 4 to 64 rows of 8x8 pixels.

    Args:
        hub_names: write it as the public checkpoints are: flat config.json in the old spelling,
            preprocessor_config.json, and several shards with an index.
    """
    tok = tokenizer(QWEN_SPECIALS, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tok.chat_template = QWEN_TEMPLATE
    ids = {text: tok.convert_tokens_to_ids(text) for text in QWEN_SPECIALS}
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 4 // gqa_ratio,
            "max_position_embeddings": max_position,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 2,
            "mlp_ratio": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config)
    spread(model, seed=seed, embedding_std=0.05 if tied else 1.0)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.to(dtype).save_pretrained(path)
    tok.save_pretrained(path)
    image_processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    image_processor.save_pretrained(path)
    if hub_names:
        _as_on_the_hub(path)
    return path


def _as_on_the_hub(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("dtype", "model_type", "layer_types"):
        text.pop(key, None)
    config.update(text)
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["sliding_window"], config["use_sliding_window"] = 32768, False
    vision["in_chans"] = vision.pop("in_channels", 3)
    (path / "config.json").write_text(json.dumps(config))
    preprocessor = {
        "min_pixels": 256,
        "max_pixels": 4096,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    split_shards(path)


def split_shards(path: Path, count: int = 3) -> None:
    """Divide model.safetensors into ``count`` shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name].clone() for name in sorted(tensors)[number::count]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite_tensors(path: Path, change: Any) -> None:
    """Replace the tensors of an unsharded checkpoint by ``change(tensors)``."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(change(tensors), path / "model.safetensors", metadata={"format": "pt"})


def soften_experts(path: Path) -> None:
    """Scale down the results of a checkpoint's experts.

    In bfloat16 a router may choose another expert than in float32, which then matters less.
    """

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor * 0.05 if re.search(r"\.experts\..*down_proj", name) else tensor
            for name, tensor in tensors.items()
        }

    rewrite_tensors(path, change)


#: Positions of Ministral-3, with a context before scaling of a few tokens.
MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 64.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}

TEXT_ARCHITECTURES = (
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm",
    "glm4",
    "glm4_moe",
    "granite",
    "granitemoe",
    "hunyuan_v1_dense",
    "hyperclovax",
    "llama",
    "llama3",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "phi3_longrope",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
)

#: Kinds with gated delta nets, and all whose layers do not all have attention.
DELTA_NETS = ("qwen3_5", "qwen3_5_moe")
HYBRIDS = ("lfm2", "lfm3", *DELTA_NETS)

#: An LFM2 with short convolutions in every layer but two.
LFM2_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 120,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.1,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "conv_L_cache": 3,
    "conv_bias": True,
    "norm_eps": 1e-5,
    "layer_types": ["conv", "full_attention", "conv", "full_attention", "conv"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}

#: An LFM3 with layers of all kinds, whose heads rotate in part without a window.
LFM3_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "conv_L_cache": 7,
    "norm_eps": 1e-5,
    "sliding_window": 7,
    "layer_types": ["conv", "full_attention", "conv", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    },
}

#: A hybrid of Qwen3.5: three layers of four have a gated delta net, with two value heads for each key head.
QWEN3_5_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}


#: Fields of models with experts. Some layers of the Qwens have none, and experts have another number of
#: inputs than of outputs, which tells a matrix from its transpose.
_EXPERTS: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "head_dim": 32,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "cohere2_moe": {
        "logit_scale": 3.0,
        "head_dim": 16,
        "sliding_window": 7,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "prefix_dense_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_shared_experts": 2,
    },
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "qwen3_5_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
}


def make_text(path: Path, kind: str, *, seed: int = 0, vocab_size: int = 320, **overrides: Any) -> Path:
    """A text-only checkpoint of one of ``TEXT_ARCHITECTURES``."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        common["attention_bias"] = common["mlp_bias"] = True
    elif kind == "gemma":
        common["head_dim"] = 32
    elif kind == "gemma2":
        # Caps that scores and logits reach.
        common |= {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        }
    elif kind == "gemma3":
        common |= {
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        }
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        }
    elif kind == "gemma4":
        common |= {
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": vocab_size,
            "sliding_window": 7,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        }
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        }
    elif kind in ("cohere", "cohere2"):
        # Tied embeddings are small.
        common["logit_scale"] = 3.0
        if kind == "cohere2":
            common |= {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    elif kind == "exaone4":
        common |= {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
    elif kind == "olmo3":
        common |= {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "full_attention": {**scaling, "rope_theta": 10000.0},
        }
    elif kind in ("ernie4_5", "glm", "glm4", "seed_oss"):
        common["head_dim"] = 32
    elif kind == "hunyuan_v1_dense":
        common |= {"head_dim": 32, "attention_bias": True}
        # As public files spell a base that is raised once for all.
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 1.0, "alpha": 50.0}
    elif kind == "smollm3":
        common["no_rope_layers"] = [0, 1]
    elif kind in ("granite", "granitemoe", "hyperclovax"):
        common |= {"embedding_multiplier": 3.0, "logits_scaling": 2.5}
        common |= {"residual_multiplier": 0.4, "attention_multiplier": 0.5}
    elif kind == "ministral3":
        # Queries grow several times within a prompt.
        rope = {**MINISTRAL_ROPE}
        common["head_dim"] = 32
    elif kind == "mistral":
        common |= {"head_dim": 32, "sliding_window": 7}
    elif kind == "qwen3":
        common["head_dim"] = 32
    elif kind == "lfm2":
        common |= LFM2_TEXT
        rope = common.pop("rope_parameters")
    elif kind == "lfm3":
        common |= LFM3_TEXT
        rope = common.pop("rope_parameters")
    elif kind in DELTA_NETS:
        common |= QWEN3_5_TEXT
        rope = common.pop("rope_parameters")
    elif kind == "phi3_longrope":
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + 0.05 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
            "original_max_position_embeddings": 64,
        }
        common["original_max_position_embeddings"] = 64
    common |= _EXPERTS.get(kind, {})
    names = {"llama3": "Llama", "phi3_longrope": "Phi3", "granitemoe": "GraniteMoe"}
    names |= {"glm4_moe": "Glm4Moe", "cohere2_moe": "Cohere2Moe", "ernie4_5_moe": "Ernie4_5_Moe"}
    names |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
    names |= {"ernie4_5": "Ernie4_5", "seed_oss": "SeedOss", "smollm3": "SmolLM3"}
    names |= {"hunyuan_v1_dense": "HunYuanDenseV1", "hyperclovax": "HyperCLOVAX"}
    family = names.get(kind, kind.capitalize().replace("_moe", "Moe"))
    text = "Text" if kind in ("gemma3", "gemma4", *DELTA_NETS) else ""
    config_class = getattr(transformers, f"{family}{text}Config")
    config = config_class(**{**common, "rope_parameters": rope, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    tied = getattr(config, "tie_word_embeddings", False)
    spread(model, seed=seed, embedding_std=0.05 if tied else 1.0).save_pretrained(path)
    if kind == "qwen3_5_moe":
        soften_experts(path)
    specials = ["<pad>", "<s>", "</s>"]
    tokenizer(specials, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(path)
    return path


def reference_processor(path: Path) -> Any:
    """Transformers' Qwen2-VL processor without its video half, which needs torchvision."""
    cls = transformers.Qwen2VLProcessor
    image_only = type(
        cls.__name__, (cls,), {"get_attributes": classmethod(lambda c: ["image_processor", "tokenizer"])}
    )
    image_processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(path)
    tok = PreTrainedTokenizerFast.from_pretrained(path)
    return image_only(image_processor, tok)


def reference_inputs(path: Path, prompt: str, images: Sequence[Image.Image] = ()) -> dict[str, torch.Tensor]:
    """Return the inputs of Transformers' model for a rendered prompt, ``mm_token_type_ids`` included."""
    inputs = reference_processor(path)(text=[prompt], images=list(images) or None, return_tensors="pt")
    return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


def reference_model(path: Path) -> Any:
    """Transformers' Qwen2-VL in float32."""
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def rewrite_json(file: Path, change: dict[str, Any]) -> None:
    """Update the top-level fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_llava(
    path: Path, *, hub_names: bool = False, seed: int = 0, strategy: str = "default", text: str = "llama"
) -> Path:
    """A LLaVA-1.5 checkpoint: a CLIP of 3 layers of which 2 are used, crops of 30 pixels with 16 patches.

    Args:
        hub_names: write tensors under the names of the public checkpoints.
    """
    specials = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    tok = tokenizer(
        specials,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    tok.chat_template = LLAVA_TEMPLATE
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            # Not a multiple of the patch: the tower drops the rest.
            image_size=30,
            patch_size=7,
            projection_dim=32,
        ),
        text_config={
            "model_type": text,
            "vocab_size": len(tok),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 4,
        },
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        image_seq_length=16,
    )
    model = spread(transformers.LlavaForConditionalGeneration(config), seed=seed)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
    )
    processor = transformers.LlavaProcessor(
        image_processor,
        tok,
        patch_size=7,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    processor.save_pretrained(path)
    if hub_names:
        rewrite_tensors(path, lambda tensors: {_llava_hub_name(key): value for key, value in tensors.items()})
    return path


def _llava_hub_name(name: str) -> str:
    prefix = "vision_tower."
    return name.replace(prefix, prefix + "vision_model.", 1) if name.startswith(prefix) else name
