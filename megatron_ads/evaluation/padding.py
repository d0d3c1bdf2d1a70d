"""Prompts of different length in one batch, for generation: padded from the left.

Shape suffixes: B = prompts, S = tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, each (B, S): every prompt ends in the last column."""
    width = max(len(prompt) for prompt in prompts)
    tokens_BS = torch.full((len(prompts), width), pad_token, dtype=torch.long)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BS[row, width - len(prompt) :] = 1
    return tokens_BS, mask_BS
