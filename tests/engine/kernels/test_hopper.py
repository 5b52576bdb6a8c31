"""The kernels compile for a GPU that this machine needn't have."""

import json
import os
import re
import subprocess
import sys

from tests.serving import ROOT


def test_all_compile_and_nothing_leaves_the_registers():
    # The interpreter takes the compiler's place when kernels are decorated: another process must do this.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.engine.kernels.hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    sources = (path.read_text() for path in (ROOT / "engine" / "kernels").glob("*.py"))
    kernels = {name for source in sources for name in re.findall(r"def (_\w+_kernel)\(", source)}
    assert len(kernels) > 10 and {kernel["kernel"] for kernel in found} == kernels
    assert [kernel for kernel in found if kernel["stack"]] == []
