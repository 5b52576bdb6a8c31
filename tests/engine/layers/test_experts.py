"""Mixtures of experts that no family has yet, against Transformers' own layers; and the shares of ranks."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import transformers
from safetensors.torch import save_file

from engine.checkpoint.folder import Checkpoint
from engine.checkpoint.rules import WeightRules
from engine.distributed.group import SingleProcessGroup
from engine.errors import CheckpointError, ConfigError
from engine.families.load import load_language_model
from engine.families.registry import resolve
from engine.fit import check_split
from engine.kernels import dispatch
from engine.kernels.router_config import RouterConfig
from engine.layers.build import BuildContext
from engine.layers.experts import ExpertsMLP
from engine.layers.experts_config import ExpertsConfig
from engine.layers.split_experts import SplitExperts
from engine.weights.loader import fill_from_checkpoint
from tests.engine.families.opened import parse
from tests.engine.tiny import make_text, rewrite_json, rewrite_tensors, spread

CPU = torch.device("cpu")


class Rank(SingleProcessGroup):
    """A rank whose results are not added up."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def load(path, tp=None):
    checkpoint = Checkpoint.open(str(path))
    config = resolve(checkpoint).parse(checkpoint)
    return load_language_model(checkpoint, config, device=CPU, dtype=torch.float32, tp=tp)


@pytest.mark.parametrize(("groups", "kept", "renormalised"), [(1, 1, True), (4, 2, False)])
def test_a_router_of_glm_is_that_of_transformers(tmp_path, groups, kept, renormalised):
    """Sigmoid, correction bias, groups, a factor, and a shared expert without a gate."""
    theirs = import_module("transformers.models.glm4_moe.modeling_glm4_moe").Glm4MoeMoE(
        transformers.Glm4MoeConfig(
            hidden_size=32,
            moe_intermediate_size=24,
            n_routed_experts=16,
            num_experts_per_tok=5,
            n_group=groups,
            topk_group=kept,
            norm_topk_prob=renormalised,
            routed_scaling_factor=1.7,
            n_shared_experts=2,
        )
    )
    spread(theirs)
    theirs.gate.e_score_correction_bias.copy_(torch.randn(16))
    tensors = {
        name.replace("shared_experts", "shared_expert"): value.contiguous()
        for name, value in theirs.state_dict().items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    router = RouterConfig(
        16,
        5,
        "sigmoid",
        renormalise=renormalised,
        scaling=1.7,
        correction_bias=True,
        num_groups=groups,
        top_groups=kept,
    )
    config = ExpertsConfig(router, 24, (0,), shared_size=48)
    ours = ExpertsMLP(32, config, "silu", BuildContext(CPU, torch.float32, SingleProcessGroup()))
    fill_from_checkpoint(ours, "language", Checkpoint(tmp_path), WeightRules(language=((r"(.*)", r"\1"),)))
    x = torch.randn(1, 50, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x[0]), theirs(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2_moe", "granitemoe"])
def test_the_shares_of_ranks_add_up_to_the_whole(tmp_path, kind):
    """Matrices stored apart, with a shared expert, and stored together."""
    path = make_text(tmp_path, kind)
    whole, ranks = load(path), [load(path, Rank(rank, 2)) for rank in range(2)]
    x = torch.randn(30, 64)
    with torch.inference_mode():
        shares = [rank.layers[0].mlp(x) for rank in ranks]
        torch.testing.assert_close(sum(shares), whole.layers[0].mlp(x), rtol=1e-4, atol=1e-5)
    assert (
        ranks[0].layers[0].mlp.experts.down_proj.weight.numel() * 2
        == whole.layers[0].mlp.experts.down_proj.weight.numel()
    )


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_matrices_stored_together_and_apart_are_the_same(tmp_path, kind):
    path = make_text(tmp_path, kind)
    apart = load(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    together = {name: value.clone() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in together)
    rewrite_tensors(path, lambda _: together)
    for one, other in zip(apart.parameters(), load(path).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_local_experts": -1}, "num_experts"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ],
)
def test_fields_that_make_no_sense_are_named(tmp_path, change, field):
    path = make_text(tmp_path, "qwen3_moe")
    rewrite_json(path / "config.json", change)
    with pytest.raises(CheckpointError) as caught:
        parse(path)
    assert caught.value.param == field and field in str(caught.value)


def test_a_window_of_qwen2_moe_is_refused(tmp_path):
    path = make_text(tmp_path, "qwen2_moe")
    rewrite_json(path / "config.json", {"use_sliding_window": True})
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        parse(path)


@pytest.mark.parametrize("change", [{"num_local_experts": 0}, {"mlp_only_layers": [0, 1, 2]}])
def test_a_model_may_have_no_experts(tmp_path, change):
    path = make_text(tmp_path, "qwen3_moe")
    rewrite_json(path / "config.json", change)
    assert parse(path)[1].decoder.experts is None


def test_ranks_must_divide_the_size_of_experts(tmp_path):
    decoder = parse(make_text(tmp_path, "qwen3_moe", moe_intermediate_size=21))[1].decoder
    check_split(1, decoder)
    with pytest.raises(ConfigError, match="intermediate size of 21 and 96 can be split over 1 ranks"):
        check_split(2, decoder)


def test_a_tensor_of_experts_in_neither_order_is_refused(tmp_path):
    path = make_text(tmp_path, "granitemoe")
    rewrite_tensors(
        path,
        lambda t: {name: v[:, :-1].contiguous() if "input_linear" in name else v for name, v in t.items()},
    )
    with pytest.raises(CheckpointError, match="input_linear"):
        load(path)


def test_a_token_uses_its_share_of_the_experts():
    config = ExpertsConfig(RouterConfig(8, 2), intermediate_size=24, layers=range(1), shared_size=16)
    layer = ExpertsMLP(32, config, "silu", BuildContext(CPU, torch.float32, SingleProcessGroup()))
    used = 2 * 3 * 24 * 32 + 3 * 16 * 32 + 8 * 32
    assert sum(part.numel() for part in layer.parameters()) - layer.idle_parameters() == used


@pytest.mark.parametrize("count", [6, 32])
def test_experts_of_images_are_rehearsed_for_few_tokens_and_for_many(monkeypatch, count):
    """A step may have any number of tokens of images, which decides between kernels."""
    config = ExpertsConfig(RouterConfig(count, 3), intermediate_size=24, layers=range(1), vision_size=16)
    layer = SplitExperts(32, config, "silu", BuildContext(CPU, torch.float32, SingleProcessGroup()))
    called: set[tuple[str, int]] = set()

    def spy(name):
        def kernel(x, *arguments):
            called.add((name, arguments[-2].weight.shape[2]))
            return torch.zeros_like(x)

        monkeypatch.setattr(dispatch, name, kernel)

    spy("expert_gemv_triton")
    spy("grouped_experts_triton")
    monkeypatch.setattr(dispatch, "_readable", lambda *_: True)
    for tokens in range(1, 65):
        layer.vision(torch.zeros(tokens, 32))
    served = called.copy()
    assert len(served) == 2
    called.clear()
    layer.rehearse([1024, 16])
    assert served < called
