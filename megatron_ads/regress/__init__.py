"""Public benchmarks before and after: has a checkpoint lost what it could do? lm-eval asks, an engine answers."""
