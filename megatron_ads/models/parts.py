"""Which part of a model each of its parameters belongs to, and which of them a job trains. No torch."""

import math

from conversion.names import Parameter, ParameterKind, parameters
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


def trained_parameters(settings: ModelConfig, shape: ModelShape) -> tuple[int, int]:
    """Return how many parameters a job trains, and how many its model has without adapters; each counted once."""
    weights = {weight.name: math.prod(weight.shape) for weight in _weights(shape)}
    lora = Lora.of(settings)
    if lora is not None:
        return lora.parameters(shape), sum(weights.values())
    frozen = set(settings.frozen) | (set() if settings.mtp_loss_weight else {FrozenPart.mtp})
    trained = sum(count for name, count in weights.items() if part_of(name, shape) not in frozen)
    return trained, sum(weights.values())


def _weights(shape: ModelShape) -> list[Parameter]:
    """Return every canonical parameter; a router's bias is a buffer."""
    return [parameter for parameter in parameters(shape).values() if parameter.kind is not ParameterKind.ROUTER_BIAS]
