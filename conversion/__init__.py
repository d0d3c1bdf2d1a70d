"""Hugging Face <-> Megatron-Core conversion of checkpoints, with torch and safetensors only."""
