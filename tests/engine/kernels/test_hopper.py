"""The kernels compile for a GPU that this machine needn't have."""

import json
import os
import re
import subprocess
import sys

from tests.serving import ROOT


def run(module: str) -> str:
    """What a module prints that uses the compiler. Where kernels are decorated for the interpreter there is
    none: another process must do this."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_compile_and_next_to_nothing_leaves_the_registers():
    found = [json.loads(line) for line in run("tests.engine.kernels.hopper").splitlines()]
    sources = (path.read_text() for path in (ROOT / "engine" / "kernels").glob("*.py"))
    kernels = {name for source in sources for name in re.findall(r"def (_\w+_kernel)\(", source)}
    assert len(kernels) > 10 and {kernel["kernel"] for kernel in found} == kernels
    # Newer compilers put a few registers of decode attention's first tile aside.
    assert [kernel for kernel in found if kernel["stack"] > 128] == []


def test_a_start_compiles_a_kernel_once_whatever_the_batch_sizes():
    count, later = map(json.loads, run("tests.engine.kernels.variants").splitlines())
    assert later == {}, "these are not compiled many at a time"
    # Many rows, and few, which overlap.
    assert count["_attention_kernel"] == 2
    assert count["_prefill_kernel"] == 1
    # Up to two that have a processor for each program, up to 131 that are split, some of which overlap,
    # and more.
    assert count["_decode_kernel"] == 4
    # The products of a layer, two of which are of one kind, for two heights.
    assert count["_few_rows_kernel"] == 8
    # The tower's activation and the connector's.
    assert count["_many_rows_kernel"] == 2
    # For few segments and for many.
    assert count["_vision_kernel"] == 2
    assert count["_final_argmax_kernel"] == 1
    assert sum(count.values()) < 45, count
