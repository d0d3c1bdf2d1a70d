"""A random Llama of two layers with the demo tokenizer, as a checkpoint folder."""

from pathlib import Path

from tests.data.tokenizers import VOCAB_SIZE, tokenizer_in

POSITIONS = 512


def write_tiny_model(folder: Path, *, seed: int = 5) -> Path:
    """Write it and return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_in(folder)
    return folder
