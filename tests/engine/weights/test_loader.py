"""Loading of checkpoints, and the errors for tensors that are missing, unknown or of the wrong shape."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.checkpoint.folder import Checkpoint
from engine.errors import CheckpointError
from engine.families.load import check_tensors, load_language_model, load_vision_encoder
from engine.families.registry import resolve
from engine.weights import loader
from tests.engine.tiny import make_qwen2_vl, make_text, rewrite_json, rewrite_tensors, split_shards
from tests.engine.weights.checkpoints import Rank

CPU = torch.device("cpu")


def test_processors_options_are_read_from_the_file_that_transformers_takes(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text('{"size": 1}')
    assert Checkpoint(tmp_path).preprocessor_config == {"size": 1}
    # Neither file is of the video processor, which takes the image processor's options then.
    assert Checkpoint(tmp_path).video_preprocessor_config == {"size": 1}
    (tmp_path / "video_preprocessor_config.json").write_text('{"size": 2}')
    assert Checkpoint(tmp_path).video_preprocessor_config == {"size": 2}
    nested = {"patch_size": 14, "image_processor": {"size": 3}, "video_processor": {"size": 4}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    found = Checkpoint(tmp_path)
    assert (found.preprocessor_config, found.video_preprocessor_config) == ({"size": 3}, {"size": 4})


def opened(path):
    checkpoint = Checkpoint.open(str(path))
    return checkpoint, resolve(checkpoint).parse(checkpoint)


def load(path, part="language", **options):
    checkpoint, config = opened(path)
    function = load_language_model if part == "language" else load_vision_encoder
    return function(checkpoint, config, device=CPU, dtype=torch.float32, **options)


def parameters(path, part="language", **options):
    return dict(load(path, part, **options).named_parameters())


@pytest.fixture
def path(tmp_path):
    return make_qwen2_vl(tmp_path / "model")


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def renamed(change):
    return lambda tensors: {change(key): value for key, value in tensors.items()}


def test_missing_tensors_are_named(path):
    rewrite_tensors(path, without("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"lacks.*layers\.1\.self_attn\.k_proj\.bias"):
        load(path)
    load(path, "vision")
    rewrite_tensors(path, without("visual.blocks.1.norm2.weight"))
    with pytest.raises(CheckpointError, match=r"lacks.*blocks\.1\.norm2\.weight"):
        load(path, "vision")


def test_the_same_weights_in_mistrals_own_format_are_left_aside(path):
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, path / "consolidated.safetensors")
    before = Checkpoint(path).tensor_names
    assert before and "layers.0.attention.wq.weight" not in before
    load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated.*aren't read"):
        load(path)


def test_a_file_with_the_whole_model_comes_before_all_others(path):
    """As in Transformers, whatever lies beside it: another precision, or shards that it was made of."""
    before = parameters(path)
    others = {
        name: torch.zeros_like(tensor) for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(others, path / "model.fp16.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(others, "model.fp16.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = parameters(path)
    assert before.keys() == found.keys() and all(torch.equal(before[name], found[name]) for name in found)


def test_missing_tensors_are_seen_before_data_is_read(path, monkeypatch):
    rewrite_tensors(path, without("model.norm.weight"))
    monkeypatch.setattr(loader, "read_rows", lambda *_, **__: pytest.fail("read data"))
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        load(path)


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.q_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_left_over_tensors_are_named(path, name):
    rewrite_tensors(path, lambda tensors: {**tensors, name: torch.zeros(64)})
    with pytest.raises(CheckpointError, match=name):
        load(path)


def test_tensors_of_no_known_part_are_named(path):
    rewrite_tensors(path, lambda tensors: {**tensors, "audio.blocks.0.weight": torch.zeros(4)})
    for part in ("language", "vision"):
        with pytest.raises(CheckpointError, match=r"audio\.blocks\.0\.weight"):
            load(path, part)


def test_ignored_tensors_may_be_present(tmp_path):
    path = make_qwen2_vl(tmp_path, tied=True)
    before = parameters(path)
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "lm_head.weight": before["embed_tokens.weight"].clone(),
        "visual.rotary_pos_emb.inv_freq": torch.zeros(4),
    }
    rewrite_tensors(path, lambda tensors: {**tensors, **surplus})
    after = parameters(path)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_stored_head_of_other_values_is_not_tied(tmp_path):
    """As in Transformers, whatever config.json says."""
    path = make_qwen2_vl(tmp_path, tied=True)
    head = torch.randn(320, 64)
    rewrite_tensors(path, lambda tensors: {**tensors, "lm_head.weight": head})
    theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, head)
    ours = parameters(path)
    assert torch.equal(ours["lm_head.weight"], head)
    assert torch.equal(ours["embed_tokens.weight"], theirs.get_input_embeddings().weight)
    check_tensors(*opened(path))


def test_a_head_stored_without_embeddings_is_both(tmp_path):
    path = make_qwen2_vl(tmp_path, tied=True)
    before = parameters(path)
    rewrite_tensors(path, renamed(lambda name: "lm_head.weight" if "embed_tokens" in name else name))
    after = parameters(path)
    assert all(torch.equal(after[name], before[name]) for name in before)
    check_tensors(*opened(path))


def test_an_untied_model_needs_its_head(tmp_path):
    path = make_qwen2_vl(tmp_path, tied=True)
    rewrite_json(path / "config.json", {"tie_word_embeddings": False, "text_config": None} | _flat(path))
    with pytest.raises(CheckpointError, match="lm_head"):
        load(path)


def _flat(path):
    text = dict(Checkpoint.open(str(path)).config["text_config"])
    return {**text, "tie_word_embeddings": False, "model_type": "qwen2_vl"}


def test_misshaped_tensors_are_named_with_both_shapes(path):
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite_tensors(path, lambda tensors: {**tensors, name: tensors[name].T.contiguous()})
    with pytest.raises(CheckpointError, match=rf"{name}.*\[128, 64\].*\[64, 128\]"):
        load(path)


def test_a_transposed_patch_kernel_is_not_taken_for_a_reshape(path):
    name = "visual.patch_embed.proj.weight"
    rewrite_tensors(path, lambda tensors: {**tensors, name: tensors[name].flatten(1).T.contiguous()})
    with pytest.raises(CheckpointError, match=name):
        load(path, "vision")


def test_truncated_and_missing_shards_are_named(path):
    split_shards(path)
    shard = path / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    for length in (len(data) - 1, 100, 4, 0):
        shard.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated"):
            load(path)
    shard.write_bytes(b"\xff" * 400)
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        load(path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(path)


def test_shards_and_their_index_must_agree(path):
    split_shards(path)
    shard = path / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    name, value = next(iter(tensors.items()))
    save_file({key: item for key, item in tensors.items() if key != name}, shard)
    with pytest.raises(CheckpointError, match=f"index.*{name}"):
        load(path)
    save_file(tensors, shard)
    other = path / "model-00002-of-00003.safetensors"
    save_file({**load_file(other), name: value}, other)
    with pytest.raises(CheckpointError, match=f"{name} is both"):
        load(path)


def test_shards_load_as_one_file_does(path):
    before = {**parameters(path), **parameters(path, "vision")}
    split_shards(path)
    after = {**parameters(path), **parameters(path, "vision")}
    assert all(torch.equal(after[name], before[name]) for name in before)


def as_in_memory(name):
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def with_language_prefix(name):
    return name if name.startswith("visual.") else "language_model." + name


@pytest.mark.parametrize("change", [as_in_memory, with_language_prefix])
def test_names_of_all_versions_load_alike(path, change):
    before = {**parameters(path), **parameters(path, "vision")}
    rewrite_tensors(path, renamed(change))
    after = {**parameters(path), **parameters(path, "vision")}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("change", [str, as_in_memory, with_language_prefix])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language", "model.layers.1.mlp.down_proj.weight"),
        ("language", "model.norm.weight"),
        ("vision", "visual.blocks.1.attn.proj.bias"),
    ],
)
def test_a_missing_tensor_is_named_as_in_the_checkpoint(path, change, part, name):
    rewrite_tensors(path, renamed(change))
    missing = change(name)
    rewrite_tensors(path, lambda tensors: {key: x for key, x in tensors.items() if key != missing})
    with pytest.raises(CheckpointError, match=f": {re.escape(missing)}$"):
        load(path, part)


def test_two_names_for_one_weight_are_refused(path):
    rewrite_tensors(
        path,
        lambda tensors: {**tensors, "model.language_model.norm.weight": tensors["model.norm.weight"].clone()},
    )
    with pytest.raises(CheckpointError, match="same weight"):
        load(path)


def test_fused_and_separate_projections_load_alike(tmp_path):
    """Phi3's checkpoints hold q, k, v and gate, up concatenated."""
    path = make_text(tmp_path, "phi3")
    before = parameters(path)

    def take_apart(tensors):
        out = {}
        for name, tensor in tensors.items():
            if "qkv_proj" in name:
                parts = zip("qkv", tensor.split([64, 32, 32]), strict=True)
                out.update({name.replace("qkv_proj", f"{part}_proj"): rows.clone() for part, rows in parts})
            elif "gate_up" in name:
                parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
                out.update({name.replace("gate_up", part): rows.clone() for part, rows in parts})
            else:
                out[name] = tensor
        return out

    rewrite_tensors(path, take_apart)
    after = parameters(path)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bfloat16_checkpoints_load_in_any_dtype(tmp_path):
    path = make_qwen2_vl(tmp_path, dtype=torch.bfloat16)
    checkpoint = Checkpoint.open(str(path))
    assert resolve(checkpoint).parse(checkpoint).dtype == "bfloat16"
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    assert torch.equal(parameters(path)["norm.weight"], stored.float())


def test_quantised_tensors_are_refused(path):
    rewrite_tensors(path, lambda tensors: {**tensors, "model.norm.weight": torch.zeros(64, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*I8"):
        load(path)


def test_pickles_are_never_loaded(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        load(path)


def test_dummy_weights(path):
    for file in path.glob("*.safetensors"):
        file.unlink()
    one, same = (parameters(path, load_format="dummy", seed=5) for _ in range(2))
    other = parameters(path, load_format="dummy", seed=6)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])
    assert all(value.isfinite().all() for value in one.values())
    assert one["norm.weight"].eq(1).all() and 0.01 < one["lm_head.weight"].std() < 0.03


@pytest.mark.parametrize("size", [2, 4])
def test_dummy_weights_are_the_same_model_on_any_number_of_ranks(path, size):
    checkpoint, config = opened(path)

    def load(rank, size):
        options = {"device": CPU, "dtype": torch.float32, "load_format": "dummy", "seed": 3}
        return load_language_model(checkpoint, config, tp=Rank(rank, size), **options).state_dict()

    whole, ranks = load(0, 1), [load(rank, size) for rank in range(size)]
    for name in ("embed_tokens.weight", "layers.1.mlp.gate_up_proj.weight"):
        # The gate's rows of all ranks come before the rows of the up projection.
        parts = 2 if "gate_up" in name else 1
        shards = [rank[name].unflatten(0, (parts, -1)) for rank in ranks]
        together = torch.cat(shards, dim=1).flatten(0, 1)[: len(whole[name])]
        assert torch.equal(together, whole[name])
    down = "layers.1.mlp.down_proj.weight"
    assert torch.equal(torch.cat([rank[down] for rank in ranks], dim=1), whole[down])


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere/x"])
def test_a_folder_that_is_not_there(model):
    with pytest.raises(CheckpointError, match="no folder"):
        Checkpoint.open(model)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        _ = Checkpoint.open(str(tmp_path)).config
