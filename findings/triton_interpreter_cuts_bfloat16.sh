#!/usr/bin/env bash
# Triton 3.9: in the interpreter, float32 is cut to bfloat16, also where rounding to nearest is asked for.
#
# Expected: with TRITON_INTERPRET=1 a cast to bfloat16 rounds to nearest even, which is tl.cast's default and what
# PyTorch's cast and the GPU do. fp_downcast_rounding="rtne" says so once more.
# The low 16 bits are dropped, with the argument and without it, in casts and in stores. Half of all values differ from
# PyTorch by one bfloat16 step, all of them towards zero. float16 is rounded.
# Why it matters to a server of vision-language models: its weights and activations are bfloat16, and its kernels are
# tested without a GPU in the interpreter. A right kernel there is biased, its error grows with each stored result, and
# a kernel that rounds wrongly on the GPU passes. Tests have to round to bfloat16 themselves, outside the kernel.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 triton==3.9.0 numpy
cat > "$work/probe.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def store(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at))


@triton.jit
def cast(source, target, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.cast(tl.load(source + at), DTYPE, fp_downcast_rounding=ROUNDING))


print("torch", torch.__version__, "; triton", triton.__version__)
torch.manual_seed(0)
values = torch.randn(4096)
nearest = values.to(torch.bfloat16)
cut = (values.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def of_cast(dtype, triton_dtype, rounding):
    target = torch.zeros(len(values), dtype=dtype)
    cast[(1,)](values, target, triton_dtype, rounding, len(values))
    return target


stored = torch.zeros(len(values), dtype=torch.bfloat16)
store[(1,)](values, stored, len(values))
results = {"store": stored}
results |= {f"cast, {rounding}": of_cast(torch.bfloat16, tl.bfloat16, rounding) for rounding in (None, "rtne", "rtz")}
for name, found in results.items():
    print(f"{name}: {(found != nearest).sum().item()} of {len(values)} values aren't the nearest")
    assert torch.equal(found, cut), "bfloat16 is rounded now"
ratio = (stored.float().abs().sum() / values.abs().sum()).item()
best = (nearest.float().abs().sum() / values.abs().sum()).item()
print("sum of sizes, against float32:", round(ratio, 5), "; rounded to nearest:", round(best, 5))
assert (nearest != cut).sum() > len(values) / 3
assert torch.equal(of_cast(torch.float16, tl.float16, None), values.to(torch.float16))
PY
"$work/venv/bin/python" "$work/probe.py"
