"""The token rows that a parity check runs."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ads.data.tokenizer import load_tokenizer
from megatron_ads.errors import DataError


def read_prompts(file: Path, folder: Path, *, max_tokens: int) -> list[Tensor]:
    """Return a row of tokens for each line of ``file``, cut at ``max_tokens``; ``folder`` has the tokenizer.

    Raises:
        DataError: If the file is missing or empty, or there is no tokenizer.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"--prompts {file} cannot be read: {error.strerror}.") from None
    if not lines:
        raise DataError(f"--prompts {file} holds no line of text; write one prompt a line.")
    tokenizer = load_tokenizer(folder)
    return [torch.tensor(tokenizer.encode(line)[:max_tokens], dtype=torch.long) for line in lines]


def random_prompts(vocabulary: int, *, count: int, tokens: int, seed: int = 1) -> list[Tensor]:
    """Return ``count`` rows of random tokens: every embedding and expert has a chance to be met."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (tokens,), generator=generator) for _ in range(count)]
