"""Norms, rotation, cache writes, activations: kernels against references, references against Transformers."""

import pytest
import torch
from transformers.activations import QuickGELUActivation
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm4v import modeling_glm4v
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

from engine.kernels.act_mul import act_mul_reference, act_mul_triton
from engine.kernels.activation import ACTIVATIONS
from engine.kernels.kv_write import rotary_kv_write_reference, rotary_kv_write_triton
from engine.kernels.layer_norm import add_layer_norm_reference, add_layer_norm_triton
from engine.kernels.paged import KVCache
from engine.kernels.patchify import (
    HEADER,
    describe_image,
    patchify_described_reference,
    patchify_described_triton,
    patchify_reference,
    patchify_triton,
)
from engine.kernels.quick_gelu import quick_gelu_reference, quick_gelu_triton
from engine.kernels.rms_norm import (
    Addend,
    HeadNorms,
    head_norms_reference,
    head_norms_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_rounded,
    rms_norm_triton,
    sum_with,
)
from engine.kernels.rotary import RotaryTable, angle_axes, rotary_reference, rotary_triton
from engine.kernels.shard_rows import shard_rows_reference, shard_rows_triton
from engine.kernels.sigmoid_gate import sigmoid_gate_reference, sigmoid_gate_triton
from engine.kernels.split_sums import Pair, SplitSums

from .compare import assert_close


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (5, 96), (3, 4, 80)])
def test_rms_norm(device, dtype, shape, with_residual, offset):
    wide = torch.randn(*shape[:-1], shape[-1] + 8, device=device, dtype=dtype) * 3
    x = wide[..., : shape[-1]]
    weight = torch.randn(shape[-1], device=device, dtype=dtype)
    residual = torch.randn(shape, device=device, dtype=dtype) if with_residual else None
    result = rms_norm_triton(x, weight, 1e-6, residual, offset=offset)
    expected = rms_norm_reference(x, weight, 1e-6, residual, offset=offset)
    for one, other in zip(*(r if with_residual else (r,) for r in (result, expected)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", [(1, 16), (5, 96)])
def test_rms_norm_adds_up_split_sums_and_rounds_their_total(device, dtype, shape, parts):
    # Of whole numbers, so that every order of addition has the same total.
    sums = SplitSums(torch.randint(-999, 999, (parts, *shape), device=device).float() / 64, dtype)
    weight, residual = (torch.randn(size, device=device, dtype=dtype) for size in (shape[1], shape))
    assert sums.shape == shape and sums.device.type == device.type
    normed, total = rms_norm_triton(sums, weight, 1e-6, residual)
    assert torch.equal(total, sums.parts.sum(0).to(dtype) + residual)
    assert_close(normed, rms_norm_reference(total, weight, 1e-6))


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize(("offset", "after", "scaled"), [(None, False, True), (1.0, True, False)])
def test_rms_norm_of_a_result_before_it_is_added(device, dtype, parts, offset, after, scaled):
    """With a norm of the sum and without one; the sum is rounded as if the two were apart."""
    shape = 5, 96
    x = torch.randint(-999, 999, (max(1, parts), *shape), device=device).float() / 64
    given = SplitSums(x, dtype) if parts else x[0].to(dtype)
    before, weight = torch.randn(2, 96, device=device, dtype=dtype)
    residual = torch.randn(shape, device=device, dtype=dtype)
    added = Addend(given, before, 1e-6, offset, 0.22 if scaled else 1.0)
    assert added.shape == shape and added.dtype == dtype and added.device.type == device.type
    options = {"offset": offset, "factor": torch.full((1,), 0.7).to(weight) if scaled else None}
    out, total = rms_norm_triton(added, weight if after else None, 1e-6, residual, **options)
    alone = rms_norm_reference(x.sum(0).to(dtype), before, 1e-6, offset=offset)
    alone = alone * 0.22 if scaled else alone
    assert_close(added.total(), alone)
    assert_close(total, (alone + residual) * options["factor"] if scaled else alone + residual)
    assert_close(out, rms_norm_reference(total, weight, 1e-6, offset=offset) if after else total)


@pytest.mark.parametrize("offset", [None, 1.0])
def test_norms_of_heads(device, dtype, offset):
    """Queries are every other head of a projection, as where their gates stand between them."""
    qkv = torch.randn(3, 8, 20, device=device, dtype=dtype) * 3
    q, k = qkv[:, :6:2], qkv[:, 6:]
    norms = HeadNorms(*torch.randn(2, 20, device=device, dtype=dtype), 1e-6, offset)
    for one, other in zip(head_norms_triton(q, k, norms), head_norms_reference(q, k, norms), strict=True):
        assert one.is_contiguous()
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_as_transformers_does(dtype):
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(7, 64).to(dtype)
    assert torch.equal(rms_norm_reference(x, norm.weight.data, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_an_offset_rounds_as_transformers_does(dtype):
    """The sum with the offset is never rounded to bfloat16."""
    norm = Gemma3RMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_(std=0.1)
    x = torch.randn(7, 64).to(dtype)
    assert torch.equal(rms_norm_reference(x, norm.weight.data, 1e-5, offset=1.0), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_with_an_offset_of_zero_rounds_as_transformers_does(dtype):
    norm = Gemma4RMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    x = torch.randn(7, 64).to(dtype)
    assert torch.equal(rms_norm_reference(x, norm.weight.data, 1e-5, offset=0.0), norm(x))


ROTARY = {
    "one axis": (None, 0),
    "three pieces": ((2, 3, 3), 0),
    "four pieces": ((1, 2, 2, 3), 0),
    "three interleaved": ((4, 2, 2), 3),
    "neighbours": (None, 0, True),
    "neighbours, three pieces": ((2, 3, 3), 0, True),
    "neighbours, two interleaved": ((2, 3, 3), 2, True),
}


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize(("dim", "half"), [(16, 8), (24, 8)])
def test_rotary(device, dtype, kind, dim, half):
    section, *order = ROTARY[kind]
    positions = torch.randint(0, 50, (len(section), 6) if section else (6,), device=device)
    table = RotaryTable(*torch.randn(2, 50, half, device=device), section, *order)
    fused = torch.randn(6, 5, dim, device=device, dtype=dtype)
    before, other = fused.clone(), fused.clone()
    for x, run in ((fused, rotary_triton), (other, rotary_reference)):
        run(x[:, :3], x[:, 3:4], positions, table)
    assert_close(fused, other)
    assert torch.equal(fused[:, 4], before[:, 4]), "the last head is a value: it stays"
    assert not torch.equal(fused[:, 3], before[:, 3])


#: Offsets of the norms of heads, and whether these come behind the rotation; empty where there are none.
HEAD_NORMS = {
    "no norms": (),
    "norms": ((None, False),),
    "with an offset": ((1.0, False),),
    "last": ((None, True),),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("norms", HEAD_NORMS)
@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"), [(1, 4, 1, 16), (9, 6, 3, 24), (20, 3, 3, 16)]
)
def test_rotary_kv_write(device, dtype, kind, tokens, heads, kv_heads, dim, norms):
    section, *order = ROTARY[kind]
    positions = torch.randint(0, 50, (len(section), tokens) if section else (tokens,), device=device)
    table = RotaryTable(*torch.randn(2, 50, 8, device=device), section, *order)
    slots = torch.randperm(8 * 4, device=device)[:tokens]
    slots[1::4] = -1
    results = []
    fused = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
    given = None
    for offset, last in HEAD_NORMS[norms]:
        given = HeadNorms(*torch.randn(2, dim, device=device, dtype=dtype), 1e-6, offset, last)
    for run in (rotary_kv_write_triton, rotary_kv_write_reference):
        q, k, v = fused.clone().split([heads, kv_heads, kv_heads], dim=1)
        caches = [torch.full((8, kv_heads, 4, dim), -7.0, device=device, dtype=dtype) for _ in range(2)]
        run(q, k, v, positions, table, KVCache(*caches), slots, given)
        results.append((q, *caches))
        written = sum(int(slot) >= 0 for slot in slots)
        assert all((c != -7.0).sum() == written * kv_heads * dim for c in caches), "exactly the mapped slots"
    for result, expected in zip(*results, strict=True):
        assert_close(result, expected)
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("shape", [(1,), (3, 700), (2, 5, 11)])
def test_quick_gelu(device, dtype, shape):
    x = torch.randn(shape, device=device, dtype=dtype) * 3
    assert_close(quick_gelu_triton(x), quick_gelu_reference(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quick_gelu_equals_transformers(dtype):
    x = torch.randn(300).to(dtype) * 3
    assert torch.equal(quick_gelu_reference(x), QuickGELUActivation()(x))


@pytest.mark.parametrize(
    ("shape", "channels", "patch", "merge", "temporal"),
    [
        ((28, 56, 3), 3, 14, 2, 2),
        ((28, 56, 4), 3, 14, 2, 2),
        ((2, 12, 8, 3), 3, 2, 2, 2),
        ((6, 9, 18, 3), 3, 3, 3, 2),
        ((8, 4, 1), 1, 2, 1, 1),
        ((2, 7, 9, 3), 3, 3, 1, 1),
    ],
)
def test_patchify(device, dtype, shape, channels, patch, merge, temporal):
    pixels = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    table = torch.randn(channels * 256, device=device, dtype=dtype)
    result = patchify_triton(pixels, table, patch=patch, merge=merge, temporal=temporal)
    expected = patchify_reference(pixels, table, patch=patch, merge=merge, temporal=temporal)
    assert torch.equal(result, expected)
    if pixels.dim() == 3:
        described = torch.zeros(HEADER + pixels.numel() + 12, dtype=torch.uint8)
        describe_image(described[: HEADER + pixels.numel()].numpy(), pixels.cpu().numpy())
        for run in (patchify_described_triton, patchify_described_reference):
            found = run(
                described.to(device), table, len(expected) + 5, patch=patch, merge=merge, temporal=temporal
            )
            assert len(found) == len(expected) + 5 and found.isfinite().all()
            assert torch.equal(found[: len(expected)], expected)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (5, 96), (3, 1300), (66, 1300)])
def test_add_layer_norm(device, dtype, rows, size):
    x, residual = torch.randn(2, rows, size, device=device, dtype=dtype) * 3 + 1
    weight, bias = torch.randn(2, size, device=device, dtype=dtype)
    result = add_layer_norm_triton(x, residual, weight, bias, 1e-6)
    expected = add_layer_norm_reference(x, residual, weight, bias, 1e-6)
    for one, other in zip(result, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(("parts", "size"), [((0, 0), 96), ((2, 3), 96), ((0, 0), 1300)])
def test_a_layer_norm_adds_a_pair_one_after_the_other(device, dtype, parts, size):
    """Of whole numbers, so that every order of a sum's parts has the same total; without a shift. A row is
    one chunk, or two."""
    sums = [torch.randint(-999, 999, (max(1, count), 5, size), device=device).float() / 64 for count in parts]
    results = [
        SplitSums(each, dtype) if count else each[0].to(dtype)
        for each, count in zip(sums, parts, strict=True)
    ]
    residual, weight = torch.randn(5, size).to(device, dtype), torch.randn(size).to(device, dtype)
    normed, total = add_layer_norm_triton(Pair(*results), residual, weight, None, 1e-6)
    first, second = (each.sum(0).to(dtype) for each in sums)
    assert torch.equal(total, residual + first + second)
    assert_close(normed, add_layer_norm_reference(Pair(first, second), residual, weight, None, 1e-6)[0])
    assert torch.equal(Pair(*results).total(), first + second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [False, True])
def test_an_rms_norm_adds_a_pair_one_after_the_other(device, dtype, split):
    """As Transformers adds attention and an MLP to the residual; of whole numbers as above."""
    sums = torch.randint(-999, 999, (2, 3 if split else 1, 5, 96), device=device).float() / 64
    first, second = sums.sum(1).to(dtype)
    given = Pair(*(SplitSums(each, dtype) for each in sums)) if split else Pair(first, second)
    residual, weight = torch.randn(5, 96).to(device, dtype), torch.randn(96).to(device, dtype)
    expected = residual + first + second
    normed, total = rms_norm(given, weight, 1e-6, residual)
    assert torch.equal(total, expected)
    assert_close(normed, rms_norm_reference(expected, weight, 1e-6))
    _, total = rms_norm_rounded(given, weight, 1e-6, residual)
    assert torch.equal(total, expected)
    assert torch.equal(sum_with(given, residual), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_equals_transformers(dtype):
    tokens = 9
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2VLTextConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    embedding = modeling_qwen2_vl.Qwen2VLRotaryEmbedding(config)
    positions = torch.randint(0, 30, (3, tokens))
    q, k = torch.randn(tokens, 4, 16).to(dtype), torch.randn(tokens, 2, 16).to(dtype)
    cos, sin = embedding(q, positions[:, None])
    batched = (x.transpose(0, 1)[None] for x in (q, k))
    expected = modeling_qwen2_vl.apply_rotary_pos_emb(*batched, cos, sin)
    angles = torch.arange(30).float()[:, None] * embedding.inv_freq
    rotary_reference(q, k, positions, RotaryTable(angles.cos(), angles.sin(), (2, 3, 3)))
    assert torch.equal(q, expected[0][0].transpose(0, 1)) and torch.equal(k, expected[1][0].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_of_neighbours_equals_transformers(dtype):
    tokens = 9
    rope = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
    config = Glm4vTextConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope)
    embedding = modeling_glm4v.Glm4vTextRotaryEmbedding(config)
    positions = torch.randint(0, 30, (3, tokens))
    q, k = torch.randn(tokens, 4, 16).to(dtype), torch.randn(tokens, 2, 16).to(dtype)
    cos, sin = embedding(q, positions[:, None])
    batched = (x.transpose(0, 1)[None] for x in (q, k))
    expected = modeling_glm4v.apply_rotary_pos_emb(*batched, cos, sin)
    angles = torch.arange(30).float()[:, None] * embedding.inv_freq
    table = RotaryTable(angles.cos(), angles.sin(), (1, 1, 2), adjacent=True)
    rotary_reference(q, k, positions, table)
    assert torch.equal(q, expected[0][0].transpose(0, 1)) and torch.equal(k, expected[1][0].transpose(0, 1))


def test_axes_of_interleaved_angles():
    # Sections 4, 2, 2: axes h and w get every third angle, two each; t gets the rest.
    assert angle_axes((4, 2, 2), 3).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    # h and w take turns, t has the last angles.
    assert angle_axes((2, 3, 3), 2).tolist() == [1, 2, 1, 2, 1, 2, 0, 0]
    assert angle_axes((2, 3, 3), 0).tolist() == [0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (5, 1100)])
def test_act_mul(device, dtype, activation, rows, size):
    gate_up = torch.randn(rows, 2 * size, device=device, dtype=dtype)
    assert_close(act_mul_triton(gate_up, activation), act_mul_reference(gate_up, activation))


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 4, 16), (3, 5, 256)])
def test_sigmoid_gate(device, dtype, tokens, heads, dim):
    x = torch.randn(tokens, heads, dim, device=device, dtype=dtype)
    # Queries and gates of heads take turns.
    gate = torch.randn(tokens, 2 * heads, dim, device=device, dtype=dtype)[:, 1::2]
    assert_close(sigmoid_gate_triton(x, gate), sigmoid_gate_reference(x, gate))
    # One number for each head, behind others.
    gate = torch.randn(tokens, heads + 3, device=device, dtype=dtype)[:, 3:, None]
    assert_close(sigmoid_gate_triton(x, gate), sigmoid_gate_reference(x, gate))


@pytest.mark.parametrize("width", [24, 1032])
def test_shard_rows(device, dtype, width):
    table = torch.randn(7, width, device=device, dtype=dtype)
    # The last row is padding beyond the vocabulary's end.
    ids = torch.tensor([9, 10, 15, 16, 0, 12], device=device)
    result = shard_rows_triton(table, ids, 10, 6)
    assert torch.equal(result, shard_rows_reference(table, ids, 10, 6))
    assert torch.equal(result[[1, 2, 5]], table[[0, 5, 2]])
    assert not result[[0, 3, 4]].any()
