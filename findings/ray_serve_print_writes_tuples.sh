#!/usr/bin/env bash
# Ray Serve 2.60: with its throughput settings every traceback in a replica's log is a row of tuples.
#
# RAY_SERVE_THROUGHPUT_OPTIMIZED=1 turns off logging to stderr (RAY_SERVE_LOG_TO_STDERR=0). Replicas then replace the
# builtin print by one that sends text to Serve's logger, and passes on what is printed to a file. It passes the texts
# as one argument, a tuple. Python's formatters of log records print tracebacks to a file in memory.
#
# Expected: print("a", file=f) writes a, and a logged error has its traceback, line by line.
# It writes ('a',), and a traceback is one line: ('Traceback (most recent call last):\n',)('  File "..., line 1 ...
# Why it matters to a server of vision-language models: under load is where errors must be read, and log tools look for
# lines that begin with "Traceback". Whatever a library writes to a file by print is wrong as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "ray[serve]==2.60.0"
cat > "$work/probe.py" <<'PY'
import builtins
import io
import logging
import sys

import ray
from ray.serve._private.logging_utils import redirected_print

print("ray", ray.__version__)
to_screen = print
# As configure_component_logger does in a replica.
builtins.print = redirected_print
file = io.StringIO()
print("a", "b", file=file)
try:
    raise ValueError("too large")
except ValueError:
    trace = logging.Formatter().formatException(sys.exc_info())
builtins.print = to_screen
print("print:", file.getvalue().strip())
print("traceback:", trace[:70])
assert file.getvalue() == "('a', 'b')\n", "print writes texts now"
assert trace.startswith("('Traceback (most recent call last):\\n',)")
PY
"$work/venv/bin/python" "$work/probe.py"
