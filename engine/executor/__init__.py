"""The ranks that share one language model: their processes, the messages to them, and their work."""
