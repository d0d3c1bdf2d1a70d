"""A Hugging Face checkpoint run by transformers on this machine: load it, and ask how probable a text is.

Shape suffixes: B = texts or prompts, R = running rows, S = tokens, V = vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DynamicCache, PreTrainedConfig
from transformers import logging as transformers_logging

from megatron_ads.errors import ConversionError
from megatron_ads.inference.latent_decoding import attend_to_latents


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Return the model, on a GPU where there is one.

    ``dtype`` None computes in the stored format on a GPU, in FP32 on a CPU, where BF16 is slower.

    Raises:
        ConversionError: If transformers cannot load the folder, or would have to make up weights.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # It reports the MTP layer, which transformers never loads, as an unexpected key at every load.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=transformers_config(folder),
            dtype=dtype or (torch.float32 if device.type == "cpu" else "auto"),
            local_files_only=True,
            output_loading_info=True,
        )
    # transformers raises TypeError, AttributeError, RuntimeError and others for settings and shapes it did not expect.
    except Exception as error:
        raise ConversionError(f"transformers cannot load {folder}: {error}") from error
    if missing := missing_weights(model, report):
        raise ConversionError(
            f"{folder} lacks {len(missing)} weights that the model needs, {missing[0]} among them; export it again."
        )
    attend_to_latents(model)
    return model.eval().to(device)


def transformers_config(folder: Path) -> Any:
    """Return transformers' own configuration of a checkpoint, without the code that may come with it.

    Raises:
        OSError, ValueError: If transformers does not know the model.
    """
    values, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    if values.get("model_type") == "kimi_k2":  # DeepSeek-V3's architecture; transformers does not know the name
        return DeepseekV3Config.from_dict(values | {"model_type": DeepseekV3Config.model_type})
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def missing_weights(model: Any, report: Mapping[str, Any]) -> list[str]:
    """Return the weights that transformers made up; one without values (no shared experts) is not missing."""
    return sorted(name for name in report["missing_keys"] if model.state_dict()[name].numel())


@torch.inference_mode()
def log_probabilities(
    model: Any, befores: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_token: int
) -> list[list[float]]:
    """Return log P(y_t | before, y_<t), in nats, of every token of every answer.

    Each answer and what comes before it has at least one token; shorter texts are padded from the left.
    """
    if not answers:
        return []
    # The last token of an answer need not be read. Where only that one differs, as between the letters of a question
    # with choices, the text is read once.
    reads = [(*before, *answer[:-1]) for before, answer in zip(befores, answers, strict=True)]
    places = {read: place for place, read in enumerate(dict.fromkeys(reads))}
    tokens_BS, mask_BS = (tensor.to(model.device) for tensor in left_padded([*places], pad_token))
    # All texts end in the last column, so logits are made for the last columns only, not for the whole prompt.
    logits_BSV = model(
        tokens_BS,
        attention_mask=mask_BS,
        position_ids=(mask_BS.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=max(map(len, answers)),
        use_cache=False,
    ).logits
    chances_BSV = logits_BSV.float().log_softmax(-1)
    found = []
    for read, answer in zip(reads, answers, strict=True):
        said_S1 = torch.tensor(answer, device=model.device)[:, None]
        found.append(chances_BSV[places[read], -len(answer) :].gather(1, said_S1)[:, 0].tolist())
    return found


def left_padded(prompts: Sequence[Sequence[int]], pad_token: int) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, each (B, S): every prompt ends in the last column."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    tokens_BS = pad_sequence(rows, batch_first=True, padding_value=pad_token, padding_side="left")
    return tokens_BS, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")


class RunningRows:
    """Rows that are being written, and what the model remembers of them: ``samples`` consecutive ones a prompt."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], pad_token: int, *, samples: int = 1) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        tokens_BS, self._mask_RS = (tensor.to(model.device) for tensor in left_padded(prompts, pad_token))
        # Positions count from the first token that is not padding.
        positions_BS = (self._mask_RS.cumsum(1) - 1).clamp(min=0)
        self.logits_RV = self._read(tokens_BS, positions_BS)
        """What the model thinks of the next token of every row, in FP32."""
        if samples > 1:  # a prompt is read once, however often it is continued
            self._cache.batch_repeat_interleave(samples)
            self._mask_RS = self._mask_RS.repeat_interleave(samples, 0)
            self.logits_RV = self.logits_RV.repeat_interleave(samples, 0)

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
