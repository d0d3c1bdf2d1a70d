"""How many parameters each rank holds, by what they are for; counted from the table the conversion writes by."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from conversion.names import Parameter, ParameterKind, layer_parameters, outside_parameters, slice_shape
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, LoraTarget
from megatron_ads.layout import Chunk
from megatron_ads.models.adapter_shapes import Lora, target_of
from megatron_ads.models.parts import part_of
from megatron_ads.planning.job import Job


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one rank that share their fate: what they belong to, and over which ranks they are replicated."""

    part: FrozenPart | LoraTarget | None
    """What of ``model.frozen`` they belong to, or of ``model.lora.targets`` the adapters beside them; None for the norm
    before a mixture of experts, which none of the parts holds."""
    expert: bool
    """Routed experts: replicated over the expert-data-parallel ranks, not over all data-parallel ones."""
    elements: int


def stage_weights(job: Job, stage: int) -> tuple[Weights, ...]:
    """Return what each rank of a pipeline stage holds; all its ranks hold equally much.

    Router biases are not counted: they are buffers, not parameters.
    """
    return tuple(weight for chunk in job.placement.stage_chunks(stage) for weight in chunk_weights(job, chunk))


def chunk_weights(job: Job, chunk: Chunk) -> Iterator[Weights]:
    """Yield what each rank that runs ``chunk`` holds of it."""
    shape, sizes = job.shape, job.layout
    embedding, final_norm, output = outside_parameters(shape)
    if chunk.needs_embedding:
        yield Weights(FrozenPart.embedding, False, _elements([embedding], sizes.tp))
    for layer in (*chunk.layers, *(shape.num_layers + mtp for mtp in chunk.mtp_layers)):
        yield from _layer_weights(shape, _representative(shape, layer), sizes.tp, sizes.ep, sizes.etp, job.lora)
    if chunk.has_loss:
        yield Weights(FrozenPart.output, False, _elements([output], sizes.tp))
    holds_last_layer = shape.num_layers - 1 in chunk.layers
    if holds_last_layer if shape.mtp_layers else chunk.has_loss:
        yield Weights(FrozenPart.output, False, _elements([final_norm], sizes.tp))


def total(weights: Iterable[Weights], *, expert: bool | None = None) -> int:
    """Return the elements of all ``weights``, or of those that are (not) routed experts."""
    return sum(weight.elements for weight in weights if expert is None or weight.expert is expert)


def largest_tensor(job: Job, stage: int) -> int:
    """Return the elements of the largest trained parameter on a rank: stacked experts, or a vocabulary matrix."""
    shape, sizes = job.shape, job.layout
    if job.lora is not None:  # the wider factor of a feed-forward's projections
        experts = shape.num_experts // sizes.ep * max(shape.hidden_size, 2 * shape.expert_ffn_size)
        return job.lora.rank * max(experts, 2 * shape.dense_ffn_size)
    chunks = job.placement.stage_chunks(stage)
    sizes_of_tensors = [shape.dense_ffn_size * shape.hidden_size * 2 // sizes.tp]
    if any(chunk.needs_embedding or chunk.has_loss for chunk in chunks):
        sizes_of_tensors.append(shape.vocab_size * shape.hidden_size // sizes.tp)
    if stage not in job.placement.expert_less_stages(shape):
        local = shape.num_experts // sizes.ep
        sizes_of_tensors.append(local * 2 * shape.expert_ffn_size // sizes.etp * shape.hidden_size)
    return max(sizes_of_tensors)


def _representative(shape: ModelShape, layer: int) -> int:
    """Return the first layer of the same kind: dense, mixture of experts, or MTP."""
    if layer >= shape.num_layers:
        return shape.num_layers
    return shape.first_dense_layers if shape.is_moe_layer(layer) else 0


@lru_cache(maxsize=512)
def _layer_weights(shape: ModelShape, layer: int, tp: int, ep: int, etp: int, lora: Lora | None) -> tuple[Weights, ...]:
    counts: Counter[tuple[FrozenPart | None, bool]] = Counter()
    adapters: Counter[tuple[LoraTarget | None, bool]] = Counter()
    for parameter in layer_parameters(shape, layer):
        if parameter.kind is ParameterKind.ROUTER_BIAS:
            continue
        expert = parameter.expert is not None
        if parameter.expert is None or parameter.expert < shape.num_experts // ep:
            size = etp if expert else tp
            counts[part_of(parameter.name, shape), expert] += _elements([parameter], size)
            if lora is not None and lora.adapts(parameter):
                adapters[target_of(parameter.name), expert] += lora.elements(parameter, size)
    # Two counters: a part and a target of one name are equal keys.
    found = (*counts.items(), *adapters.items())
    return tuple(Weights(part, expert, count) for (part, expert), count in found)


def _elements(parameters: Iterable[Parameter], size: int) -> int:
    return sum(math.prod(slice_shape(parameter, size)) for parameter in parameters)
