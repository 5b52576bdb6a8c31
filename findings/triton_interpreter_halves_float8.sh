#!/usr/bin/env bash
# Triton 3.9: in the interpreter, some float32 become float8 of half their value.
#
# Expected: with TRITON_INTERPRET=1 a cast to float8 rounds to nearest even, which is tl.cast's default and what
# PyTorch's cast and the GPU do: 1.95 becomes 2.0.
# It becomes 1.0. Where rounding carries out of the mantissa, the carry is ORed into the exponent instead of added: it
# is lost if the exponent is odd, and right if it is even (3.9 becomes 4.0). Ties round away from zero, not to even.
# Why it matters to a server of vision-language models: kernels that quantise activations to fp8 are tested without a
# GPU in the interpreter. A right kernel differs from PyTorch by a factor of 2 in one value of 20 to 50, and a tolerance
# wide enough to pass hides real faults.
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
def cast(source, target, DTYPE: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(DTYPE))


def interpreted(values, dtype, triton_dtype):
    target = torch.zeros(len(values), dtype=dtype)
    cast[(1,)](values, target, triton_dtype, len(values))
    return target.float()


print("torch", torch.__version__, "; triton", triton.__version__)
shown = torch.tensor([1.93, 1.95, 3.9, -7.9, 0.49, 1.0625, 100.0, 250.0])
many = torch.exp2(torch.linspace(-5, 8, 2**14))
for dtype, triton_dtype in ((torch.float8_e4m3fn, tl.float8e4nv), (torch.float8_e5m2, tl.float8e5)):
    print(dtype)
    print("  float32:    ", [round(value, 4) for value in shown.tolist()])
    print("  interpreter:", interpreted(shown, dtype, triton_dtype).tolist())
    print("  PyTorch:    ", shown.to(dtype).float().tolist())
    found, expected = interpreted(many, dtype, triton_dtype), many.to(dtype).float()
    halved = (found == expected / 2).sum().item()
    print("  halved:", halved, "of", len(many))
    assert halved > len(many) / 100, "the carry reaches the exponent now"
    assert ((found == expected) | (found == expected / 2)).all()
found = interpreted(shown, torch.float8_e4m3fn, tl.float8e4nv).tolist()
assert found == [1.875, 1.0, 4.0, -4.0, 0.25, 1.125, 104.0, 256.0], found
PY
"$work/venv/bin/python" "$work/probe.py"
