"""Greedy generation from a Hugging Face checkpoint folder with transformers, in batches, on whatever device is there.

This is deliberately not the trainer's own model: what is evaluated is what a user of the exported folder gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from megatron_ads.errors import ConversionError
from megatron_ads.observability.progress import Progress


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote behind one prompt."""

    tokens: list[int]
    """Without the end token."""
    ended: bool
    """The model ended it; False: it was cut off at the limit."""


class GreedyGenerator:
    """A loaded checkpoint; call ``complete`` as often as you like."""

    def __init__(self, folder: Path, *, end_token: int, pad_token: int, dtype: torch.dtype | None = None) -> None:
        """Load ``folder``.

        Args:
            folder: A checkpoint that ``transformers`` loads by itself.
            end_token: Generation of a prompt stops here.
            pad_token: Fills shorter prompts from the left; it is masked and never seen.
            dtype: Number format to compute in; None: as stored on a GPU, FP32 on a CPU, where BF16 is slower.

        Raises:
            ConversionError: If transformers cannot load the folder, or would have to make up weights.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(folder, dtype or (torch.float32 if self._device.type == "cpu" else "auto"))
        self._end_token, self._pad_token = end_token, pad_token
        self._model.to(self._device)

    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_size: int = 64, description: str = ""
    ) -> list[Completion]:
        """Return the most probable continuation of every prompt, in the order of ``prompts``.

        Prompts of like length share a batch, so that little is padded; shows a progress bar.
        """
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        done: dict[int, Completion] = {}
        with Progress(len(prompts), description=description, unit="row") as progress:
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                completions = self._complete_batch([prompts[index] for index in batch], max_new_tokens)
                done.update(zip(batch, completions, strict=True))
                progress.update(len(batch))
        return [done[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def _complete_batch(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Completion]:
        tokens_BS, mask_BS = left_padded(prompts, self._pad_token)
        output_BS = self._model.generate(
            input_ids=tokens_BS.to(self._device),
            attention_mask=mask_BS.to(self._device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=self._end_token,
            pad_token_id=self._pad_token,
        )
        return [self._until_end(row) for row in output_BS[:, tokens_BS.size(1) :].tolist()]

    def _until_end(self, tokens: list[int]) -> Completion:
        if self._end_token in tokens:
            return Completion(tokens[: tokens.index(self._end_token)], ended=True)
        return Completion(tokens, ended=False)


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, each (B, S): every prompt ends in the last column."""
    width = max(len(prompt) for prompt in prompts)
    tokens_BS = torch.full((len(prompts), width), pad_token, dtype=torch.long)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask_BS[row, width - len(prompt) :] = 1
    return tokens_BS, mask_BS


def _load(folder: Path, dtype: torch.dtype | str) -> Any:
    # It reports the MTP layer, which transformers never loads, as an unexpected key at every load.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ConversionError(f"transformers cannot load {folder}: {error}") from None
    if missing := sorted(report["missing_keys"]):
        raise ConversionError(
            f"{folder} lacks {len(missing)} weights that the model needs, {missing[0]} among them; export it again."
        )
    return model.eval()
