"""Sharing of the interpreter between the threads of a replica."""

import sys

#: Seconds for which a thread may keep the interpreter while another waits for it.
TURN_S = 0.0002


def take_turns() -> None:
    """Let the threads of this process take turns often.

    By default a thread waits up to 5 ms for the interpreter while another thread computes. The thread that
    launches GPU work waits for it at least once a step, and a decode step takes 2 ms. So a busy event loop
    would delay the next tokens by more time than they take.
    """
    sys.setswitchinterval(TURN_S)
