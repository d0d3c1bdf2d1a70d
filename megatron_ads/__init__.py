"""Fine-tune DeepSeek-style mixture-of-experts models on ads tasks with Megatron-Core."""

__version__ = "0.1.0"
