"""Build the real model of one rank after the other in this process, and check that the ranks make up the job.

torch's fake process group lets a process take any rank's place, and the meta device gives tensors shapes but no
memory: neither weights nor the other ranks are needed. What is built is what training builds.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from conversion.names import hf_aliases, parameters
from conversion.rank_files import ShardsLayout, wrong_copies
from conversion.shards import open_shards
from megatron_ads.config.model import LayerSpecChoice
from megatron_ads.errors import ConfigError, ConversionError, TopologyError
from megatron_ads.layout import ParallelLayout
from megatron_ads.models.parts import part_of
from megatron_ads.models.settings import ModelSettings
from megatron_ads.planning.job import PlannedJob
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import process_memory_bytes
from megatron_ads.runtime.preflight import Groups, Record, check_records

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

Shape = tuple[int, ...]
_FAULTS_SHOWN = 20
_SIZES = ("tp", "pp", "vpp", "ep", "etp")
_AXES = {"tp": ("tp",), "dp": ("dp", "cp"), "pp": ("pp",), "ep": ("ep",), "etp": ("etp",), "edp": ("edp",)}
_GRIDS = (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """One rank as Megatron-Core built it."""

    rank: int
    parameters: int
    """Elements that are parameters; router biases are buffers."""
    tensors: Mapping[str, Shape]
    """Shape of every canonical parameter and router bias on the rank."""
    groups: Mapping[str, tuple[int, ...]]
    """Members of each process group the rank is in, by axis."""
    next_rank: int
    """Where it sends activations."""
    message: tuple[Shape, str]
    """Shape and dtype that it sends to and expects from its neighbours in the pipeline."""
    record: Record
    """Its part in the preflight check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltRanks:
    """Which ranks were built, and every fault that was found."""

    world: int
    parameters_by_rank: dict[int, int]
    """Elements of the model on each rank that was built."""
    tensors_of_checkpoint: int
    shards: str | None
    """Converted checkpoint that was checked too."""
    faults: tuple[str, ...]
    seconds: float
    peak_bytes: int
    """Of this process, so far."""

    def lines(self) -> list[str]:
        done = (
            f"build: {len(self.parameters_by_rank)} of {self.world} ranks built in {self.seconds:.1f} s and "
            f"{self.peak_bytes / 1e9:.2f} GB; "
        )
        if self.faults:
            return [f"{done}{len(self.faults)} FAULTS", *(f"  {fault}" for fault in self.faults[:_FAULTS_SHOWN])]
        shards = f"; every file of {self.shards} is complete" if self.shards else ""
        return [
            f"{done}the ranks hold all {self.tensors_of_checkpoint:,} tensors of the checkpoint in exactly the "
            f"expected copies; groups, messages and optimizers agree{shards}"
        ]


def build_ranks(job: PlannedJob, *, every_rank: bool = False, shards: Path | None = None) -> BuiltRanks:
    """Build one rank of every stage (or every rank) and check what was built.

    The ranks of a stage differ in which experts they hold; each stage's is taken one further along the stage than the
    one before, so that all positions occur.

    Raises:
        ConfigError: If Megatron-Core cannot express the model or the layout, or this process has a job already.
    """
    if dist.is_initialized():
        raise ConfigError("--build-ranks takes the place of every rank in turn: it cannot run inside a running job.")
    started = time.monotonic()
    stages = [job.layout.stage_ranks(stage) for stage in range(job.layout.pp)]
    one_each = [ranks[number % len(ranks)] for number, ranks in enumerate(stages)]
    facts = [_build_rank(job, rank) for rank in (range(job.layout.world) if every_rank else one_each)]
    faults = check_ranks(job.shards, facts)
    if shards is not None:
        faults += _shard_faults(job, shards)
    return BuiltRanks(
        world=job.layout.world,
        parameters_by_rank={one.rank: one.parameters for one in facts},
        tensors_of_checkpoint=checkpoint_keys(job.shards),
        shards=None if shards is None else str(shards),
        faults=tuple(faults),
        seconds=time.monotonic() - started,
        peak_bytes=process_memory_bytes("VmHWM"),
    )


def _build_rank(job: PlannedJob, rank: int) -> RankFacts:
    model = job.model
    if model.layer_spec is not LayerSpecChoice.local:
        model = replace(model, layer_spec=LayerSpecChoice.grouped)  # te wants a GPU; the parameters are the same
    settings = ModelSettings.of(model, deterministic=job.deterministic)
    process_groups.start_fake(job.layout, rank)
    try:
        from megatron_ads.models.build import build_chunks
        from megatron_ads.models.lora import add_adapters  # Megatron-Core only now: the CPU's patches come first

        with torch.device("meta"):
            chunks = build_chunks(job.shape, job.layout, job.placement, settings)
            if job.lora is not None:
                add_adapters(chunks, job.lora, job.shape, settings.spec)
        return _describe(job, rank, chunks, settings)
    finally:
        process_groups.stop()


def _describe(job: PlannedJob, rank: int, chunks: Sequence["GPTModel"], settings: ModelSettings) -> RankFacts:
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

    from megatron_ads.models.weights import named_weights

    tensors = {
        canonical: tuple(piece.shape)
        for weight in named_weights(chunks, settings.spec)
        for canonical, piece in weight.pieces()
    }
    tp_group = parallel_state.get_tensor_model_parallel_group()
    groups = {
        "tp": tp_group,
        "dp": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "ep": parallel_state.get_expert_model_parallel_group(),
        "etp": parallel_state.get_expert_tensor_parallel_group(),
        "edp": parallel_state.get_expert_data_parallel_group(),
    }
    (message,) = get_tensor_shapes(  # one, because rows are laid end to end
        seq_length=job.tokens_per_microbatch,
        micro_batch_size=1,
        decoder_seq_length=None,
        config=chunks[0].config,
        tp_group=tp_group,
        cp_group=parallel_state.get_context_parallel_group(),
    )
    return RankFacts(
        rank=rank,
        parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        tensors=tensors,
        groups={name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()},
        next_rank=parallel_state.get_pipeline_model_parallel_next_rank(),
        message=(tuple(message), str(chunks[0].config.pipeline_dtype)),
        record=_record(job, rank, chunks, settings),
    )


def _record(job: PlannedJob, rank: int, chunks: Sequence["GPTModel"], settings: ModelSettings) -> Record:
    """Return what the optimizer chain would be: as ``optim.build`` divides parameters, without its state."""
    from megatron_ads.optim.build import DECAYED, GROUP_NAMES, UNDECAYED, is_decayed
    from megatron_ads.optim.members import DENSE, EXPERT
    from megatron_ads.optim.stub import StubOptimizer

    counts = {(kind, group): 0 for kind in (DENSE, EXPERT) for group in GROUP_NAMES}
    for name, parameter in _trained(job, chunks, settings):
        kind = DENSE if getattr(parameter, "allreduce", True) else EXPERT
        counts[kind, DECAYED if is_decayed(name, parameter) else UNDECAYED] += 1
    kinds = (DENSE, EXPERT) if job.trains_experts else (DENSE,)
    members: dict[str, Groups] = {kind: tuple((group, counts[kind, group]) for group in GROUP_NAMES) for kind in kinds}
    if job.trains_experts and not any(count for _, count in members[EXPERT]):
        members[EXPERT] = StubOptimizer(EXPERT, GROUP_NAMES).group_keys()
    at, same = job.layout.coordinates(rank), "built"
    return Record(rank=rank, coordinates=at, members=members, versions={}, config_digest=same, code_revision=same)


def _trained(
    job: PlannedJob, chunks: Sequence["GPTModel"], settings: ModelSettings
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    from megatron_ads.models.weights import named_weights

    if job.lora is not None:
        for chunk in chunks:
            yield from ((name, factor) for name, factor in chunk.named_parameters() if factor.requires_grad)
        return
    for weight in named_weights(chunks, settings.spec):
        trained = job.trains(part_of(weight.canonical[0], job.shape))
        if trained and isinstance(weight.tensor, torch.nn.Parameter) and weight.tensor.requires_grad:
            yield weight.name, weight.tensor


def _shard_faults(job: PlannedJob, folder: Path) -> list[str]:
    """Check a converted checkpoint: every file there and whole, and made for this layout."""
    try:
        found, wanted = open_shards(folder).layout, job.shards
    except FileNotFoundError as error:
        return [f"{folder}: {error.filename} does not exist"]
    except ConversionError as error:
        return [str(error)]
    compared = [
        *((f"layout.{name}", getattr(found.layout, name), getattr(wanted.layout, name)) for name in _SIZES),
        ("layout.pipeline", found.placement.string, wanted.placement.string),
        ("the model", found.shape, wanted.shape),
    ]
    return [
        f"{folder} was converted for {what} {theirs}, the recipe has {ours}"
        for what, theirs, ours in compared
        if theirs != ours
    ]


def expected_groups(layout: ParallelLayout, rank: int) -> dict[str, tuple[int, ...]]:
    """Return the ranks that share every coordinate with ``rank`` but those of the group's axes, for each group."""
    own = layout.coordinates(rank)
    others = [(other, layout.coordinates(other)) for other in range(layout.world)]
    groups = {}
    for name, axes in _AXES.items():
        grid = next(grid for grid in _GRIDS if set(axes) <= set(grid))
        fixed = [axis for axis in grid if axis not in axes]
        groups[name] = tuple(
            other for other, at in others if all(getattr(at, axis) == getattr(own, axis) for axis in fixed)
        )
    return groups


def check_ranks(shards: ShardsLayout, ranks: Sequence[RankFacts]) -> list[str]:
    """Return every fault, one line each; empty: what was built is what the layout says, on every rank."""
    faults = [fault for facts in ranks for fault in _rank_faults(shards, facts)]
    faults += _message_faults(shards.layout, ranks)
    try:
        check_records([facts.record for facts in ranks])
    except TopologyError as error:
        faults.append(str(error))
    return faults + coverage_faults(shards, {facts.rank: facts.tensors for facts in ranks})


def _rank_faults(shards: ShardsLayout, facts: RankFacts) -> Iterator[str]:
    expected = {parameter.name: shards.slice_shape(parameter) for parameter in shards.owned(shards.file_of(facts.rank))}
    for name in sorted(expected.keys() | facts.tensors.keys()):
        if expected.get(name) != facts.tensors.get(name):
            yield (
                f"rank {facts.rank}: {name} is {facts.tensors.get(name) or 'missing'} in the model, "
                f"{expected.get(name) or 'missing'} in its shard file"
            )
    for name, members in expected_groups(shards.layout, facts.rank).items():
        if facts.groups[name] != members:
            yield f"rank {facts.rank}: its {name} group is {facts.groups[name]}, the layout says {members}"


def _message_faults(layout: ParallelLayout, ranks: Sequence[RankFacts]) -> Iterator[str]:
    by_stage = {facts.record.coordinates.pp: facts for facts in ranks}
    for facts in ranks:
        following = (facts.rank + layout.world // layout.pp) % layout.world
        if layout.pp > 1 and facts.next_rank != following:
            yield f"rank {facts.rank}: sends to rank {facts.next_rank}, the layout says {following}"
        receiver = by_stage.get((facts.record.coordinates.pp + 1) % layout.pp, facts)
        if facts.message != receiver.message:
            yield f"rank {facts.rank} sends {facts.message}, but rank {receiver.rank} expects {receiver.message}"


def coverage_faults(shards: ShardsLayout, built: Mapping[int, Mapping[str, Shape]]) -> list[str]:
    """Check that the ranks tile the checkpoint: each element is held by as many ranks as there are replicas of it.

    ``built`` has the shapes on each rank that was built; the other ranks count as their shard file says.
    """
    contents = {file: shards.elements(file) for file in shards.rank_files()}
    held = (
        {name: math.prod(shape) for name, shape in built[rank].items()}
        if rank in built
        else contents[shards.file_of(rank)]
        for rank in range(shards.layout.world)
    )
    return [
        f"{one.parameter}: held by {one.held:g} replicas instead of {one.expected}"
        if one.expected
        else f"{one.parameter}: held, but not in the checkpoint"
        for one in wrong_copies(shards, held)
    ]


def checkpoint_keys(shards: ShardsLayout) -> int:
    """Return how many weight tensors the published checkpoint has, what MTP layers repeat included."""
    own = sum(len(parameter.parts) for parameter in parameters(shards.shape).values())
    return own + len(hf_aliases(shards.shape))
