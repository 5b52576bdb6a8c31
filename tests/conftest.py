"""What every test shares."""

import os

import torch

# Read by Triton when a kernel is decorated, so it must be set before any kernel file is imported. Tensors on
# a CPU go to the torch references all the same; only the tests of kernels call the Triton code on them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ray reads these when its processes start.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
