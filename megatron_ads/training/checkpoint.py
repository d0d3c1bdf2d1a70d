"""Training checkpoints: Megatron's torch_dist format in a folder that appears under its name only when complete.

    <dir>/step-00000100/            manifest.json names every file with its size and checksum
    <dir>/.step-00000120.partial/   a save that was cut off; never read, removed by the next save

Model keys and shapes are Megatron's own, so stock ``megatron.core.dist_checkpointing`` reads the model part. Nothing in
a checkpoint depends on the layout but the random-number states, which are used again on the same layout only. Of a job
that trains adapters it holds these and their optimizer state: the frozen weights are read from ``model.load`` again.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from conversion.carried import SIDE_FOLDER, copy_side_files
from megatron_ads.errors import CheckpointError
from megatron_ads.layout import ParallelLayout
from megatron_ads.optim.chain import OptimizerChain
from megatron_ads.optim.state import set_updates, sharded_optimizer_state
from megatron_ads.training.adapter_record import AdapterRecord, require_same_adapters
from megatron_ads.training.checkpoint_errors import (
    failed_writes_named,
    misfits_named,
    raised_on_all_ranks,
    refuse_foreign_pickles,
)
from megatron_ads.training.checkpoint_folder import FORMAT, complete_checkpoints, read_manifest, verify_files
from megatron_ads.training.checkpoint_save import PendingSave, prepare, publish, remove
from megatron_ads.training.checkpoint_writer import PlannedSave, RankWriter, WrittenFile


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
    in_background: bool = False,
) -> PendingSave:
    """Write one checkpoint; a collective over all ranks. Older ones beyond ``keep_last`` are deleted afterwards.

    ``side_files`` is a folder (config, tokenizer) copied along as ``hf/``, so that an export needs nothing else.
    ``adapters`` describes the adapters that are trained, if it is not the weights: the checkpoint then holds only them.
    ``in_background``: return when the tensors are copied to the host; the checkpoint is there when ``wait`` of what is
    returned has returned, which must be called on all ranks before the next save.

    Raises:
        CheckpointError, ConversionError: On every rank, on a full disk or if there is a checkpoint of this step.
        TopologyError: If the ranks disagree about the number of updates.
    """
    if optimizer.agreed_updates() != progress.updates:
        raise CheckpointError(f"progress says {progress.updates} updates, the optimizer {optimizer.updates}.")
    final, partial = _new_folder(directory, progress.step)
    state = _sharded_state(chunks, optimizer, loading=False) | {"training": asdict(progress)}
    with failed_writes_named(directory):
        writer = _plan(state, partial, staged=in_background)
    complete = functools.partial(
        _complete,
        writer=writer,
        final=final,
        partial=partial,
        manifest=_manifest(progress, layout, adapters),
        side_files=side_files,
        keep_last=keep_last,
    )
    pending = PendingSave(writer.write, complete, directory)
    pending.start(in_background=in_background)
    return pending


def _new_folder(directory: Path, step: int) -> tuple[Path, Path]:
    """Make the temporary folder of a checkpoint; return its name to be and its own; a collective."""
    final = directory / f"step-{step:08d}"
    partial = directory / f".{final.name}.partial"
    with raised_on_all_ranks(), failed_writes_named(directory):
        if dist.get_rank() == 0:
            prepare(directory, final, partial)
    return final, partial


def _complete(
    files: list[WrittenFile],
    *,
    writer: RankWriter,
    final: Path,
    partial: Path,
    manifest: dict[str, Any],
    side_files: Path | None,
    keep_last: int,
) -> None:
    """Rank 0, once all ranks have written: add what belongs to no rank, and give the folder its name."""
    writer.write_index(files)
    if side_files is not None:
        copy_side_files(side_files, partial / SIDE_FOLDER)
    publish(partial, final, files, manifest)
    for _, folder in complete_checkpoints(final.parent)[:-keep_last]:
        remove(folder)


def _manifest(progress: JobProgress, layout: ParallelLayout, adapters: AdapterRecord | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": progress.step,
        "updates": progress.updates,
        "layout": asdict(layout),
        "adapters": None if adapters is None else adapters.as_json(),
    }


def _plan(state: dict[str, Any], partial: Path, *, staged: bool) -> RankWriter:
    """Write the common state and agree on who writes which tensor, spread over those that hold it; a collective."""
    strategy = PlannedSave(staged=staged)
    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist_checkpointing.save(
        state,
        str(partial),
        sharded_strategy=FullyParallelSaveStrategyWrapper(strategy, replicas),
        content_metadata={"format": FORMAT},
    )
    return strategy.writer


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
    set_updates(optimizer, progress.updates)
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
