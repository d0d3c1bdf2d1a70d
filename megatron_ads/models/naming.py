"""The parameters of a built model under their canonical names: global layers, global experts, any layer spec."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec, canonical_names
from megatron_ads.models.lora import named_adapters


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """One parameter or router bias of a chunk. Several canonical names stack on dim 0 of ``tensor``."""

    name: str
    """Name in the module, such as ``decoder.layers.0.mlp.experts.weight1``."""
    canonical: tuple[str, ...]
    tensor: Tensor
    is_expert: bool
    """Belongs to a routed expert: split over expert and expert-tensor parallel ranks."""

    def pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each canonical name with its part of ``tensor``, as a view that can be written to."""
        stacked = len(self.canonical) > 1 or (self.is_expert and self.tensor.dim() == 3)
        for index, canonical in enumerate(self.canonical):
            yield canonical, self.tensor[index] if stacked else self.tensor


def named_weights(chunks: Sequence[GPTModel], spec: LayerSpec) -> Iterator[NamedWeight]:
    """Yield every parameter and every router bias of this rank's chunks, as Megatron-Core built them (not wrapped).

    Low-rank adapters are not among them: a checkpoint of the model has no names for their factors.
    """
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        experts = _local_experts(chunk)
        for name, tensor in _tensors(chunk):
            canonical = canonical_names(name, spec=spec, first_layer=first_layer, local_experts=experts)
            yield NamedWeight(name, canonical, tensor, ".mlp.experts." in name)


def _tensors(chunk: GPTModel) -> Iterator[tuple[str, Tensor]]:
    factors = {id(factor) for _, adapter in named_adapters(chunk) for factor in adapter.parameters()}
    yield from ((name, weight) for name, weight in chunk.named_parameters() if id(weight) not in factors)
    for name, buffer in chunk.named_buffers():
        if name.endswith(".router.expert_bias"):
            yield name, buffer


def _local_experts(chunk: GPTModel) -> range:
    count = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
    first = parallel_state.get_expert_model_parallel_rank() * count
    return range(first, first + count)
