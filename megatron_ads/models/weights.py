"""The parameters of a built model under their canonical names (global layers, global experts), and filling them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec, canonical_names
from conversion.names import EMBEDDING, OUTPUT_LAYER
from conversion.sources import WeightSource
from megatron_ads.errors import ConversionError

_OF_ADAPTER = re.compile(r"\.adapter\d*\.")
"""In the names of a low-rank adapter's factors."""


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
    """Yield every parameter and router bias of this rank's unwrapped chunks, except the factors of adapters."""
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        count = (chunk.config.num_moe_experts or 0) // chunk.config.expert_model_parallel_size
        first_expert = parallel_state.get_expert_model_parallel_rank() * count
        experts = range(first_expert, first_expert + count)
        for name, tensor in model_tensors(chunk):
            canonical = canonical_names(name, spec=spec, first_layer=first_layer, local_experts=experts)
            if name == OUTPUT_LAYER and chunk.share_embeddings_and_output_weights:
                canonical = (EMBEDDING,)  # its copy on the last of several stages
            yield NamedWeight(name, canonical, tensor, ".mlp.experts." in name)


def model_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and router bias of a module with its name there, except the factors of adapters."""
    yield from ((name, weight) for name, weight in module.named_parameters() if not _OF_ADAPTER.search(name))
    for name, buffer in module.named_buffers():
        if name.endswith(".router.expert_bias"):
            yield name, buffer


@torch.no_grad()
def load_weights(chunks: Sequence[GPTModel], source: WeightSource, spec: LayerSpec) -> int:
    """Copy this rank's slice of every weight out of ``source`` and return how many values were filled.

    Weights that this rank's chunks do not have are left alone. Values are converted to the dtype of the parameter;
    router biases stay FP32.

    Raises:
        ConversionError: If a weight of the model is missing in the source, has another shape there, or is
            claimed by two parameters of one chunk.
    """
    available = frozenset(source.names())
    filled = 0
    for chunk in chunks:
        claimed: set[str] = set()
        for weight in named_weights([chunk], spec):
            for name, target in weight.pieces():
                if name not in available:
                    raise ConversionError(
                        f"The checkpoint has no weight {name}, which the model needs. Compare its config.json with its "
                        "index: the number of layers, experts and MTP layers must agree with the tensors."
                    )
                if name in claimed:
                    raise ConversionError(
                        f"Two parameters of one model chunk are both {name}; the layer spec is misread."
                    )
                claimed.add(name)
                _fill(name, target, source, weight)
                filled += target.numel()
    return filled


def _fill(name: str, target: Tensor, source: WeightSource, weight: NamedWeight) -> None:
    if weight.is_expert:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    values = source.read(name, rank=rank, size=size)
    if values.shape != target.shape:
        raise ConversionError(
            f"{name} is {tuple(values.shape)} in the checkpoint and {tuple(target.shape)} in the model, for "
            f"tensor-parallel rank {rank} of {size}. The checkpoint is of another model than its config.json says."
        )
    target.copy_(values)
