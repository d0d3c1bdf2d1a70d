"""Fine-tune DeepSeek-style mixture-of-experts and dense models on ads tasks with Megatron-Core."""

__version__ = "0.1.0"
