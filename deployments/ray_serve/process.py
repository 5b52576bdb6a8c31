"""Set-up of a replica's process, before its stage is made."""

import os

from deployments.logs import LoggingConfig, set_up_logs
from deployments.ray_serve.freed_memory import keep_freed_memory
from deployments.threads import TURN_S, take_turns

#: Environment variable that holds a :class:`~deployments.logs.LoggingConfig` as JSON.
LOGGING = "SIGHTLINE_LOGGING"


def prepare_process(turn_s: float = TURN_S) -> None:
    """Set up logs, threads and memory; ``turn_s`` as of :func:`~deployments.threads.take_turns`."""
    take_turns(turn_s)
    keep_freed_memory()
    # Texts are tokenized one at a time. The library's threads, one for each core, would only pass each on and
    # wait for it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_up_logs(LoggingConfig.model_validate_json(os.environ.get(LOGGING, "{}")))
