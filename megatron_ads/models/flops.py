"""How many floating-point operations a token costs: the matrix products, counted from the conversion's table. No torch.

A product of (1, m) by (m, n) is 2 m n operations. The backward pass takes two products for each of the forward pass,
one for the gradient of either factor, so training costs three times the forward pass; weights with adapters need no
gradient. A token in a causal sample of S tokens attends to itself and those before it, (S + 1) / 2 keys on average.
Norms, activations, routing beyond its one product and the softmax are not counted.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from conversion.names import layer_parameters
from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, ModelShape
from megatron_ads.config.model import Recompute
from megatron_ads.models.parts import Lora

KEPT_BY_SELECTIVE = {
    LatentAttentionShape: ("linear_q_down_proj", "linear_kv_down_proj", "self_attention.linear_proj", "eh_proj"),
    GroupedQueryShape: (".self_attention.",),
}
"""Projections that selective recomputation does not run again, by the kind of attention; see ``SELECTIVE_MODULES``."""


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """Operations of one token, over all ranks that work on it together."""

    forward: int
    backward: int
    recomputed: int
    """Forward operations that the backward pass repeats to save memory."""


def flops_per_token(shape: ModelShape, seq_length: int, *, with_mtp: bool = False, lora: Lora | None = None) -> int:
    """Return the forward and backward operations of one token through the whole model, nothing computed twice.

    ``with_mtp`` counts the multi-token-prediction layers and their passes through the output layer too.
    """
    mtp_layers = shape.mtp_layers if with_mtp else 0
    layers = range(shape.num_layers + mtp_layers)
    flops = token_flops(shape, layers, outputs=1 + mtp_layers, seq_length=seq_length, lora=lora)
    return flops.forward + flops.backward


def token_flops(
    shape: ModelShape,
    layers: Iterable[int],
    *,
    outputs: int,
    seq_length: int,
    recompute: Recompute = Recompute.none,
    lora: Lora | None = None,
) -> TokenFlops:
    """Return the operations of one token in some layers.

    Args:
        layers: Global numbers; MTP layers follow the decoder layers.
        outputs: Passes through the output layer.
        seq_length: Tokens of a sample.
        recompute: What the backward pass computes again.
        lora: The adapters that are trained instead of the weights.
    """
    output = outputs * 2 * shape.hidden_size * shape.vocab_size
    weights = adapters = kept = scores = 0
    for layer in layers:
        in_layer = _layer_flops(shape, layer, lora)
        weights += in_layer[0]
        adapters += in_layer[1]
        kept += in_layer[2]
        # 2 operations for each channel of the key and of the value, for (S + 1) / 2 keys.
        scores += (seq_length + 1) * shape.num_heads * (shape.attention.qk_head_dim + shape.attention.v_head_dim)
    inside = weights + adapters + scores
    if isinstance(shape.attention, GroupedQueryShape):
        kept += scores
    forward = inside + output
    recomputed = {Recompute.none: 0, Recompute.selective: inside - kept, Recompute.full: inside}[recompute]
    return TokenFlops(forward, 2 * forward - (0 if lora is None else weights + output), recomputed)


@lru_cache(maxsize=512)
def _layer_flops(shape: ModelShape, layer: int, lora: Lora | None) -> tuple[int, int, int]:
    """Return the operations of a layer's matrices, of its adapters, and of both that selective recomputation keeps."""
    weights = adapters = kept = 0
    for parameter in layer_parameters(shape, layer):
        if len(parameter.shape) != 2 or parameter.expert not in (None, 0):  # one expert represents all
            continue
        runs = 1 if parameter.expert is None else shape.experts_per_token
        product = 2 * runs * math.prod(parameter.shape)
        # 2 r (m + n) for the two factors of a weight of (m, n)
        adapter = 0 if lora is None else 2 * runs * lora.elements(parameter)
        weights += product
        adapters += adapter
        if any(name in parameter.name for name in KEPT_BY_SELECTIVE[type(shape.attention)]):
            kept += product + adapter
    return weights, adapters, kept
