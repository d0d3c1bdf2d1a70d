"""Fill the model chunks of this rank with weights from a checkpoint of any layout."""

from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.sources import WeightSource
from megatron_ads.errors import ConversionError
from megatron_ads.models.naming import NamedWeight, named_weights


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
                _require_once(name, available, claimed)
                _fill(name, target, source, weight)
                filled += target.numel()
    return filled


def _require_once(name: str, available: frozenset[str], claimed: set[str]) -> None:
    if name not in available:
        raise ConversionError(
            f"The checkpoint has no weight {name}, which the model needs. Compare its config.json with its index: "
            "the number of layers, experts and MTP layers must agree with the tensors."
        )
    if name in claimed:
        raise ConversionError(f"Two parameters of one model chunk are both {name}; the layer spec is misread.")
    claimed.add(name)


def _fill(name: str, target: Tensor, source: WeightSource, weight: NamedWeight) -> None:
    rank, size = _tensor_rank(weight)
    values = source.read(name, rank=rank, size=size)
    if values.shape != target.shape:
        raise ConversionError(
            f"{name} is {tuple(values.shape)} in the checkpoint and {tuple(target.shape)} in the model, for "
            f"tensor-parallel rank {rank} of {size}. The checkpoint is of another model than its config.json says."
        )
    target.copy_(values)


def _tensor_rank(weight: NamedWeight) -> tuple[int, int]:
    if weight.is_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
