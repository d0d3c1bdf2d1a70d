"""Training checkpoints: Megatron's torch_dist format in a folder that appears under its name only when complete.

    <dir>/step-00000100/            manifest.json names every file with its size and checksum
    <dir>/.step-00000120.partial/   a save that was cut off; never read, removed by the next save

Model keys and shapes are Megatron's own, so stock ``megatron.core.dist_checkpointing`` reads the model part. Nothing in
a checkpoint depends on the layout but the random-number states, which are used again on the same layout only. Of a job
that trains adapters it holds these and their optimizer state: the frozen weights are read from ``model.load`` again.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from conversion.atomic_file import sync_folder
from conversion.carried import SIDE_FOLDER, copy_side_files
from megatron_ads.errors import CheckpointError
from megatron_ads.layout import ParallelLayout
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.optim.state import load_optimizer_state, sharded_optimizer_state
from megatron_ads.training.adapter_record import AdapterRecord, require_same_adapters
from megatron_ads.training.checkpoint_errors import (
    failed_writes_named,
    misfits_named,
    raised_on_all_ranks,
    refuse_foreign_pickles,
)
from megatron_ads.training.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    checksum,
    complete_checkpoints,
    partial_checkpoints,
    read_manifest,
    verify_files,
)
from megatron_ads.training.common_state import write_common_state


@dataclass(frozen=True, kw_only=True, slots=True)
class JobProgress:
    """How far a job is; the same on every rank and under every layout."""

    step: int
    """Steps done, skipped updates included."""
    updates: int
    """Optimizer updates done."""
    data: dict[str, Any]
    """Position in the data, from ``BatchStream.state_dict``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the job, by dotted name; older checkpoints have none."""


def save_checkpoint(
    directory: Path,
    chunks: Sequence[Any],
    optimizer: OptimizerChain,
    progress: JobProgress,
    layout: ParallelLayout,
    *,
    side_files: Path | None,
    keep_last: int,
    adapters: AdapterRecord | None = None,
) -> Path:
    """Write one checkpoint; a collective over all ranks. Older ones beyond ``keep_last`` are deleted afterwards.

    ``side_files`` is a folder (config, tokenizer) copied along as ``hf/``, so that an export needs nothing else.
    ``adapters`` describes the adapters that are trained, if it is not the weights: the checkpoint then holds only them.

    Raises:
        CheckpointError, ConversionError: On a full disk, or if a checkpoint of this step is already there; on every
            rank.
        TopologyError: If the ranks disagree about the number of updates.
    """
    if optimizer.agreed_updates() != progress.updates:
        raise CheckpointError(f"progress says {progress.updates} updates, the optimizer {optimizer.updates}.")
    final = directory / f"step-{progress.step:08d}"
    partial = directory / f".{final.name}.partial"
    with raised_on_all_ranks(), failed_writes_named(directory):
        if dist.get_rank() == 0:
            _prepare(directory, final, partial)
    state = _sharded_state(chunks, optimizer, loading=False)
    state["training"] = asdict(progress)
    entries: list[Any] = [None] * dist.get_world_size()
    with failed_writes_named(directory):
        _write_tensors(state, partial)
    with raised_on_all_ranks(), failed_writes_named(directory):
        own_entries = _file_entries(partial, partial.glob(f"__{dist.get_rank()}_*.distcp"))
    dist.all_gather_object(entries, own_entries)
    with raised_on_all_ranks(), failed_writes_named(directory):
        if dist.get_rank() == 0:
            if side_files is not None:
                copy_side_files(side_files, partial / SIDE_FOLDER)
            merged = {name: entry for part in entries for name, entry in part.items()}
            _finish(partial, final, merged, progress, layout, adapters)
            for _, folder in complete_checkpoints(directory)[:-keep_last]:
                _remove(folder)
    return final


def _prepare(directory: Path, final: Path, partial: Path) -> None:
    if final.exists():
        raise CheckpointError(f"{final} already exists; delete it or choose another checkpoint.dir.")
    for leftover in partial_checkpoints(directory):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)


def _write_tensors(state: dict[str, Any], partial: Path) -> None:
    dist_checkpointing.save(state, str(partial), sharded_strategy=InProcessSave(), content_metadata={"format": FORMAT})


def _file_entries(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Flush the files to disk; return name -> size and checksum."""
    entries = {}
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        entries[str(file.relative_to(folder))] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
    return entries


def _finish(
    partial: Path,
    final: Path,
    entries: dict[str, dict[str, int]],
    progress: JobProgress,
    layout: ParallelLayout,
    adapters: AdapterRecord | None,
) -> None:
    """Rank 0: add the files nobody else owns, write the manifest last, and give the folder its name."""
    others = [file for file in partial.rglob("*") if file.is_file() and str(file.relative_to(partial)) not in entries]
    manifest = {
        "format": FORMAT,
        "step": progress.step,
        "updates": progress.updates,
        "layout": asdict(layout),
        "adapters": None if adapters is None else adapters.as_json(),
        "files": dict(sorted((entries | _file_entries(partial, others)).items())),
    }
    temporary = partial / f"{MANIFEST}.partial"
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(manifest, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.rename(partial / MANIFEST)
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves a folder without its manifest, never a damaged one."""
    doomed = folder.with_name(f".{folder.name}.partial")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def load_checkpoint(
    folder: Path,
    chunks: Sequence[Any],
    optimizer: OptimizerChain,
    layout: ParallelLayout,
    *,
    adapters: AdapterRecord | None = None,
) -> JobProgress:
    """Load a checkpoint, saved under this or any other layout, into the model and the optimizer; a collective.

    Raises:
        CheckpointError: If a file is missing, cut off or changed, or if it is not of these ``adapters`` or of what else
            is trained here.
        ConversionError, CheckpointError: If a pickled part refers to anything but plain values and tensors.
    """
    with raised_on_all_ranks():
        verify_files(folder, share=(dist.get_rank(), dist.get_world_size()))
    with raised_on_all_ranks():  # of files that all ranks know to be whole
        refuse_foreign_pickles(folder)
    manifest = read_manifest(folder)
    require_same_adapters(folder, manifest.get("adapters"), adapters)
    same_layout = manifest["layout"] == asdict(layout)
    state = _sharded_state(chunks, optimizer, loading=True)
    if not same_layout:
        del state["rng"]
    with misfits_named(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    for index, chunk in enumerate(chunks):
        _load_model(chunk, loaded[f"model{index}"])
    progress = JobProgress(**loaded["training"])
    load_optimizer_state(optimizer, loaded["optimizer"], updates=progress.updates)
    if same_layout:
        torch.set_rng_state(loaded["rng"]["torch"])
        tracker = get_cuda_rng_tracker()
        states = tracker.get_states()
        tracker.set_states({name: loaded["rng"][f"tracker.{name}"].to(state.device) for name, state in states.items()})
    return progress


def _sharded_state(chunks: Sequence[Any], optimizer: OptimizerChain, *, loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    models = {
        f"model{index}": core_model(chunk).sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)
    }
    state = {**models, "optimizer": sharded_optimizer_state(optimizer, models, loading=loading)}
    if loading:
        # The linears' _extra_state holds Transformer Engine's FP8 scales, unused here, and is pickled: it is written,
        # because stock Megatron asks for it, and never read.
        state = extract_matching_values(state, lambda value: not isinstance(value, ShardedObject))[0]
    state["rng"] = _random_states()
    return state


def core_model(chunk: Any) -> Any:
    """Return the GPTModel inside Megatron's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _load_model(chunk: Any, state: dict[str, Any]) -> None:
    model = core_model(chunk)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if model.trains_adapters:  # the frozen weights were loaded before
        missing = [name for name in missing if ".adapter" in name]
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )


def _random_states() -> dict[str, ShardedTensor]:
    """One row per rank. Dropout is off here, so nothing draws from them; they are kept for code that does."""
    states = {"torch": torch.get_rng_state()}
    states |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    where = (0, dist.get_rank(), dist.get_world_size())
    return {
        name: ShardedTensor.from_rank_offsets(f"rng.{name}", state.cpu(), where, prepend_axis_num=1)
        for name, state in states.items()
    }


class InProcessSave(TorchDistSaveShardedStrategy):
    """The torch_dist save strategy without writer processes (megatron-core 0.16 to 0.19); the bytes are the same.

    Megatron's own strategy starts processes for every save, so that training can continue meanwhile. A synchronous save
    gains nothing from them: it waits seconds for them, and a fork of a process with CUDA or gloo threads can deadlock.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> None:
        """Write this rank's tensors to ``__<rank>_0.distcp``, flushed to disk; a collective."""
        write_common_state(sharded_state_dict, checkpoint_dir)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )
