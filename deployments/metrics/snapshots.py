"""Snapshots of the engine and of the encoder as metrics."""

from collections.abc import Mapping
from typing import Any

from deployments.metrics.families import Family, Kind

#: Key of the snapshot, name, kind, help.
_Row = tuple[str, str, Kind, str]

#: Of :meth:`engine.async_engine.AsyncEngine.metrics`.
_ENGINE: tuple[_Row, ...] = (
    ("running", "running_requests", "gauge", "Sequences that have a slot."),
    ("waiting", "waiting_requests", "gauge", "Sequences that wait for a slot or for KV blocks."),
    ("waiting_tokens", "waiting_tokens", "gauge", "Known tokens of the sequences that wait."),
    ("late", "late_requests_total", "counter", "Sequences that waited too long to meet first_token_goal_s."),
    ("preempted", "preemptions_total", "counter", "Running sequences whose blocks were taken."),
    ("kv_blocks_total", "kv_blocks", "gauge", "KV blocks."),
    ("kv_blocks_used", "kv_blocks_used", "gauge", "KV blocks of running sequences."),
    ("kv_blocks_cached", "kv_blocks_cached", "gauge", "KV blocks that the prefix cache can find."),
    ("encoder_rows_held", "embedding_rows", "gauge", "Embedding rows held until they are computed."),
    ("prompt_tokens", "prompt_tokens_total", "counter", "Tokens of prompts."),
    ("cached_tokens", "cached_tokens_total", "counter", "Tokens of prompts from the prefix cache."),
    ("computed_tokens", "computed_tokens_total", "counter", "Tokens computed, again after preemption too."),
    ("output_tokens", "output_tokens_total", "counter", "Tokens sampled."),
    ("requests_finished", "requests_finished_total", "counter", "Requests that ran to their end."),
    ("queue_time_s", "queue_time_seconds", "histogram", "Time from a request's arrival to its slot."),
    (
        "time_to_first_token_s",
        "time_to_first_token_seconds",
        "histogram",
        "Time from a request's arrival at the engine to its first token.",
    ),
    (
        "time_between_tokens_s",
        "time_between_tokens_seconds",
        "histogram",
        "Time between two tokens of a sequence in the engine.",
    ),
)

#: Of :meth:`engine.encoder.EncoderEngine.metrics`.
_ENCODER: tuple[_Row, ...] = (
    ("items", "items_total", "counter", "Images and videos encoded."),
    ("rows", "visual_tokens_total", "counter", "Embedding rows made."),
    ("patches", "patches_total", "counter", "Patches encoded."),
    ("failures", "failures_total", "counter", "Launches that raised."),
    ("late", "late_items_total", "counter", "Items that waited too long to meet first_token_goal_s."),
    ("cache_hits", "cache_hits_total", "counter", "Items answered from the cache."),
    ("joined", "joined_total", "counter", "Items answered by the encoding of an equal item in flight."),
    ("seconds", "busy_seconds_total", "counter", "Time spent encoding."),
    ("rest_seconds", "rest_seconds_total", "counter", "Time rested because of duty_cycle."),
    ("pending_rows", "pending_visual_tokens", "gauge", "Embedding rows of items that wait or are encoded."),
    ("cached_items", "cached_items", "gauge", "Items in the cache."),
    ("cached_bytes", "cached_bytes", "gauge", "Bytes of the cache."),
)


#: Of :meth:`engine.prepared_items.PreparedItems.metrics`.
_PREPARED: tuple[_Row, ...] = (
    ("cache_hits", "cache_hits_total", "counter", "Items that were not prepared again."),
    ("cache_misses", "cache_misses_total", "counter", "Items that were not in the cache."),
    ("cached_items", "cached_items", "gauge", "Prepared items in the cache."),
    ("cached_bytes", "cached_bytes", "gauge", "Bytes of the cache of prepared items."),
)


def prepared_families(snapshot: Mapping[str, Any]) -> list[Family]:
    """Metrics of a preprocessor's cache."""
    return _families("sightline_preprocessor_", _PREPARED, snapshot)


def engine_families(snapshot: Mapping[str, Any]) -> list[Family]:
    """Metrics of an engine."""
    used, blocks = snapshot["kv_blocks_used"], snapshot["kv_blocks_total"]
    ratio = Family.of(
        "sightline_engine_kv_usage_ratio",
        "gauge",
        "Share of the KV blocks that running sequences have.",
        used / blocks if blocks else 0.0,
    )
    return [*_families("sightline_engine_", _ENGINE, snapshot), ratio]


def encoder_families(snapshot: Mapping[str, Any]) -> list[Family]:
    """Metrics of an encoder."""
    return _families("sightline_encoder_", _ENCODER, snapshot)


def _families(prefix: str, rows: tuple[_Row, ...], snapshot: Mapping[str, Any]) -> list[Family]:
    return [Family.of(prefix + name, kind, text, snapshot[key]) for key, name, kind, text in rows]
