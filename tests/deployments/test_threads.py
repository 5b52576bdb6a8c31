"""The threads of a replica share its interpreter fairly."""

import sys

from deployments.threads import take_turns


def test_threads_take_turns_more_often_than_a_step_takes():
    before = sys.getswitchinterval()
    try:
        take_turns()
        assert sys.getswitchinterval() <= 0.0005
    finally:
        sys.setswitchinterval(before)
