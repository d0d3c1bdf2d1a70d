"""Hugging Face <-> Megatron-Core conversion of DeepSeek-V3-family checkpoints, with torch and safetensors only."""
