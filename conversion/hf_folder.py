"""Read a Hugging Face checkpoint folder: every header, no data. Old and transformers-5 configs, one file or many."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from conversion.errors import DamagedCheckpointError, read_object
from conversion.fp8 import BLOCK, scale_shape
from conversion.names import DERIVED_BUFFER, HfPart, Parameter, ParameterKind, hf_aliases, parameters
from conversion.regions import Rectangle, Region, StoredMatrix, whole
from conversion.safetensors_file import StoredTensor, read_header
from megatron_ads.architecture import ModelShape, shape_from_config
from megatron_ads.errors import ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"
_VALUE_DTYPES = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class HfFolder:
    """A checked Hugging Face checkpoint: every tensor the config asks for is there, with its shape, and no other."""

    path: Path
    config: dict[str, Any]
    shape: ModelShape
    tensors: dict[str, StoredTensor]
    """Every stored tensor by HF name, scales and repeats included."""
    files: tuple[str, ...]
    """The safetensors files, in index order."""

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one FP8 block."""
        block = (self.config.get("quantization_config") or {}).get("weight_block_size") or BLOCK
        return int(block[0]), int(block[1])

    def matrix(self, hf_name: str) -> StoredMatrix:
        """Return one HF tensor together with its scales."""
        return StoredMatrix(hf_name, self.tensors[hf_name], self.tensors.get(hf_name + SCALE_SUFFIX), self.block)

    def regions(self, parameter: Parameter) -> tuple[Region, ...]:
        """Return what a canonical parameter is made of."""
        found, row = [], 0
        for part in parameter.parts:
            extent = whole(part.shape)
            found.append(Region(Rectangle(row, 0, extent.rows, extent.columns), self.matrix(part.name)))
            row += extent.rows
        return tuple(found)

    def replicas(self, parameter: Parameter) -> tuple[tuple[Region, ...], ...]:
        """Return every stored copy of a parameter; the repeats of the MTP layers have names of their own."""
        return (self.regions(parameter),)

    def weight_files(self) -> tuple[Path, ...]:
        """Return every safetensors file."""
        return tuple(self.path / file for file in self.files)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """The repeats that are stored: HF name -> canonical name."""
        return {name: canonical for name, canonical in hf_aliases(self.shape).items() if name in self.tensors}

    @cached_property
    def derived(self) -> tuple[str, ...]:
        """Stored tensors that the config determines and that no conversion needs."""
        return tuple(name for name in self.tensors if DERIVED_BUFFER.fullmatch(name))

    @property
    def is_fp8(self) -> bool:
        """Whether any weight is stored in FP8."""
        return any(stored.dtype is torch.float8_e4m3fn for stored in self.tensors.values())


def open_hf_folder(path: Path) -> HfFolder:
    """Read all headers of a checkpoint folder and check them against its ``config.json``.

    Raises:
        ConfigError: If ``config.json`` is missing or describes no model of this family.
        DamagedCheckpointError: If a tensor is missing, unknown, of another shape than the config says, FP8 without
            scales, or indexed in a file that does not hold it.
    """
    config = read_config(path)
    tensors, files = _read_tensors(path)
    folder = HfFolder(path=path, config=config, shape=shape_from_config(config), tensors=tensors, files=files)
    _check_names(folder)
    for parameter in parameters(folder.shape).values():
        for part in parameter.parts:
            _check_tensor(folder, part, parameter.kind)
    for alias, canonical in folder.aliases.items():
        _check_tensor(folder, HfPart(alias, parameters(folder.shape)[canonical].shape), ParameterKind.PLAIN)
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` of a checkpoint folder."""
    file = path / "config.json"
    if not file.exists():
        raise ConversionError(f"{file} does not exist: {path} is not a Hugging Face checkpoint folder.")
    return read_object(file)


def _read_tensors(path: Path) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    if not (path / INDEX).exists():
        if not (path / SINGLE).exists():
            raise DamagedCheckpointError(f"{path} holds neither {INDEX} nor {SINGLE}. Copy the checkpoint again.")
        return read_header(path / SINGLE).tensors, (SINGLE,)
    weight_map = read_object(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise DamagedCheckpointError(f"{path / INDEX} has no weight_map from tensors to files. Copy it again.")
    files = tuple(dict.fromkeys(weight_map.values()))
    headers = {file: read_header(path / file).tensors for file in files}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise DamagedCheckpointError(
                f"{INDEX} says that {name} is in {file}, which does not hold it: the index is stale. "
                "Copy the index and the files from the same revision."
            )
    for file, tensors in headers.items():
        for name in tensors:
            if weight_map.get(name) != file:
                raise DamagedCheckpointError(
                    f"{file} holds {name}, which {INDEX} places in {weight_map.get(name, 'no file')}: the index is "
                    "stale. Copy the index and the files from the same revision."
                )
    return {name: headers[file][name] for name, file in weight_map.items()}, files


def _check_names(folder: HfFolder) -> None:
    if folder.shape.num_layers + folder.shape.num_experts > len(folder.tensors):  # listing them all would take forever
        raise DamagedCheckpointError(
            f"{folder.path} holds {len(folder.tensors)} tensors, too few for the num_hidden_layers = "
            f"{folder.shape.num_layers} and n_routed_experts = {folder.shape.num_experts} of its config.json. "
            "Copy the config and the files from the same revision."
        )
    expected = {part.name for parameter in parameters(folder.shape).values() for part in parameter.parts}
    known = expected | set(folder.aliases) | set(folder.derived)
    missing = sorted(expected - folder.tensors.keys())
    if missing:
        hint = ""
        if folder.shape.mtp_layers and missing[0].startswith(f"model.layers.{folder.shape.num_layers}."):
            hint = " If the MTP layers were left out on purpose, set num_nextn_predict_layers to 0 in config.json."
        raise DamagedCheckpointError(
            f"{folder.path} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]}."
            f"{hint or ' Copy the missing files.'}"
        )
    scales = {name + SCALE_SUFFIX for name in known}
    extra = sorted(folder.tensors.keys() - known - scales)
    if extra:
        raise DamagedCheckpointError(
            f"{folder.path} holds {len(extra)} tensors that its config.json has no place for, first {extra[0]}. "
            "Check num_hidden_layers, n_routed_experts and num_nextn_predict_layers in config.json."
        )


def _check_tensor(folder: HfFolder, part: HfPart, kind: ParameterKind) -> None:
    stored, scales = folder.tensors[part.name], folder.tensors.get(part.name + SCALE_SUFFIX)
    if stored.shape != part.shape:
        raise DamagedCheckpointError(
            f"{part.name} in {stored.file} has shape {stored.shape}, but config.json gives {part.shape}. "
            "The config belongs to another model, or the file is damaged."
        )
    if stored.dtype not in _VALUE_DTYPES:
        raise DamagedCheckpointError(
            f"{part.name} in {stored.file} is {stored.dtype}; weights are FP8, BF16, FP16 or FP32."
        )
    if (stored.dtype is torch.float8_e4m3fn) != (scales is not None):
        state = "is FP8 without" if scales is None else f"is {stored.dtype} but has"
        raise DamagedCheckpointError(f"{part.name} in {stored.file} {state} block scales ({part.name}{SCALE_SUFFIX}).")
    if scales is None:
        return
    expected = scale_shape(stored.shape, folder.block)
    if scales.shape != expected or scales.dtype is not torch.float32 or kind is ParameterKind.ROUTER_BIAS:
        raise DamagedCheckpointError(
            f"{part.name}{SCALE_SUFFIX} in {scales.file} is {scales.dtype} of shape {scales.shape}; blocks of "
            f"{folder.block[0]} x {folder.block[1]} of {stored.shape} need float32 of {expected}."
        )
