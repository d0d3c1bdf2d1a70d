"""The main job in small, from a random checkpoint to a report: what `megatron-ads quickstart` runs."""
