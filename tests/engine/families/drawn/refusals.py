"""Configurations and prompts that the engine refuses though Transformers takes them, with the cause.

A refusal that is not on this list is counted as a difference.
"""

from __future__ import annotations

import re

#: Regular expression of the message, and why it is so.
LISTED: tuple[tuple[str, str], ...] = (
    (r"rope type '\w+' is not supported for models with mrope", "no rope by length for three axes"),
    (r"prompt's positions reach \d+, but", "a video lasts longer than there are positions"),
    (r"preprocessor_config.json: do_\w+ false is not supported", "encoders normalise what they are given"),
    (r"max_model_len is \d+, but the model was made for", "the context is as long as the checkpoint states"),
    (r"tensor_parallel_size is \d+, but", "the heads can't be split over two ranks"),
)


def cause_of(message: str) -> str | None:
    """The listed cause of a refusal; None if it isn't listed."""
    return next((cause for pattern, cause in LISTED if re.search(pattern, message)), None)
