"""Which part of a model each of its parameters belongs to, and which of them a job trains. No torch."""

import math
from collections import Counter

from conversion.names import ParameterKind, parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import FrozenPart, ModelConfig
from megatron_ads.models.adapter_shapes import Lora


def part_of(name: str, shape: ModelShape) -> FrozenPart | None:
    """Return what of ``model.frozen`` a canonical parameter belongs to; a norm belongs to what it stands before.

    None is the norm before a mixture of experts, which belongs to router and experts alike and always trains.
    """
    for words, part in (
        (("mtp.",), FrozenPart.mtp),
        (("embedding.",), FrozenPart.embedding),
        (("output_layer.", "decoder.final_layernorm."), FrozenPart.output),
        ((".self_attention.", ".input_layernorm."), FrozenPart.attention),
        ((".mlp.experts.",), FrozenPart.experts),
        ((".mlp.shared_experts.",), FrozenPart.shared_experts),
        ((".mlp.router.",), FrozenPart.router),
    ):
        if any(word in name for word in words):
            return part
    return None if shape.is_moe_layer(int(name.split(".")[2])) else FrozenPart.dense


def parameters_by_part(shape: ModelShape) -> Counter[FrozenPart | None]:
    """Return how many parameters each part of a model has, each counted once; their sum is the whole model.

    Router biases are buffers and not counted.
    """
    counts: Counter[FrozenPart | None] = Counter()
    for parameter in parameters(shape).values():
        if parameter.kind is not ParameterKind.ROUTER_BIAS:
            counts[part_of(parameter.name, shape)] += math.prod(parameter.shape)
    return counts


def trained_parameters(settings: ModelConfig, shape: ModelShape) -> tuple[int, int]:
    """Return how many parameters a job trains, and how many its model has without adapters."""
    counts = parameters_by_part(shape)
    lora = Lora.of(settings)
    if lora is not None:
        return lora.parameters(shape), counts.total()
    frozen = set(settings.frozen) | (set() if settings.mtp_loss_weight else {FrozenPart.mtp})
    return sum(count for part, count in counts.items() if part not in frozen), counts.total()
