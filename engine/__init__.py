"""Sightline's engine: vision-language models with continuous batching and paged attention, without Ray."""
