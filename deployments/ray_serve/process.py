"""Set-up of a replica's process, before its stage is made."""

import os

from deployments.logs import LoggingConfig, set_up_logs
from deployments.threads import take_turns

#: Environment variable that holds a :class:`~deployments.logs.LoggingConfig` as JSON.
LOGGING = "SIGHTLINE_LOGGING"


def prepare_process() -> None:
    """Set up logs and threads."""
    take_turns()
    set_up_logs(LoggingConfig.model_validate_json(os.environ.get(LOGGING, "{}")))
