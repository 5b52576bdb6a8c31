"""What ``/metrics`` of an application says."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

#: The stages as metrics name them.
STAGE_NAMES = ("preprocessor", "encoder", "language_model")


class Values:
    """The values of one scrape."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float:
        """The sum over all series with these labels; their names begin with ``sightline_``."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == f"sightline_{name}" and labels.items() <= sample.labels.items()
        )


def scraped(root: str) -> Values:
    """The values of the application at this address now."""
    with urllib.request.urlopen(f"{root}/metrics", timeout=60) as response:
        return Values(response.read().decode())


def all_answer(values: Values) -> bool:
    """Return whether a replica of each of pocket's stages is in ``values``: a slow one is left out."""
    return all(values("stage_replicas", model="pocket", stage=stage) >= 1 for stage in STAGE_NAMES)


def is_idle(values: Values) -> bool:
    """Return whether all stages of pocket answer, and none holds anything of any request."""
    held = (
        "stage_running_requests",
        "stage_queue_length",
        "preprocessor_pending_pixels",
        "encoder_pending_visual_tokens",
        "engine_running_requests",
        "engine_waiting_requests",
        "engine_kv_blocks_used",
        "engine_embedding_rows",
        "open_answers",
        "stage_open_calls",
    )
    return all_answer(values) and not any(values(name, model="pocket") for name in held)
