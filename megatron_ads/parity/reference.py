"""The Hugging Face side: transformers' own models, whole or one layer at a time, loaded by transformers' own loader.

Shape suffixes: S = tokens of a row, C = hidden width, T = tokens, E = experts, K = experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers import logging as transformers_logging

from conversion.hf_folder import HfFolder, LayerTensors, layer_tensors, outside_tensors
from megatron_ads.errors import ConversionError
from megatron_ads.inference.language_model import missing_weights, transformers_config

_CLASSES = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
_V3 = (DeepseekV3Config, DeepseekV3ForCausalLM)  # kimi_k2 has the same architecture
_OF_THE_WHOLE_MODEL = (
    "architectures", "auto_map", "quantization_config", "torch_dtype", "dtype", "transformers_version",
    "layer_types",  # one for each layer, and all are the same
    "model_type",  # transformers finds how to fuse the experts by that of its own class
)  # fmt: skip


def load_model(folder: Path, dtype: torch.dtype, *, attention: str | None = None) -> Any:
    """Load a whole model to evaluate, on the CPU; ``attention`` is transformers' name of a kernel, None its choice.

    Raises:
        ConversionError: If transformers would make up a weight.
    """
    _silence()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=transformers_config(folder),
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if missing := missing_weights(model, report):
        raise ConversionError(f"{folder} lacks {missing[0]}, which transformers needs.")
    return model.eval()


def _silence() -> None:
    """Have transformers not list every tensor of the MTP layers, which it never loads."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class RouterScores:
    """What a router saw and did, (T, E)."""

    weights_TE: Tensor
    """Zero where an expert was not chosen."""
    logits_TE: Tensor


class ReferenceLayer:
    """One loaded layer."""

    def __init__(self, model: Any, tensors: LayerTensors, dtype: torch.dtype, epsilon: float) -> None:
        self._model = model
        self._around = {word: tensor.to(dtype) for word, tensor in tensors.around.items()}
        self._epsilon = epsilon
        model.model.norm = torch.nn.Identity()

    @torch.no_grad()
    def decode(self, hidden_SC: Tensor) -> Tensor:
        """Return the output of the layer for one row."""
        output: Tensor = self._model.model(inputs_embeds=hidden_SC[None], use_cache=False).last_hidden_state
        return output[0]

    @torch.no_grad()
    def predict(self, tokens_S: Tensor, hidden_SC: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output of an MTP layer, behind its norm: arXiv:2412.19437, eq. 21 and 22."""
        next_S = torch.cat([tokens_S[1:], tokens_S.new_zeros(1)])

        def norm(word: str, x: Tensor) -> Tensor:
            return rms_norm(x, self._around[word], self._epsilon)

        joined = linear(
            torch.cat([norm("enorm", embed(next_S)), norm("hnorm", hidden_SC)], -1), self._around["eh_proj"]
        )
        return norm("norm", self.decode(joined))

    def watch_router(self, watch: Callable[[RouterScores], None]) -> None:
        """Have ``watch`` called after every pass of a layer with experts."""

        def hook(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, weights_TK, experts_TK = output
            weights_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter(1, experts_TK, weights_TK.float())
            watch(RouterScores(weights_TE, logits_TE.float()))

        router = getattr(self._model.model.layers[0].mlp, "gate", None)
        if router is not None:
            router.register_forward_hook(hook)


class Reference:
    """A checkpoint of which one layer at a time is in memory."""

    def __init__(self, folder: HfFolder, dtype: torch.dtype, device: torch.device) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._outside = {word: tensor.to(device, dtype) for word, tensor in outside_tensors(folder).items()}
        _silence()

    def embed(self, tokens_S: Tensor) -> Tensor:
        """Return (S, C)."""
        return embedding(tokens_S, self._outside["embedding"])

    def final_norm(self, hidden_SC: Tensor) -> Tensor:
        """Return the output of the model behind its last norm."""
        return rms_norm(hidden_SC, self._outside["norm"], self._folder.shape.rms_norm_eps)

    def logits(self, normed_SC: Tensor) -> Tensor:
        """Return (S, vocabulary), FP32."""
        return linear(normed_SC, self._outside["head"]).float()

    def layer(self, layer: int) -> ReferenceLayer:
        """Load one layer; numbers from ``num_layers`` on are the MTP layers.

        Raises:
            ConversionError: If transformers would make up a weight of it.
        """
        tensors = layer_tensors(self._folder, layer)
        config = {name: value for name, value in self._folder.config.items() if name not in _OF_THE_WHOLE_MODEL}
        config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config |= {"num_hidden_layers": 1, "vocab_size": 1}
        if self._folder.shape.num_experts:
            config["first_k_dense_replace"] = int(not self._folder.shape.is_moe_layer(layer))
        config_class, model_class = _CLASSES.get(self._folder.shape.model_type, _V3)
        model, report = model_class.from_pretrained(
            None,
            config=config_class(**config),
            state_dict=dict(tensors.decoder),
            dtype=self._dtype,
            attn_implementation="eager",
            output_loading_info=True,
        )
        if missing := [name for name in missing_weights(model, report) if ".layers." in name]:
            raise ConversionError(f"Layer {layer} of {self._folder.path} lacks {missing[0]}, which transformers needs.")
        return ReferenceLayer(model.eval().to(self._device), tensors, self._dtype, self._folder.shape.rms_norm_eps)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return ``weight * x / sqrt(mean(x^2) + epsilon)``, the quotient in FP32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)
