"""New weights for a loaded transformers model, in place, from tensors with the names that checkpoints have.

transformers keeps some weights in another form than checkpoints do, such as all experts of a layer in one tensor. Its
own conversion, which loading a folder uses, is applied to each such tensor as soon as all its parts have come, so that
no more than the parts of unfinished tensors are held.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from megatron_ads.errors import ConversionError

_LAYER = re.compile(r"\blayers\.(\d+)\.")


class WeightUpdate:
    """Replaces the weights of one model, any number of times; what belongs where is found out once."""

    def __init__(self, model: Any) -> None:
        """Take a loaded model, which must stay on its device."""
        self._model = model
        self._tensors: dict[str, Tensor] = model.state_dict()
        conversions = getattr(model, "_weight_conversions", None) or []
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._targets: dict[str, tuple[str, str | None]] = {}
        shapes = {name: tensor.to("meta") for name, tensor in self._tensors.items()}
        self._tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self._parts: dict[str, set[str]] = defaultdict(set)
        """Names in a checkpoint of the parts of each tensor; of tied tensors one is enough."""
        for name in revert_weight_conversion(model, shapes):
            if name not in self._tied:
                self._parts[self._target_of(name)[0]].add(name)

    @torch.no_grad()
    def replace(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy ``weights`` into the model; those of layers that it does not have, such as MTP layers, are left out.

        Raises:
            ConversionError: If a name is unknown, a shape differs, or weights are missing. The model then holds a
                mixture of old and new weights.
        """
        waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        expected = {name for parts in self._parts.values() for name in parts}
        for name, tensor in weights:
            target, _ = self._target_of(name)
            if name not in self._parts.get(target, ()):
                self._require_no_place(name)
                continue
            waiting[target][name] = tensor.to(self._tensors[target].device)
            expected.discard(name)
            if len(waiting[target]) == len(self._parts[target]):
                self._write(target, waiting.pop(target))
        if expected:
            raise ConversionError(
                f"the new weights lack {len(expected)} tensors, {min(expected)} among them. The engine now holds old "
                "and new weights: update it with all of them."
            )

    def _target_of(self, name: str) -> tuple[str, str | None]:
        """Return the name in the model, and the pattern of the converter, if there is one."""
        if name not in self._targets:
            self._targets[name] = rename_source_key(
                name, self._renamings, self._converters, self._model.base_model_prefix, self._tensors
            )
        return self._targets[name]

    def _require_no_place(self, name: str) -> None:
        """Refuse a weight that should have a place: of a layer that the model has, and not tied to another one."""
        layer = _LAYER.search(name)
        if name not in self._tied and (layer is None or int(layer[1]) < self._model.config.num_hidden_layers):
            raise ConversionError(
                f"the engine's model has no weight {name}. Was it loaded from a checkpoint of this model?"
            )

    def _write(self, target: str, parts: dict[str, Tensor]) -> None:
        """Convert the parts of one tensor, and of those made together with it, and copy them in."""
        pattern = self._target_of(next(iter(parts)))[1]
        if pattern is None:
            (whole,) = parts.values()
            self._copy(target, whole)
            return
        converter = deepcopy(self._by_pattern[pattern])
        for name in sorted(parts, key=dot_natural_key):
            converter.add_tensor(target, name, self._target_of(name)[1], parts[name])
        for name, made in converter.convert(target, model=self._model, config=self._model.config).items():
            self._copy(name, made[0] if isinstance(made, list) else made)

    def _copy(self, name: str, value: Tensor) -> None:
        own = self._tensors[name]
        if own.shape != value.shape:
            raise ConversionError(f"{name} has the shape {tuple(value.shape)}, and the engine's {tuple(own.shape)}.")
        own.copy_(value)
