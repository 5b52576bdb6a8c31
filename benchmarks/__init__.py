"""Speed of Sightline's parts and of the whole. Each module runs alone: ``python -m benchmarks.offline``."""
