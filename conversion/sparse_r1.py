"""Write a DeepSeek-R1 repository whose files have the true names, shapes and dtypes and take almost no disk space.

The data is a hole in every file, read as zeros: enough to plan, try and time everything that looks at headers.
Which of the 163 files holds which tensor is this module's choice (model order, filled evenly); the rest is published.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import write_small
from conversion.fp8 import scale_shape
from conversion.hf_folder import SCALE_SUFFIX, write_index
from conversion.names import ParameterKind, hf_aliases, parameters
from conversion.plan import offsets
from conversion.published_models import published_config
from conversion.safetensors_file import HeaderEntry, header_order
from megatron_ads.architecture import shape_from_config
from megatron_ads.errors import ConversionError

R1_FILES = 163
R1_CONFIG = {name: value for name, value in published_config("deepseek_r1").items() if name != "auto_map"}
"""config.json of deepseek-ai/DeepSeek-R1, without the references to its custom code."""


def write_sparse(folder: Path, config: dict[str, Any] = R1_CONFIG, *, files: int = R1_FILES) -> None:
    """Write an FP8 checkpoint of the family as sparse files; DeepSeek-R1 has 163 with 91,991 tensors, config and index.

    Raises:
        ConversionError: If the folder exists and is not empty, or its file system has no sparse files of this size.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConversionError(f"{folder} is not empty. Choose a folder that is empty or absent.")
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    stored = stored_entries(config)
    nbytes_of_all = sum(entry.nbytes for entries in stored for entry in entries)
    # Dealt in model order into files of about equal bytes.
    groups: list[list[HeaderEntry]] = [[] for _ in range(files)]
    dealt = 0
    for entries in stored:
        groups[min(dealt * files // nbytes_of_all, files - 1)].extend(entries)
        dealt += sum(entry.nbytes for entry in entries)
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{files:06d}.safetensors"
        header, _, nbytes = offsets(header_order(group), {"format": "pt"})
        _write_hole(folder / name, header, nbytes)
        weight_map |= {entry.name: name for entry in group}
    write_small(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_index(folder, weight_map, nbytes_of_all)


def stored_entries(config: dict[str, Any]) -> list[tuple[HeaderEntry, ...]]:
    """Return what a published FP8 checkpoint of this config stores, in model order, weights with their scales."""
    shape = shape_from_config(config)
    model = parameters(shape)
    found: list[tuple[HeaderEntry, ...]] = []
    for parameter in model.values():
        for part in parameter.parts:
            if parameter.kind is ParameterKind.LINEAR:
                scales = HeaderEntry(part.name + SCALE_SUFFIX, torch.float32, scale_shape(part.shape))
                found.append((HeaderEntry(part.name, torch.float8_e4m3fn, part.shape), scales))
            else:
                dtype = torch.float32 if parameter.kind is ParameterKind.ROUTER_BIAS else torch.bfloat16
                found.append((HeaderEntry(part.name, dtype, part.shape),))
    for alias, canonical in hf_aliases(shape).items():
        found.append((HeaderEntry(alias, torch.bfloat16, model[canonical].shape),))
    return found


def _write_hole(path: Path, header: bytes, nbytes: int) -> None:
    try:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(nbytes)
    except OSError as error:
        raise ConversionError(f"{path} cannot be made a sparse file of {nbytes} bytes ({error.strerror}).") from None
    if os.stat(path).st_blocks * 512 > nbytes // 2 + (1 << 20):
        raise ConversionError(f"The file system of {path} has no sparse files; choose another disk.")
