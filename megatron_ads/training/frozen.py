"""Keep the parts of a model that `model.frozen` lists as loaded."""

from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from conversion.layer_specs import LayerSpec
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart
from megatron_ads.models.lora import begin_gradients_at_embedding
from megatron_ads.models.parts import part_of
from megatron_ads.models.weights import named_weights


def freeze(chunks: Sequence[GPTModel], parts: Iterable[FrozenPart], shape: ModelShape, spec: LayerSpec) -> None:
    """Stop training the parameters of ``parts``. Call it before the gradient buffers are made."""
    frozen = set(parts)
    for weight in named_weights(chunks, spec):
        if part_of(weight.canonical[0], shape) in frozen and isinstance(weight.tensor, torch.nn.Parameter):
            weight.tensor.requires_grad_(False)
    if FrozenPart.embedding in frozen:
        for chunk in chunks:
            begin_gradients_at_embedding(chunk)
