"""The vision transformer's options against Transformers' towers."""

from __future__ import annotations

import pytest
import torch
import transformers

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.distributed.group import SingleProcessGroup
from engine.families.parsing.fields import ACTIVATION_NAMES
from engine.families.parsing.tower import tower_rules
from engine.kernels.activation import ACTIVATIONS
from engine.layers.build import BuildContext
from engine.vision.segments import VisionSegments
from engine.vision.transformer import VisionTransformer
from engine.vision.transformer_config import VisionConfig
from engine.weights.loader import fill_from_checkpoint
from tests.engine.tiny import spread

BUILD = BuildContext(torch.device("cpu"), torch.float32, SingleProcessGroup())
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 20,
    "patch_size": 5,
}


def ours(path, reference, config: VisionConfig) -> VisionTransformer:
    reference.save_pretrained(path)
    (path / "config.json").touch()
    tower = VisionTransformer(config, BUILD)
    rules = WeightRules(
        language=(), vision=tower_rules(r"(?:vision_model\.)?", ""), ignore=(r".*position_ids",)
    )
    fill_from_checkpoint(tower, "vision", Checkpoint(path), rules)
    return tower


def run(tower: VisionTransformer, pixels: torch.Tensor, *, with_class: bool) -> torch.Tensor:
    patches = torch.nn.functional.unfold(pixels, 5, stride=5).transpose(1, 2)
    length = patches.shape[1] + with_class
    starts = torch.arange(0, len(pixels) * length + 1, length, dtype=torch.int32)
    with torch.inference_mode():
        return tower(patches.flatten(0, 1), VisionSegments(starts, length)).unflatten(0, (len(pixels), -1))


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))


def test_clip(tmp_path, pixels):
    reference = spread(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES)))
    config = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        patch_dim=75,
        norm_eps=1e-5,
        class_token=True,
        num_positions=17,
        pre_norm=True,
        post_norm=True,
    )
    tower = ours(tmp_path, reference, config)
    with torch.inference_mode():
        states = reference(pixels, output_hidden_states=True).hidden_states[-1]
        # CLIP normalises its class token alone; the norm itself is what is compared here.
        norm = next(m for name, m in reference.named_modules() if name.endswith("post_layernorm"))
        expected = norm(states)
    torch.testing.assert_close(run(tower, pixels, with_class=True), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_siglip(tmp_path, pixels, activation):
    raw = transformers.SiglipVisionConfig(**SIZES, hidden_act=activation, vision_use_head=False)
    reference = spread(transformers.SiglipVisionModel(raw))
    config = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        patch_dim=75,
        patch_bias=True,
        activation=activation,
        num_positions=16,
        post_norm=True,
    )
    with torch.inference_mode():
        expected = reference(pixels).last_hidden_state
    tower = ours(tmp_path, reference, config)
    torch.testing.assert_close(run(tower, pixels, with_class=False), expected, atol=1e-4, rtol=0)


def test_every_named_activation_exists():
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES.values())


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_names_of_activations_stand_for_what_transformers_computes(name):
    x = torch.linspace(-6, 6, 101)
    expected = transformers.activations.ACT2FN[name](x)
    torch.testing.assert_close(ACTIVATIONS[ACTIVATION_NAMES[name]](x), expected, atol=1e-6, rtol=1e-6)


def test_rms_norm_and_gated_mlp_as_in_qwen2_5_vl(tmp_path):
    """Full attention in every layer; the family's own tests cover this tower's windows."""
    raw = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0, 1],
        }
    ).vision_config
    cls = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock
    raw._attn_implementation = "sdpa"
    reference = spread(cls(raw))
    config = VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        patch_dim=96,
        activation="silu",
        gated_mlp=True,
        norm="rms",
        rope_theta=10000.0,
    )
    tower = VisionTransformer(config, BUILD)
    block = tower.blocks[0]
    tensors = {f"blocks.0.{name}": value.contiguous() for name, value in reference.state_dict().items()}
    from safetensors.torch import save_file

    save_file({**tensors, "patch_embed.weight": torch.zeros(32, 96)}, tmp_path / "model.safetensors")
    rules = WeightRules(language=(), vision=((r"(.*)", r"\1"),))
    fill_from_checkpoint(tower, "vision", Checkpoint(tmp_path), rules)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 12, 20], dtype=torch.int32)
    angles = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    doubled = torch.cat([angles, angles], dim=1)
    with torch.inference_mode():
        expected = reference(
            x, cu_seqlens=starts, max_seqlen=12, position_embeddings=(doubled.cos(), doubled.sin())
        )
        segments = VisionSegments(starts, 12, angles.cos(), angles.sin())
        branch, residual = block(x, None, segments, torch.arange(20))
        result = branch + residual
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
