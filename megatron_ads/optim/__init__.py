"""Optimizer construction, the stub MoE optimizer, learning-rate schedules, and optimizer state in checkpoints."""
