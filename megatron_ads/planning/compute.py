"""How many floating-point operations each chunk costs: the matrix products, counted from the conversion's table.

A product of (1, m) by (m, n) is 2 m n operations; a backward pass is two forward ones. ``models.flops`` counts the same
for whole models; a test holds the two together.
"""

import math
from functools import lru_cache

from conversion.names import layer_parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import Recompute
from megatron_ads.layout import Chunk
from megatron_ads.planning.job import Job


def forward_flops_per_token(job: Job, chunk: Chunk) -> int:
    """Return the operations of one token's forward pass through a chunk, over all its ranks together."""
    shape = job.shape
    flops = sum(_layer(shape, layer, job.seq_length) for layer in chunk.layers)
    output = 2 * shape.hidden_size * shape.vocab_size
    if chunk.mtp_layers and job.trains_mtp:
        flops += sum(_layer(shape, shape.num_layers + layer, job.seq_length) + output for layer in chunk.mtp_layers)
    return flops + (output if chunk.has_loss else 0)


def recomputed_flops_per_token(job: Job, chunk: Chunk) -> int:
    """Return the operations of one token that the backward pass does again, over all ranks of the chunk."""
    if job.recompute is Recompute.none:
        return 0
    layers = list(chunk.layers)
    if job.trains_mtp:
        layers += [job.shape.num_layers + layer for layer in chunk.mtp_layers]
    whole = sum(_layer(job.shape, layer, job.seq_length) for layer in layers)
    if job.recompute is Recompute.full:
        return whole
    return whole - sum(_kept_by_selective(job.shape, layer) for layer in layers)


def model_flops_per_token(job: Job) -> int:
    """Return the forward and backward operations of one token through the whole model, nothing computed twice."""
    return 3 * sum(forward_flops_per_token(job, chunk) for chunk in job.placement.chunks)


@lru_cache(maxsize=512)
def _layer(shape: ModelShape, layer: int, seq_length: int) -> int:
    products = 0
    for parameter in layer_parameters(shape, layer):
        if len(parameter.shape) == 2 and parameter.expert in (None, 0):
            runs = 1 if parameter.expert is None else shape.experts_per_token
            products += 2 * runs * math.prod(parameter.shape)
    # A causal token sees (S + 1) / 2 keys on average: 2 operations for each channel of the key and of the value.
    return products + (seq_length + 1) * shape.num_heads * (shape.qk_head_dim + shape.v_head_dim)


@lru_cache(maxsize=512)
def _kept_by_selective(shape: ModelShape, layer: int) -> int:
    """Down-projections and the attention's output projection; the MTP layer's eh_proj too."""
    kept = ("linear_q_down_proj", "linear_kv_down_proj", "self_attention.linear_proj", "eh_proj")
    return sum(
        2 * math.prod(parameter.shape)
        for parameter in layer_parameters(shape, layer)
        if any(name in parameter.name for name in kept)
    )
