"""Writes a rank's tensors of a checkpoint, as torch's ``FileSystemWriter`` does, with planning and writing apart.

Planning is a collective; writing communicates with nobody, so a thread may do it while training continues. Tensors come
to the host one at a time (``FileSystemWriter`` of torch 2.13 keeps all that it has copied from a GPU until its file is
complete), and the checksum is taken of what is written while it is written.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_ads.errors import CheckpointError

Item = tuple[str, list[int] | None, int | None, int, int]
"""Key; offset of a part of a tensor, and its number; where in the file it is, and how many bytes."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A rank's file, flushed to disk, as plain values."""

    name: str
    bytes: int
    crc32: int
    """Of the bytes as they were handed to the system."""
    items: list[Item]

    def results(self) -> list[WriteResult]:
        """Return what torch's index needs."""
        return [
            WriteResult(
                index=MetadataIndex(key, offset, number),
                size_in_bytes=length,
                storage_data=_StorageInfo(self.name, start, length),
            )
            for key, offset, number, start, length in self.items
        ]


class PlannedSave(TorchDistSaveShardedStrategy):
    """The torch_dist save strategy, up to the point where a file is written; ``writer`` does the rest.

    Megatron's own strategy (megatron-core 0.16 to 0.19) starts processes for every save, so that training can continue
    meanwhile. A fork of a process with CUDA or gloo threads can deadlock, and costs seconds.

    ``staged`` copies the tensors to the host first, so that training may change them before they are written.
    """

    writer: "RankWriter"

    def __init__(self, *, staged: bool) -> None:
        super().__init__("torch_dist", 1)
        self._staged = staged

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> None:
        """Agree on who writes what; a collective.

        megatron-core 0.19 puts the common state among the tensors, as an object that is unpickled freely when it is
        loaded; it becomes the file that older versions write, and all read, which admits plain values only.
        """
        common = sharded_state_dict.pop("common_state", None)
        if common is not None and dist.get_rank() == 0:
            torch.save(common.data, Path(checkpoint_dir) / "common.pt")
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        for entry in (entry for entries in by_key.values() for entry in entries):
            if self._staged and isinstance(entry, ShardedTensor):
                entry.data = to_host(cast(Tensor, entry.data).detach(), copy=True)
        self.writer = RankWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False)
        save(mcore_to_pyt_state_dict(by_key, False), storage_writer=self.writer, planner=planner)


class RankWriter(FileSystemWriter):
    """Remembers what torch's ``save`` has planned; ``write`` and ``write_index`` carry it out."""

    _plan: SavePlan
    _planner: SavePlanner
    _metadata: Metadata

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """Write nothing yet."""
        self._plan, self._planner = plan, planner
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Remember the index, on rank 0."""
        self._metadata = metadata

    def write(self, is_abandoned: Callable[[], bool] = lambda: False) -> WrittenFile:
        """Write this rank's file and flush it to disk; any thread may, no rank needs another for it.

        Raises:
            CheckpointError: If the save is abandoned meanwhile.
        """
        name = f"{cast(Any, self._plan.storage_data).prefix}0{DEFAULT_SUFFIX}"
        items: list[Item] = []
        with (Path(self.path) / name).open("wb") as raw:
            file = ChecksummedFile(raw)
            for item in sorted(self._plan.items, key=lambda item: item.type is not WriteItemType.BYTE_IO):
                if is_abandoned():
                    raise CheckpointError("the job has ended before it was written.")
                start, data = file.bytes, self._planner.resolve_data(item)
                if isinstance(data, Tensor):
                    torch.save(to_host(data.detach()), cast(BinaryIO, file))
                else:
                    file.write(data.getbuffer())
                index = item.index
                offset = None if index.offset is None else list(index.offset)
                items.append((index.fqn, offset, index.index, start, file.bytes - start))
            raw.flush()
            os.fsync(raw.fileno())
        del self._plan, self._planner  # and with them what was copied to the host
        return WrittenFile(name, file.bytes, file.crc32, items)

    def write_index(self, files: Sequence[WrittenFile]) -> None:
        """Write ``.metadata`` from what the ranks have written; rank 0 does."""
        super().finish(self._metadata, [file.results() for file in files])


class ChecksummedFile:
    """A binary file that takes the length and the CRC-32 of what is written to it."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self.bytes = 0
        self.crc32 = 0

    def write(self, data: Any) -> int:
        """Write all of ``data``, a buffer."""
        self.crc32 = zlib.crc32(data, self.crc32)
        self.bytes += memoryview(data).nbytes
        return self._raw.write(data)

    def flush(self) -> None:
        """Do what ``torch.save`` expects of a file."""
        self._raw.flush()


def to_host(tensor: Tensor, *, copy: bool = False) -> Tensor:
    """Return ``tensor`` contiguous, in CPU memory that holds nothing else; ``copy``: in memory of its own.

    Of a part of a larger tensor on a GPU, no contiguous copy is made there.
    """
    if tensor.device.type == "cpu":
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if alone and not copy else tensor.clone(memory_format=torch.contiguous_format)
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    rows = [(host, tensor)] if tensor.is_contiguous() else zip(host, tensor, strict=True)
    for target, source in rows:
        target.copy_(source)
    return host
