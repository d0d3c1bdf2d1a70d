"""Write a Hugging Face folder from tensors that come one after the other, such as those of a running job."""

import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from conversion.atomic_file import PARTIAL_SUFFIX, sync_folder, write_small
from conversion.carried import copy_side_files
from conversion.errors import naming_refusals
from conversion.hf_folder import write_index
from conversion.safetensors_file import write_tensors
from conversion.sources import WeightSource
from conversion.to_hf import true_config

SHARD_BYTES = 1 << 30
"""Of one file, which is held in memory until it is full; a larger tensor has a file to itself."""


def write_hf_folder(
    target: Path, weights: Iterable[tuple[str, Tensor]], source: WeightSource, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write all ``weights``, given with their Hugging Face names; in place of ``target``, which is complete or absent.

    Config, tokenizer and what else belongs are those of ``source``; the config says of which dtype the tensors are.

    Raises:
        DiskFullError: If they do not fit; what was written is removed.
        ConversionError: If the folder cannot be written for another reason.
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    with naming_refusals(target):
        for old in (partial, target):
            shutil.rmtree(old, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write_into(partial, chain(weights, _derived(source)), source, shard_bytes)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(target.parent)


def _write_into(folder: Path, weights: Iterable[tuple[str, Tensor]], source: WeightSource, shard_bytes: int) -> None:
    stored: dict[str, tuple[torch.dtype, int]] = {}
    file_of: dict[str, str] = {}
    for number, tensors in enumerate(_in_shards(weights, shard_bytes), 1):
        file = f"model-{number:05d}.safetensors"
        write_tensors(folder / file, tensors)
        stored |= {name: (tensor.dtype, tensor.nbytes) for name, tensor in tensors.items()}
        file_of |= dict.fromkeys(tensors, file)
    copy_side_files(source.side_folder, folder, skip=("config.json",))
    write_index(folder, file_of, sum(nbytes for _, nbytes in stored.values()))
    write_small(folder / "config.json", json.dumps(true_config(source.config, stored), indent=2) + "\n")


def _in_shards(weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    filled = 0
    for name, tensor in weights:
        if shard and filled + tensor.nbytes > shard_bytes:
            yield shard
            shard, filled = {}, 0
        shard[name] = tensor.detach().to("cpu", copy=True)  # it may be a view into a much larger message
        filled += tensor.nbytes
    if shard:
        yield shard


def _derived(source: WeightSource) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in source.derived.items():
        yield name, torch.frombuffer(bytearray(buffer.data), dtype=buffer.dtype).view(buffer.shape)
