import subprocess
import sys

import pytest

#: Prints the page faults of messages, each of which takes three pieces of 2 MiB, once the first were there.
FAULTS = """if True:
    import resource
    from deployments.ray_serve.freed_memory import keep_freed_memory

    def message():
        pieces = [b"x" * (2 << 20) for _ in range(3)]

    keep_freed_memory()
    message()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        message()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("own", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_a_message_uses_the_memory_of_the_last_one_unless_the_environment_says_otherwise(own):
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=own)
    # A piece has 512 pages.
    assert (int(run.stdout) < 512) == (not own)
