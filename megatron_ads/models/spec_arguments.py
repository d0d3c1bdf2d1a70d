"""What Megatron-Core's layer specs are made of, which changed from version to version.

    part of a layer            0.16                    0.17                    0.18, 0.19
    routed, shared experts     ModuleSpec              callable                callable
    feed-forward (``mlp``)     ModuleSpec              ModuleSpec              callable
    MTP layer's inner layer    ``transformer_layer``   ``mtp_model_layer``     ``mtp_model_layer``

A class alone will do in every version; so attention, norms and linears need nothing here.
"""

from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ads.runtime.megatron_version import megatron_core_since


def experts_of(module: type, submodules: Any) -> Any:
    """Return the ``experts`` or ``shared_experts`` of a mixture: a module that is given its submodules."""
    if megatron_core_since("0.17"):
        return partial(module, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)


def feed_forward_of(module: type, submodules: Any) -> Any:
    """Return the ``mlp`` of a layer: a dense one, or a mixture of experts."""
    if megatron_core_since("0.18"):
        return partial(module.as_mlp_submodule if module is MLP else module, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)


def mtp_submodules(*, norm: Any, projection: Any, layer: ModuleSpec) -> MultiTokenPredictionLayerSubmodules:
    """Return the submodules of one MTP layer, around a decoder layer."""
    name = "mtp_model_layer" if megatron_core_since("0.17") else "transformer_layer"
    return MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=projection, **{name: layer}
    )
