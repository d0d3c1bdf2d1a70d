"""One layer of a Hugging Face checkpoint, under the names of a model that has no other: what a streaming check loads.

FP8 is dequantised here a second, independent way: each scale is spread over its block.
"""

from collections.abc import Iterator
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
        if not name.startswith(prefix) or _is_extra(folder, name):
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


def _is_extra(folder: HfFolder, name: str) -> bool:
    return name.endswith(SCALE_SUFFIX) or name in folder.aliases or name in folder.derived


def stored_values(folder: HfFolder, name: str) -> Tensor:
    """Return one tensor by its Hugging Face name; FP8 as BF16."""
    stored = folder.tensors[name].read()
    scales = folder.tensors.get(name + SCALE_SUFFIX)
    if scales is None:
        return stored
    return torch.cat(list(_dequantized_bands(stored, scales.read(), folder.block)))


def _dequantized_bands(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Iterator[Tensor]:
    """Yield one row of blocks after the other, so that no FP32 copy of the whole is made."""
    for band, scale in zip(torch.split(codes, block[0]), scales, strict=True):
        spread = scale.repeat_interleave(block[1])[: codes.size(1)]
        yield (band.float() * spread).bfloat16()
