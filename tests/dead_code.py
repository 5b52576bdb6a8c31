"""Lists functions, methods, properties and classes of the sources that nothing uses; part of ``make lint``.

vulture goes by names: code is used if its name is read anywhere, tests included. Its reports of variables and
attributes are left out: most are fields of messages, which only clients read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vulture import Vulture

ROOT = Path(__file__).parent.parent
SOURCES = ("engine", "deployments", "models", "benchmarks", "examples")
KINDS = ("function", "method", "property", "class")
#: Decorators that hand a function to a library, which calls it.
REGISTERED = ["@router.*", "@*validator", "@*serializer", "@api.*", "@app.*"]
#: Names that a library or ``getattr`` calls: asyncio calls the methods of a protocol,
#: Ray Serve the last four.
CALLED = [
    "__*__",
    "visit_*",
    "w1",
    "w2",
    "w3",
    "w4",
    "w5",
    "connection_made",
    "data_received",
    "connection_lost",
    "pause_writing",
    "resume_writing",
]
CALLED += [
    "encoder_measured",
    "record_autoscaling_stats",
    "record_replica_metadata",
    "_fulfill_next_pending_request",
]


def unused() -> list[str]:
    """The report lines."""
    vulture = Vulture(ignore_names=CALLED, ignore_decorators=REGISTERED)
    vulture.scavenge([str(ROOT / folder) for folder in (*SOURCES, "tests")])
    tests = ROOT / "tests"
    found = [i for i in vulture.get_unused_code() if i.typ in KINDS and tests not in i.filename.parents]
    return [f"{item.filename}:{item.first_lineno}: unused {item.typ} {item.name!r}" for item in found]


if __name__ == "__main__":
    lines = unused()
    print("\n".join(lines))
    sys.exit(bool(lines))
