import subprocess
import sys

import pytest

#: Prints the page faults of messages, each of which takes three pieces, once the first were there.
FAULTS = """if True:
    import resource, sys
    from deployments.ray_serve.freed_memory import keep_freed_memory

    def message():
        pieces = [b"x" * (int(sys.argv[1]) << 20) for _ in range(3)]

    keep_freed_memory()
    message()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        message()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(
    ("mib", "own"),
    [
        (2, {}),
        (10, {}),
        (2, {"MALLOC_TRIM_THRESHOLD_": "131072"}),
        (2, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}),
    ],
)
def test_a_message_uses_the_memory_of_the_last_one_unless_the_environment_says_otherwise(mib, own):
    command = [sys.executable, "-c", FAULTS, str(mib)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    # A piece has at least 512 pages.
    assert (int(run.stdout) < 512) == (not own)
