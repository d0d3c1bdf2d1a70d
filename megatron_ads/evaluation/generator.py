"""Generation from a Hugging Face checkpoint folder with transformers, a batch at a time, on whatever device is there.

This is deliberately not the trainer's own model: what is evaluated is what a user of the exported folder gets. How to
decode is said here and nowhere else: a checkpoint's generation_config.json plays no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import logging as transformers_logging

from megatron_ads.errors import ConversionError
from megatron_ads.evaluation.beam_rules import AnyToken, Rules
from megatron_ads.evaluation.beam_search import Beam, RowSearch, search_beams
from megatron_ads.evaluation.decoding import GREEDY, Decoding, Method
from megatron_ads.evaluation.padding import left_padded


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote behind one prompt."""

    tokens: list[int]
    """Without the end token."""
    ended: bool
    """The model ended it; False: it was cut off at the limit."""


class Generator:
    """A loaded checkpoint; let it ``complete`` or find ``beams`` as often as you like."""

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
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(folder, dtype or (torch.float32 if device.type == "cpu" else "auto")).to(device)
        self._end_token, self._pad_token = end_token, pad_token

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, how: Decoding = GREEDY, draw: int = 0
    ) -> list[Completion]:
        """Continue every prompt, greedily or sampled; ``draw`` decides, with these prompts, what is sampled."""
        sampling = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0, "do_sample": True}
        tokens_BS, mask_BS = left_padded(prompts, self._pad_token)
        with torch.random.fork_rng():
            torch.manual_seed(draw)
            output_BS = self._model.generate(
                input_ids=tokens_BS.to(self._model.device),
                attention_mask=mask_BS.to(self._model.device),
                max_new_tokens=max_new_tokens,
                **(sampling if how.method is Method.sampled else {"do_sample": False}),
                use_cache=True,
                eos_token_id=self._end_token,
                pad_token_id=self._pad_token,
            )
        return [self._until_end(row) for row in output_BS[:, tokens_BS.size(1) :].tolist()]

    def beams(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        how: Decoding,
        max_new_tokens: int,
        rules: Sequence[Rules] | None = None,
    ) -> list[list[Beam]]:
        """Return the best beams of every prompt, the best first.

        Args:
            prompts: In tokens.
            how: How many beams, and what they are compared by.
            max_new_tokens: Longest beam; not counting the end token.
            rules: What each row may say; None: anything.
        """
        searches = [
            RowSearch(
                rules[row] if rules else AnyToken(how.beams),
                beams=how.beams,
                limit=max_new_tokens + 1,
                end_token=self._end_token,
                length=how.length,
            )
            for row in range(len(prompts))
        ]
        return search_beams(self._model, prompts, searches, pad_token=self._pad_token)

    def _until_end(self, tokens: list[int]) -> Completion:
        if self._end_token in tokens:
            return Completion(tokens[: tokens.index(self._end_token)], ended=True)
        return Completion(tokens, ended=False)


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
    model.generation_config = GenerationConfig()
    return model.eval()
