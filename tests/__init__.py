"""Tests. A process that has collected them ends as it is told here."""

import atexit
import gc
import os
import sys

#: Set for a worker that runs tests for another process, which does not look at how it ends.
ends_at_once = False


def _end() -> None:
    if ends_at_once:
        # To take a heap as large as that of the tests apart takes seconds.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    # Let the collector see everything: otherwise Triton's bindings print a list of leaks. Not sooner: pytest
    # has it look at everything twice before it ends.
    gc.unfreeze()


# This package is imported before all others, so what they do at the end comes first.
atexit.register(_end)
