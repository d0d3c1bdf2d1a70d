"""How many floating-point operations each chunk costs: the matrix products, counted from the conversion's table.

A product of (1, m) by (m, n) is 2 m n operations; a backward pass is two such, one of them for the gradient of the
weight, which a frozen one does without. ``models.flops`` counts the same for whole models; a test holds the two
together.
"""

import math
from functools import lru_cache

from conversion.names import Parameter, layer_parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import Recompute
from megatron_ads.layout import Chunk
from megatron_ads.models.adapter_shapes import Lora
from megatron_ads.planning.job import Job

KEPT_BY_SELECTIVE = ("linear_q_down_proj", "linear_kv_down_proj", "self_attention.linear_proj", "eh_proj")
"""Projections that selective recomputation does not run again."""


def forward_flops_per_token(job: Job, chunk: Chunk) -> int:
    """Return the operations of one token's forward pass through a chunk, over all its ranks together."""
    layers = _layers(job, chunk)
    flops = sum(_weights(job.shape, layer) + _adapters(job.shape, layer, job.lora) for layer in layers)
    return flops + len(layers) * _scores(job.shape, job.seq_length) + _outputs(job, chunk)


def backward_flops_per_token(job: Job, chunk: Chunk) -> int:
    """Return the operations of one token's backward pass, nothing computed again: twice those of the forward pass.

    Where adapters are trained, gradients of the weights beside them are left out.
    """
    twice = 2 * forward_flops_per_token(job, chunk)
    if job.lora is None:
        return twice
    return twice - sum(_weights(job.shape, layer) for layer in _layers(job, chunk)) - _outputs(job, chunk)


def recomputed_flops_per_token(job: Job, chunk: Chunk) -> int:
    """Return the operations of one token that the backward pass does again, over all ranks of the chunk."""
    if job.recompute is Recompute.none:
        return 0
    again = forward_flops_per_token(job, chunk) - _outputs(job, chunk)
    if job.recompute is Recompute.full:
        return again
    kept = [parameter for layer in _layers(job, chunk) for parameter in _kept_by_selective(job.shape, layer)]
    return again - sum(_product(parameter, job.shape) + _beside(parameter, job.shape, job.lora) for parameter in kept)


def model_flops_per_token(job: Job) -> int:
    """Return the forward and backward operations of one token through the whole model, nothing computed twice."""
    return sum(
        forward_flops_per_token(job, chunk) + backward_flops_per_token(job, chunk) for chunk in job.placement.chunks
    )


def _layers(job: Job, chunk: Chunk) -> list[int]:
    """Return the layers that are run; MTP layers count on from the others."""
    mtp_layers = chunk.mtp_layers if job.trains_mtp else ()
    return [*chunk.layers, *(job.shape.num_layers + layer for layer in mtp_layers)]


def _outputs(job: Job, chunk: Chunk) -> int:
    """One pass through the output layer, and one for each MTP layer."""
    passes = chunk.has_loss + (len(chunk.mtp_layers) if job.trains_mtp else 0)
    return passes * 2 * job.shape.hidden_size * job.shape.vocab_size


def _scores(shape: ModelShape, seq_length: int) -> int:
    """A causal token sees (S + 1) / 2 keys on average: 2 operations for each channel of the key and of the value."""
    return (seq_length + 1) * shape.num_heads * (shape.qk_head_dim + shape.v_head_dim)


@lru_cache(maxsize=512)
def _weights(shape: ModelShape, layer: int) -> int:
    return sum(_product(parameter, shape) for parameter in _run_parameters(shape, layer))


@lru_cache(maxsize=512)
def _adapters(shape: ModelShape, layer: int, lora: Lora | None) -> int:
    return sum(_beside(parameter, shape, lora) for parameter in _run_parameters(shape, layer))


def _run_parameters(shape: ModelShape, layer: int) -> list[Parameter]:
    """Return the matrices of a layer, and of one expert for all of them."""
    return [
        parameter
        for parameter in layer_parameters(shape, layer)
        if len(parameter.shape) == 2 and parameter.expert in (None, 0)
    ]


def _runs(parameter: Parameter, shape: ModelShape) -> int:
    return 1 if parameter.expert is None else shape.experts_per_token


def _product(parameter: Parameter, shape: ModelShape) -> int:
    return 2 * _runs(parameter, shape) * math.prod(parameter.shape)


def _beside(parameter: Parameter, shape: ModelShape, lora: Lora | None) -> int:
    """The products with both factors of the adapter beside a weight: one operation of each kind for each value."""
    return 0 if lora is None else 2 * _runs(parameter, shape) * lora.elements(parameter)


def _kept_by_selective(shape: ModelShape, layer: int) -> list[Parameter]:
    return [
        parameter
        for parameter in _run_parameters(shape, layer)
        if any(name in parameter.name for name in KEPT_BY_SELECTIVE)
    ]
