"""New weights for a loaded transformers model, in place, from tensors with the names that checkpoints have.

transformers keeps some weights in another form than checkpoints do, such as all experts of a layer in one tensor. Where
each tensor of a checkpoint has its place there is found out once, by sending the numbers of all places through the
conversion that transformers itself saves a model with; from then on new weights are copied there, and nothing else.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from megatron_ads.errors import ConversionError
from megatron_ads.inference.engine import UnsupportedError

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class WeightUpdate:
    """Replaces the weights of one model, any number of times."""

    def __init__(self, model: Any) -> None:
        """Take a loaded model, which must stay on its device.

        Raises:
            UnsupportedError: If a tensor of a checkpoint has no place of its own in the model.
        """
        self._model = model
        self._tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self._places: dict[str, Tensor] = {}
        """By name in a checkpoint, a view of the model's own tensor; of tied tensors there is one."""
        for name, tensor in model.state_dict().items():
            if name not in self._tied:
                self._places |= _places(model, name, tensor)

    @torch.no_grad()
    def replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into the model; those of layers that it does not have, such as MTP layers, are left out.

        Raises:
            ConversionError: If a name is unknown, a shape differs, or weights are missing. The model then holds a
                mixture of old and new weights.
        """
        # What has no values, such as shared experts where there are none, no checkpoint need have.
        missing = {name for name, place in self._places.items() if place.numel()}
        for name, tensor in weights:
            place = self._places.get(name)
            if place is None:
                self._require_no_place(name)
                continue
            if place.shape != tensor.shape:
                raise ConversionError(
                    f"{name} has the shape {tuple(tensor.shape)}, and the engine's {tuple(place.shape)}."
                )
            place.copy_(tensor)
            missing.discard(name)
        if missing:
            raise ConversionError(
                f"the new weights lack {len(missing)} tensors, {min(missing)} among them. The engine now holds old "
                "and new weights: update it with all of them."
            )

    def _require_no_place(self, name: str) -> None:
        """Refuse a weight that should have a place: of a layer that the model has, and not tied to another one."""
        layer = _LAYER.search(name)
        if name not in self._tied and (layer is None or int(layer[1]) < self._model.config.num_hidden_layers):
            raise ConversionError(
                f"the engine's model has no weight {name}. Was it loaded from a checkpoint of this model?"
            )


def _places(model: Any, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the parts of one of the model's tensors that checkpoints have names for, as views of it."""
    dtype = torch.int32 if tensor.numel() < 1 << 31 else torch.int64
    numbers = torch.arange(tensor.numel(), dtype=dtype).view(tensor.shape)
    parts = revert_weight_conversion(model, {name: numbers})
    return {part: _view(tensor, numbers, found, part) for part, found in parts.items()}


def _view(tensor: Tensor, numbers: Tensor, found: Tensor, name: str) -> Tensor:
    """Return the view of ``tensor`` whose elements have the numbers ``found``."""
    first = int(found.flatten()[0]) if found.numel() else 0
    strides = [
        int(found.select(dim, 1).flatten()[0]) - first if found.numel() and size > 1 else 0
        for dim, size in enumerate(found.shape)
    ]
    last = first + sum((size - 1) * stride for size, stride in zip(found.shape, strides, strict=True))
    within = min(strides, default=0) >= 0 and last < max(1, tensor.numel())
    if not (tensor.is_contiguous() and within and torch.equal(numbers.as_strided(found.shape, strides, first), found)):
        raise UnsupportedError(
            f"{name} has no place of its own in transformers' model: its weights cannot be replaced. Load the new ones "
            "from a folder."
        )
    return tensor.as_strided(found.shape, strides, tensor.storage_offset() + first)
