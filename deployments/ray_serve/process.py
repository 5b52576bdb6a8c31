"""Set-up of a replica's process, before its stage is made."""

import asyncio
import os
from contextlib import suppress

from deployments.logs import LoggingConfig, set_up_logs
from deployments.threads import take_turns

#: Environment variable that holds a :class:`~deployments.logs.LoggingConfig` as JSON.
LOGGING = "SIGHTLINE_LOGGING"


def prepare_process() -> None:
    """Set up logs and threads."""
    take_turns()
    set_up_logs(LoggingConfig.model_validate_json(os.environ.get(LOGGING, "{}")))


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop as Ray's own processes have it: uvloop's, which writes to sockets in half the time, where
    that is installed. It isn't on every platform."""
    with suppress(ImportError):
        import uvloop

        return uvloop.new_event_loop()
    return asyncio.new_event_loop()
