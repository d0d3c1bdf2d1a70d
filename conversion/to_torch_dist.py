"""Plan the conversion of any checkpoint into Megatron-Core's torch_dist format, which knows no layout."""

import io
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conversion.atomic_file import FileRecord, write_small
from conversion.carried import SIDE_FOLDER, copy_side_files
from conversion.layer_specs import KeyedTensor, LayerSpec, extra_state_keys, keyed_tensors
from conversion.names import parameters
from conversion.plan import ConversionPlan, OutputFile, SavedChunk, SavedObject, folder_state, in_groups
from conversion.regions import Rectangle, View, whole
from conversion.sources import WeightSource, stored_dtype
from conversion.torch_dist_folder import CARRIED, METADATA

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CHUNK_BYTES = 64 << 20
"""A chunk is serialised in memory, so this bounds what a worker takes."""
_FILE_BYTES = 4 << 30
_ARCHIVE_BYTES = 4096
"""More than ``torch.save`` adds to any chunk."""
_COMMON = "common.pt"
"""Says to Megatron-Core that each layer has keys of its own, where it would stack layers that are all of a kind."""
_BACKEND = "metadata.json"


@dataclass(frozen=True, slots=True)
class TorchDistTarget:
    """A torch_dist folder to be written, with the keys of one layer spec (``local`` also serves grouped experts)."""

    source: WeightSource
    target: Path
    spec: LayerSpec = LayerSpec.LOCAL

    def plan(self) -> ConversionPlan:
        """Decide which chunk goes into which file."""
        stored = self.source.files()
        model = parameters(self.source.shape)
        items: list[SavedChunk | SavedObject] = [
            item for tensor in keyed_tensors(model, self.spec) for item in self._chunks(tensor)
        ]
        items += [SavedObject(key) for key in extra_state_keys(model, self.spec)]
        return ConversionPlan(
            source=self.source.path,
            target=self.target,
            files=tuple(
                OutputFile(f"__{number}_0.distcp", b"", sum(map(_reserved, group)), tuple(group))
                for number, group in enumerate(in_groups(items, _reserved, _FILE_BYTES))
            ),
            source_files=stored,
            source_state=folder_state(stored),
            tensor_count=len(model),
            finishing=(_BACKEND, _COMMON, METADATA, CARRIED, SIDE_FOLDER),
            side_files=(self.source.side_files(),),
        )

    def _chunks(self, tensor: KeyedTensor) -> Iterator[SavedChunk]:
        """Yield one chunk per routed expert, and row ranges of large tensors."""
        for number, parameter in enumerate(tensor.parameters):
            regions = self.source.regions(parameter.name)
            dtype = stored_dtype(parameter, regions)
            full, matrix = whole(parameter.shape), len(parameter.shape) > 1
            rows = max(_CHUNK_BYTES // (full.columns * dtype.itemsize), 1)
            for row in range(0, full.rows, rows):
                part = Rectangle(row, 0, min(rows, full.rows - row), full.columns)
                shape = (part.rows, part.columns) if matrix else (part.columns,)
                at = (row, 0) if matrix else (0,)
                if tensor.is_stacked:
                    shape, at = (1, *shape), (number, *at)
                yield SavedChunk(tensor.key, dtype, shape, at, (View.of(parameter.name, regions, part),))

    def prepare(self, plan: ConversionPlan) -> None:
        """Write what accompanies the data."""
        copy_side_files(self.source.side_folder, plan.target / SIDE_FOLDER)
        if not (plan.target / SIDE_FOLDER / "config.json").exists():
            write_small(plan.target / SIDE_FOLDER / "config.json", json.dumps(self.source.config, indent=2) + "\n")
        derived = {name: buffer.as_json() for name, buffer in self.source.derived.items()}
        carried = {"aliases": list(self.source.aliases), "derived": derived, "side_files": plan.side_files[0].names}
        write_small(plan.target / CARRIED, json.dumps(carried))
        common = io.BytesIO()
        torch.save({"content_metadata": {"non_homogeneous_layers": True}}, common)
        write_small(plan.target / _COMMON, common.getvalue())
        write_small(plan.target / _BACKEND, json.dumps(BACKEND))

    def finish(self, plan: ConversionPlan, records: tuple[FileRecord, ...]) -> None:
        """Write ``.metadata``, without which the folder is no checkpoint."""
        from torch.distributed.checkpoint import metadata as dcp
        from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo

        described: dict[str, Any] = {}
        storage: dict[Any, Any] = {}
        sizes = {tensor.key: tensor.shape for tensor in keyed_tensors(parameters(self.source.shape), self.spec)}
        for file, record in zip(plan.files, records, strict=True):
            for item, (offset, length) in zip(file.items, record.extents, strict=True):
                info = _StorageInfo(record.name, offset, length)
                if isinstance(item, SavedObject):
                    described[item.name] = dcp.BytesStorageMetadata()
                    storage[dcp.MetadataIndex(item.name)] = info
                elif isinstance(item, SavedChunk):
                    size = torch.Size(sizes[item.name])
                    properties = dcp.TensorProperties(dtype=item.dtype)
                    tensor = described.setdefault(item.name, dcp.TensorStorageMetadata(properties, size, []))
                    at = torch.Size(item.at)
                    storage[dcp.MetadataIndex(item.name, at, len(tensor.chunks))] = info
                    tensor.chunks.append(dcp.ChunkStorageMetadata(at, torch.Size(item.shape)))
        metadata = dcp.Metadata(
            state_dict_metadata=described,
            planner_data={key: (key,) for key in described},
            storage_data=storage,
            storage_meta=dcp.StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        write_small(plan.target / METADATA, pickle.dumps(metadata))


def _reserved(item: SavedChunk | SavedObject) -> int:
    if isinstance(item, SavedObject):
        return _ARCHIVE_BYTES
    return math.prod(item.shape) * item.dtype.itemsize + _ARCHIVE_BYTES
