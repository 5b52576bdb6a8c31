"""All kernels compile for a Hopper GPU, with or without one."""

import inspect
import json
import os
import re
import subprocess
import sys

import pytest

from engine.kernels import dispatch
from tests.serving import ROOT

pytestmark = pytest.mark.timeout(600)
#: Finds the names of kernels in a source.
KERNEL = re.compile(r"def (_\w+_kernel)\(")


def run(module: str, *options: str) -> str:
    """Run a module that uses Triton's compiler, and return its output.

    It runs in a process of its own: in this one kernels may be decorated for the interpreter.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_kernels_compile_and_hardly_spill_registers(wide):
    options = ["--wide"] if wide else []
    compiled = [json.loads(line) for line in run("tests.engine.kernels.hopper", *options).splitlines()]
    sources = (path.read_text() for path in (ROOT / "engine" / "kernels").glob("*.py"))
    kernels = {name for source in sources for name in KERNEL.findall(source)}
    assert len(kernels) > 10 and {kernel["kernel"] for kernel in compiled} == kernels
    # Newer compilers spill a few registers of decode attention's prefetched tile.
    assert [kernel for kernel in compiled if kernel["stack"] > 128] == []


def test_all_that_the_choice_among_kernels_lets_through_compiles(wide):
    options = ["--wide"] if wide else []
    lines = run("tests.engine.kernels.admitted", *options).splitlines()
    chosen = [item for name, item in vars(dispatch).items() if name.endswith(("_triton", "_gluon"))]
    sources = {inspect.getsource(inspect.getmodule(function)) for function in chosen}
    kernels = {name for source in sources for name in KERNEL.findall(source)}
    assert len(kernels) > 10 and kernels <= {json.loads(line)["kernel"] for line in lines}


def test_start_up_compiles_each_kernel_once_for_all_batch_sizes():
    count, later = map(json.loads, run("tests.engine.kernels.variants").splitlines())
    assert later == {}, "these kernels are not compiled in parallel at start-up"
    # Without PDL (many rows) and with it (few).
    assert count["_attention_kernel"] == 2
    # Tiles of 128 rows, and pairs of 64.
    assert count["_prefill_kernel"] == 2
    # One program per SM; keys split, with and without PDL; many programs.
    assert count["_decode_kernel"] == 4
    # Four linear layers of a decoder layer, for two paddings of the rows.
    assert count["_skinny_gemm_kernel"] == 8
    # The activations of the tower and of the connector.
    assert count["_gemm_activation_kernel"] == 2
    # Large and small tiles.
    assert count["_vision_kernel"] == 2
    # Narrow and broad tiles.
    assert count["_wide_kernel"] == 2
    # Gates of fewer rows than those take.
    assert count["_act_mul_kernel"] == 1
    # Of one image, whose size the kernel reads, and of others.
    assert count["_patchify_kernel"] == 2
    assert count["_final_argmax_kernel"] == count["_inputs_kernel"] == count["_changes_kernel"] == 1
    assert sum(count.values()) < 54, count
