"""How the threads of a replica share its interpreter."""

import sys

#: How long a thread keeps the interpreter from others that wait for it.
TURN_S = 0.0002


def take_turns() -> None:
    """Let the threads of this process take turns often.

    By default a thread that waits for the interpreter gets it after 5 ms, where another has enough to do.
    Whoever launches work on a GPU waits for it at least once a step, and a decode step takes 2 ms: an event
    loop that sends tokens on would hold up the next ones for longer than they take.
    """
    sys.setswitchinterval(TURN_S)
