"""The ranks that share one language model: their processes, what they are told, and what each computes."""
