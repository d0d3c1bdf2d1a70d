"""Which parameters `model.frozen` keeps as loaded."""

import re
from collections.abc import Iterable, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from conversion.layer_specs import LayerSpec
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart
from megatron_ads.models.gpt import begin_gradients_at_embedding
from megatron_ads.models.naming import named_weights

_PARTS = (
    (r"mtp\..+", FrozenPart.mtp),
    (r"embedding\..+", FrozenPart.embedding),
    (r"output_layer\..+|decoder\.final_layernorm\..+", FrozenPart.output),
    (r".+\.(self_attention|input_layernorm)\..+", FrozenPart.attention),
    (r".+\.mlp\.router\..+", FrozenPart.router),
    (r".+\.mlp\.shared_experts\..+", FrozenPart.shared_experts),
    (r".+\.mlp\.experts\..+", FrozenPart.experts),
    (r".+\.mlp\.linear_fc[12]\..+", FrozenPart.dense),
)
_NORM_BEFORE_FEED_FORWARD = re.compile(r"decoder\.layers\.(\d+)\.pre_mlp_layernorm\..+")


def part_of(canonical: str, shape: ModelShape) -> FrozenPart | None:
    """Return the part a canonical parameter belongs to; None for the norm before an MoE layer, always trained."""
    for pattern, part in _PARTS:
        if re.fullmatch(pattern, canonical):
            return part
    norm = _NORM_BEFORE_FEED_FORWARD.fullmatch(canonical)
    return FrozenPart.dense if norm and not shape.is_moe_layer(int(norm[1])) else None


def freeze(chunks: Sequence[GPTModel], parts: Iterable[FrozenPart], shape: ModelShape, spec: LayerSpec) -> None:
    """Stop training the parameters of ``parts``. Call it before the gradient buffers are made."""
    frozen = set(parts)
    for weight in named_weights(chunks, spec):
        if part_of(weight.canonical[0], shape) in frozen and isinstance(weight.tensor, torch.nn.Parameter):
            weight.tensor.requires_grad_(False)
    if FrozenPart.embedding in frozen:
        for chunk in chunks:
            begin_gradients_at_embedding(chunk)
