"""Freeze a model and give it the low-rank adapters that are trained in its place."""

import re
from collections.abc import Iterable, Sequence

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.names import Parameter, parameters
from megatron_ads.architecture import ModelShape
from megatron_ads.models.adapter_shapes import Lora
from megatron_ads.models.experts import GroupedExperts
from megatron_ads.models.gpt import begin_gradients_at_embedding
from megatron_ads.models.lora import Adapter, add_to_output, named_adapters
from megatron_ads.models.naming import named_weights

_WEIGHT = re.compile(r"(.+)\.weight(\d*)")


def add_adapters(chunks: Sequence[GPTModel], lora: Lora, shape: ModelShape, spec: LayerSpec) -> None:
    """Freeze every weight of this rank's chunks and put an adapter beside those that ``lora`` names.

    Call it before the gradient buffers are made. The factors hold nothing yet: see ``initialise_adapters``.
    """
    for chunk in chunks:
        chunk.requires_grad_(False)
        begin_gradients_at_embedding(chunk)
        chunk.trains_adapters = True
        for place, (like, weights) in _adapted(chunk, lora, shape, spec).items():
            owner = chunk.get_submodule(place.rpartition(".")[0])
            setattr(owner, place.rpartition(".")[2], Adapter(weights, lora, like, num_experts=shape.num_experts))
            if not isinstance(owner, GroupedExperts):
                owner.register_forward_hook(add_to_output)


def _adapted(
    chunk: GPTModel, lora: Lora, shape: ModelShape, spec: LayerSpec
) -> dict[str, tuple[Tensor, list[Parameter]]]:
    """Return where adapters belong in a chunk, by module name, each with its weights and a tensor like them."""
    found: dict[str, tuple[Tensor, list[Parameter]]] = {}
    for weight in named_weights([chunk], spec):
        adapted = [parameters(shape)[name] for name in weight.canonical if lora.adapts(parameters(shape)[name])]
        if adapted:
            match = _WEIGHT.fullmatch(weight.name)
            assert match is not None  # every linear's weight is called so
            number = match[2] if spec is LayerSpec.GROUPED else ""  # of its two; Transformer Engine counts experts
            found.setdefault(f"{match[1]}.adapter{number}", (weight.tensor, []))[1].extend(adapted)
    return found


def initialise_adapters(chunks: Iterable[GPTModel], seed: int) -> None:
    """Fill every adapter so that the model computes what it did without them."""
    for chunk in chunks:
        for _, adapter in named_adapters(chunk):
            adapter.initialise(seed)
