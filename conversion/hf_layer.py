"""One layer of a Hugging Face checkpoint, under the names of a model that has no other: what a streaming check loads.

FP8 is dequantised here a second, independent way: each scale is spread over its block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from conversion.hf_folder import SCALE_SUFFIX, HfFolder

_MTP_WORDS = {
    "enorm.weight": "enorm",
    "hnorm.weight": "hnorm",
    "eh_proj.weight": "eh_proj",
    "shared_head.norm.weight": "norm",
}
_OUTSIDE_WORDS = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """The tensors of one layer."""

    decoder: dict[str, Tensor]
    """By Hugging Face name, the layer numbered 0."""
    around: dict[str, Tensor]
    """Of an MTP layer: ``enorm``, ``hnorm``, ``eh_proj`` and ``norm``; else nothing."""


def layer_tensors(folder: HfFolder, layer: int) -> LayerTensors:
    """Read layer ``layer``; numbers from ``num_layers`` on are the MTP layers, whose repeats are left out."""
    prefix, decoder, around = f"model.layers.{layer}.", {}, {}
    for name in folder.tensors:
        extra = name.endswith(SCALE_SUFFIX) or name in folder.aliases or name in folder.derived
        if extra or not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if (word := _MTP_WORDS.get(rest)) is not None:
            around[word] = stored_values(folder, name)
        else:
            decoder[f"model.layers.0.{rest}"] = stored_values(folder, name)
    return LayerTensors(decoder, around)


def outside_tensors(folder: HfFolder) -> dict[str, Tensor]:
    """Read the ``embedding``, the final ``norm`` and the output ``head``."""
    return {word: stored_values(folder, name) for name, word in _OUTSIDE_WORDS.items()}


def stored_values(folder: HfFolder, name: str) -> Tensor:
    """Return one tensor by its Hugging Face name; FP8 as BF16."""
    stored = folder.tensors[name].read()
    scales = folder.tensors.get(name + SCALE_SUFFIX)
    if scales is None:
        return stored
    (rows, columns), bands = folder.block, []
    for band, scale in zip(torch.split(stored, rows), scales.read(), strict=True):
        spread = scale.repeat_interleave(columns)[: stored.size(1)]
        bands.append((band.float() * spread).bfloat16())  # one by one, so that no FP32 copy of the whole is made
    return torch.cat(bands)
