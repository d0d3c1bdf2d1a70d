"""Read the model part of a torch_dist checkpoint, from a conversion or a training job: headers only, no tensor data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conversion.carried import SIDE_FOLDER, Carried
from conversion.errors import DamagedCheckpointError, read_object
from conversion.layer_specs import KeyedTensor, LayerSpec, keyed_tensors
from conversion.names import TOKEN_TABLES, Parameter, hf_aliases, parameters
from conversion.paths import inside
from conversion.regions import Rectangle, Region, StoredMatrix, whole
from conversion.safetensors_file import StoredTensor
from conversion.torch_dist_pickle import locate_saved_tensor, read_metadata
from megatron_ads.architecture import ModelShape, shape_from_config
from megatron_ads.errors import ConversionError

METADATA = ".metadata"
CARRIED = "conversion.json"
"""What a Hugging Face export needs to have its source's keys."""


@dataclass(frozen=True, kw_only=True)
class TorchDistFolder:
    """A checked torch_dist checkpoint: it holds every parameter of its model."""

    path: Path
    config: dict[str, Any]
    shape: ModelShape
    side_folder: Path
    carried: Carried
    """All repeats of a published checkpoint and nothing else, where Megatron-Core wrote it."""
    pieces: Mapping[str, tuple[Region, ...]]
    """The stored pieces of every canonical parameter."""

    def regions(self, parameter: Parameter) -> tuple[Region, ...]:
        """Return what a canonical parameter is made of."""
        return self.pieces[parameter.name]

    def weight_files(self) -> tuple[Path, ...]:
        """Return the files that hold the model."""
        return tuple(sorted({region.stored.data.file for regions in self.pieces.values() for region in regions}))


def open_torch_dist(path: Path) -> TorchDistFolder:
    """Open a checkpoint and find every parameter's pieces; optimizer state and extra states are passed over.

    Raises:
        ConversionError: If there is no config to go by, or the checkpoint is of adapters alone.
        DamagedCheckpointError: If a parameter is missing, incomplete or of another shape than the config says.
    """
    side_folder = path / SIDE_FOLDER
    if not (side_folder / "config.json").exists():
        raise ConversionError(
            f"{path} has no {SIDE_FOLDER}/config.json, so its architecture is unknown. "
            f"Copy config.json and the tokenizer of the model into {side_folder}."
        )
    config = read_object(side_folder / "config.json")
    shape = shape_from_config(config, file=side_folder / "config.json")
    metadata = read_metadata(path / METADATA)
    _check_files(path, metadata.storage_data)
    if shape.num_layers + shape.mtp_layers > len(metadata.state_dict_metadata):  # listing them would take forever
        raise DamagedCheckpointError(
            f"{path} holds {len(metadata.state_dict_metadata)} tensors, too few for the num_hidden_layers = "
            f"{shape.num_layers} and num_nextn_predict_layers = {shape.mtp_layers} of its config.json."
        )
    if any(key.endswith(".lora_a") for key in metadata.state_dict_metadata):
        raise ConversionError(
            f"{path} holds low-rank adapters without the weights they adapt. Start its job again with train.max_steps "
            "set to this step: it trains no further and writes the merged weights to <log.dir>/export. Give that "
            "folder."
        )
    fused = any(key.endswith(".layer_norm_weight") for key in metadata.state_dict_metadata)
    pieces: dict[str, tuple[Region, ...]] = {}
    for tensor in keyed_tensors(parameters(shape), LayerSpec.TE if fused else LayerSpec.LOCAL):
        try:
            pieces.update(_locate(path, tensor, metadata))
        except (AttributeError, LookupError, TypeError) as error:
            raise DamagedCheckpointError(f"{path / METADATA} is damaged: {tensor.key} ({error}).") from error
    carried, record = Carried(frozenset(hf_aliases(shape)), {}), path / CARRIED
    if record.exists():
        stored = read_object(record)
        try:
            carried = Carried.parse(stored)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpointError(f"{record} is damaged ({error}). Convert again.") from None
    return TorchDistFolder(
        path=path, config=config, shape=shape, side_folder=side_folder, carried=carried, pieces=pieces
    )


def _check_files(path: Path, storage_data: Mapping[Any, Any]) -> None:
    """Check every file to its last byte, extra states and optimizer included, and that each is inside the folder."""
    ends: dict[str, int] = {}
    try:
        for info in storage_data.values():
            name = str(info.relative_path)
            ends[name] = max(ends.get(name, 0), info.offset + info.length)
    except (AttributeError, TypeError) as error:
        raise DamagedCheckpointError(f"{path / METADATA} is damaged ({error}).") from None
    for name, end in ends.items():
        file = inside(path, name, METADATA)
        if not file.exists() or file.stat().st_size < end:
            raise DamagedCheckpointError(f"{file} is missing or truncated: it should have {end} bytes. Copy it again.")


def _locate(path: Path, tensor: KeyedTensor, metadata: Any) -> dict[str, tuple[Region, ...]]:
    stored = metadata.state_dict_metadata.get(tensor.key)
    if stored is None or not hasattr(stored, "chunks"):
        raise DamagedCheckpointError(
            f"{path} lacks {tensor.key}, which its config asks for. The checkpoint is of another model, or of a "
            "Megatron-Core that names it otherwise."
        )
    # Megatron pads the vocabulary; rows beyond it hold nothing.
    padded = tensor.key in TOKEN_TABLES
    size = tuple(stored.size)
    if size[1:] != tensor.shape[1:] or not (size[0] == tensor.shape[0] or (padded and size[0] > tensor.shape[0])):
        raise DamagedCheckpointError(f"{tensor.key} in {path} has shape {size}, but its config gives {tensor.shape}.")
    found: dict[str, list[Region]] = {parameter.name: [] for parameter in tensor.parameters}
    for chunk in stored.chunks:
        for parameter, region in _chunk_regions(path, tensor, chunk, metadata.storage_data):
            found[parameter.name].append(region)
    for parameter in tensor.parameters:
        full = whole(parameter.shape)
        covered = [common for region in found[parameter.name] if (common := region.covers.overlap(full))]
        area = sum(rectangle.rows * rectangle.columns for rectangle in covered)
        if area != full.rows * full.columns:
            raise DamagedCheckpointError(
                f"{path} holds {area} of the {full.rows * full.columns} elements of {parameter.name}. Save it again."
            )
    return {name: tuple(regions) for name, regions in found.items()}


def _chunk_regions(
    path: Path, tensor: KeyedTensor, chunk: Any, storage_data: Mapping[Any, Any]
) -> list[tuple[Parameter, Region]]:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    info = storage_data[MetadataIndex(tensor.key, chunk.offsets)]
    file = path / info.relative_path
    data = locate_saved_tensor(file, info.offset, info.length)
    if data.shape != tuple(chunk.sizes):
        raise DamagedCheckpointError(f"A piece of {tensor.key} in {file} has shape {data.shape}, not {chunk.sizes}.")
    offsets, sizes, held = tuple(chunk.offsets), data.shape, tensor.parameters
    if tensor.is_stacked:
        held = held[offsets[0] : offsets[0] + sizes[0]]
        offsets, sizes = offsets[1:], sizes[1:]
    return [
        (parameter, _region(parameter, data, offsets, sizes, skip=local * sizes[0]))
        for local, parameter in enumerate(held)
    ]


def _region(
    parameter: Parameter, data: StoredTensor, offsets: tuple[int, ...], sizes: tuple[int, ...], *, skip: int
) -> Region:
    """Return the region of one parameter in a stored chunk, whose first ``skip`` rows belong to earlier experts."""
    if len(sizes) == 1:
        return Region(Rectangle(0, offsets[0], 1, sizes[0]), StoredMatrix(parameter.name, data))
    matrix = replace(data, shape=(math.prod(data.shape) // sizes[1], sizes[1]))
    return Region(Rectangle(offsets[0], offsets[1], sizes[0], sizes[1]), StoredMatrix(parameter.name, matrix), row=skip)
