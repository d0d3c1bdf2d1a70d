"""A transformers model that goes on with many rows, a token at a time; rows can be left, repeated and reordered.

Shape suffixes: B = prompts, R = running rows, S = tokens, V = vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megatron_ads.evaluation.padding import left_padded


class RunningRows:
    """Rows that are being written, and what the model remembers of them."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_token: int) -> None:
        """Read the prompts."""
        self._model = model
        self._cache = DynamicCache(config=model.config)
        tokens_BS, self._mask_RS = (tensor.to(model.device) for tensor in left_padded(prompts, pad_token))
        # Positions count from the first token that is not padding.
        positions_BS = (self._mask_RS.cumsum(1) - 1).clamp(min=0)
        self.logits_RV = self._read(tokens_BS, positions_BS)
        """What the model thinks of the next token of every row, in FP32."""

    def go_on(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on with ``rows``, numbers of running rows in any order, a token each; the others are left."""
        if list(rows) != list(range(len(self._mask_RS))):
            rows_R = torch.tensor(rows, device=self._mask_RS.device)
            self._cache.reorder_cache(rows_R)
            self._mask_RS = self._mask_RS[rows_R]
        self._mask_RS = torch.cat([self._mask_RS, self._mask_RS.new_ones(len(rows), 1)], 1)
        tokens_R1 = torch.tensor(tokens, device=self._mask_RS.device)[:, None]
        self.logits_RV = self._read(tokens_R1, self._mask_RS.sum(1, keepdim=True) - 1)

    def _read(self, tokens_RS: Tensor, positions_RS: Tensor) -> Tensor:
        output = self._model(
            tokens_RS,
            attention_mask=self._mask_RS,
            position_ids=positions_RS,
            past_key_values=self._cache,
            logits_to_keep=1,
        )
        logits_RV: Tensor = output.logits[:, -1].float()
        return logits_RV
