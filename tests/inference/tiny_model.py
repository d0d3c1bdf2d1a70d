"""Llamas of two layers with the demo tokenizer, as checkpoint folders: a random one, and one that was taught."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ads.data.chat import render_prompt
from megatron_ads.rows import Message, Role
from tests.data.tokenizers import VOCAB_SIZE, tokenizer_in

POSITIONS = 512


def write_tiny_model(folder: Path, *, seed: int = 5) -> Path:
    """Write the random one and return the folder."""
    _llama(seed, width=0.2).save_pretrained(folder)
    tokenizer_in(folder)
    return folder


def write_taught_model(folder: Path, said: Sequence[tuple[str, str]], *, steps: int = 80) -> Path:
    """Write one that was trained on prompts and their answers until its greedy answers are these.

    Raises:
        AssertionError: If it did not learn them.
    """
    import torch

    tokenizer = tokenizer_in(folder)
    prompts = [tokenizer.encode(render_prompt([Message(Role.user, question)], tokenizer)) for question, _ in said]
    answers = [[*tokenizer.encode(answer), tokenizer.end_token_id] for _, answer in said]
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    tokens_BS = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    labels_BS = torch.full_like(tokens_BS, -100)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        labels_BS[row, len(prompt) : len(text)] = tokens_BS[row, len(prompt) : len(text)]
    model = _llama(5, width=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(tokens_BS, labels=labels_BS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said_BS = model(tokens_BS).logits[:, :-1].argmax(-1)
    taught_BS = labels_BS[:, 1:] != -100
    assert bool((said_BS == labels_BS[:, 1:])[taught_BS].all()), f"the loss is still {loss:.3g}"
    model.save_pretrained(folder)
    return folder


def _llama(seed: int, *, width: float) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=width, bos_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip
