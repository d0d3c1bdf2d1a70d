"""What a rank turned out to have when it was built, compared with the layout and with the other ranks. No torch."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conversion.names import hf_aliases, parameters
from conversion.rank_files import ShardsLayout, wrong_copies
from megatron_ads.errors import TopologyError
from megatron_ads.layout import Coordinates, ParallelLayout
from megatron_ads.runtime.preflight import Record, check_records

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFacts:
    """One rank as Megatron-Core built it."""

    rank: int
    coordinates: Coordinates
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


_AXES = {"tp": ("tp",), "dp": ("dp", "cp"), "pp": ("pp",), "ep": ("ep",), "etp": ("etp",), "edp": ("edp",)}
_GRIDS = (("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp"))


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
    faults = [fault for facts in ranks for fault in _tensor_faults(shards, facts)]
    for facts in ranks:
        for name, expected in expected_groups(shards.layout, facts.rank).items():
            if facts.groups[name] != expected:
                faults.append(
                    f"rank {facts.rank}: its {name} group is {facts.groups[name]}, the layout says {expected}"
                )
    faults += _message_faults(shards.layout, ranks)
    try:
        check_records([facts.record for facts in ranks])
    except TopologyError as error:
        faults.append(str(error))
    return faults + coverage_faults(shards, {facts.rank: facts.tensors for facts in ranks})


def _tensor_faults(shards: ShardsLayout, facts: RankFacts) -> Iterator[str]:
    expected = {parameter.name: shards.slice_shape(parameter) for parameter in shards.owned(shards.file_of(facts.rank))}
    for name in sorted(expected.keys() | facts.tensors.keys()):
        if expected.get(name) != facts.tensors.get(name):
            yield (
                f"rank {facts.rank}: {name} is {facts.tensors.get(name) or 'missing'} in the model, "
                f"{expected.get(name) or 'missing'} in its shard file"
            )


def _message_faults(layout: ParallelLayout, ranks: Sequence[RankFacts]) -> Iterator[str]:
    by_stage = {facts.coordinates.pp: facts for facts in ranks}
    for facts in ranks:
        following = (facts.rank + layout.world // layout.pp) % layout.world
        if layout.pp > 1 and facts.next_rank != following:
            yield f"rank {facts.rank}: sends to rank {facts.next_rank}, the layout says {following}"
        receiver = by_stage.get((facts.coordinates.pp + 1) % layout.pp, facts)
        if facts.message != receiver.message:
            yield f"rank {facts.rank} sends {facts.message}, but rank {receiver.rank} expects {receiver.message}"


def coverage_faults(shards: ShardsLayout, built: Mapping[int, Mapping[str, Shape]]) -> list[str]:
    """Check that the ranks tile the checkpoint: each element is held by as many ranks as there are replicas of it.

    Args:
        built: Shapes on each rank that was built; the other ranks count as their shard file says.
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
