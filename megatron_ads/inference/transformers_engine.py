"""Generation from a Hugging Face checkpoint folder with transformers, a batch at a time, on whatever device is there.

This is deliberately not the trainer's own model: what is evaluated is what a user of the exported folder gets. How to
decode is said here and nowhere else: a checkpoint's generation_config.json plays no part.

Shape suffixes: R = running rows, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ads.config.generation import GREEDY, Decoding, Method
from megatron_ads.inference.beam_rules import AnyToken, Rules
from megatron_ads.inference.beam_search import Beam, RowSearch, search_beams
from megatron_ads.inference.language_model import RunningRows, load_model, longest_text


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
        self._model = load_model(folder, dtype)
        self._end_token, self._pad_token = end_token, pad_token

    @property
    def longest_text(self) -> int:
        """How many tokens of prompt and answer the model has positions for."""
        return longest_text(self._model)

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, how: Decoding = GREEDY, draw: int = 0
    ) -> list[Completion]:
        """Continue every prompt, greedily or sampled; ``draw`` decides, with these prompts, what is sampled."""
        chance = torch.Generator(self._model.device).manual_seed(draw % 2**63)
        rows = RunningRows(self._model, prompts, self._pad_token)
        written: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        running = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            chosen = next_tokens(rows.logits_RV, how, chance).tolist()
            for number, token in zip(running, chosen, strict=True):
                ended[number] = token == self._end_token
                if not ended[number]:
                    written[number].append(token)
            going_on = [place for place, number in enumerate(running) if not ended[number]]
            running = [running[place] for place in going_on]
            if not running or len(written[running[0]]) == max_new_tokens:
                break
            rows.go_on(going_on, [chosen[place] for place in going_on])
        return [Completion(tokens, at_end) for tokens, at_end in zip(written, ended, strict=True)]

    @torch.inference_mode()
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
        return search_beams(RunningRows(self._model, prompts, self._pad_token), searches)


def next_tokens(logits_RV: Tensor, how: Decoding, chance: torch.Generator) -> Tensor:
    """Return the next token of every row, (R,): the most probable one, or one drawn."""
    if how.method is not Method.sampled:
        return logits_RV.argmax(-1)
    shares_RV, tokens_RV = (logits_RV / how.temperature).softmax(-1).sort(descending=True)
    # The most probable token stays whatever top_p is: before it there is nothing.
    before_RV = shares_RV.cumsum(-1) - shares_RV
    places_R1 = shares_RV.masked_fill(before_RV >= how.top_p, 0.0).multinomial(1, generator=chance)
    return tokens_RV.gather(1, places_R1)[:, 0]
