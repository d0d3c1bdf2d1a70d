"""Which file of a shards folder holds which slice of which parameter: what that rank of the job owns, and no more."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from conversion.names import Parameter, Split, layer_parameters, outside_parameters, parameters, slice_shape
from megatron_ads.architecture import ModelShape
from megatron_ads.layout import Chunk, ParallelLayout, PipelinePlacement


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFile:
    """One distinct set of weights in a job: ranks with these coordinates hold the same ones."""

    pp: int
    tp: int
    ep: int
    etp: int
    etp_size: int

    @property
    def name(self) -> str:
        """File name inside the shards folder."""
        suffix = f"-etp{self.etp}" if self.etp_size > 1 else ""
        return f"pp{self.pp:02d}-tp{self.tp}-ep{self.ep:02d}{suffix}.safetensors"


@dataclass(frozen=True, slots=True)
class OwnedSlice:
    """One tensor-parallel slice of a parameter, and the lowest rank of the job that holds it."""

    owner: int
    index: int
    """Which slice it is, from 0 ..."""
    count: int
    """... of how many; 1 for the whole parameter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardsLayout:
    """A model laid out over ranks."""

    shape: ModelShape
    layout: ParallelLayout
    placement: PipelinePlacement

    def __post_init__(self) -> None:
        self.layout.check_model(self.shape)

    def rank_files(self) -> tuple[RankFile, ...]:
        """Return every distinct file, stage by stage: ``lcm(tp, ep * etp)`` of them a stage."""
        size = self.layout
        return tuple(
            RankFile(pp=pp, tp=rank % size.tp, ep=rank // size.etp % size.ep, etp=rank % size.etp, etp_size=size.etp)
            for pp in range(size.pp)
            for rank in range(math.lcm(size.tp, size.ep * size.etp))
        )

    def file_of(self, rank: int) -> RankFile:
        """Return the file that holds the weights of a rank of the job."""
        at = self.layout.coordinates(rank)
        return RankFile(pp=at.pp, tp=at.tp, ep=at.ep, etp=at.etp, etp_size=self.layout.etp)

    def writes_file(self, rank: int) -> bool:
        """Whether a rank is the lowest of those with the weights of its file, and so the one that writes it."""
        return rank % self._ranks_per_stage < math.lcm(self.layout.tp, self.layout.ep * self.layout.etp)

    def owners(self, parameter: Parameter) -> tuple[OwnedSlice, ...]:
        """Return the ranks that together hold ``parameter`` once, the lowest ones, in the order of its slices.

        A parameter that several stages hold, as the embedding with MTP layers, belongs to the first of them.
        """
        holders = (chunk.stage for chunk in self.placement.chunks if _chunk_holds(self.shape, chunk, parameter))
        first_rank = min(holders) * self._ranks_per_stage
        count = self.layout.tp
        if parameter.expert is not None:
            count = self.layout.etp
            first_rank += parameter.expert // (self.shape.num_experts // self.layout.ep) * count
        if parameter.split is Split.REPLICATED:
            count = 1
        return tuple(OwnedSlice(first_rank + index, index, count) for index in range(count))

    @property
    def _ranks_per_stage(self) -> int:
        return self.layout.world // self.layout.pp

    def owned(self, file: RankFile) -> Iterator[Parameter]:
        """Yield the parameters with a slice in ``file``, in model order."""
        count = self.shape.num_experts
        experts = self.layout.local_experts(count, file.ep) if count else range(0)
        stage = self.placement.stage_chunks(file.pp)
        yield from _outside_owned(self.shape, stage)
        for chunk in stage:
            for layer in (*chunk.layers, *(self.shape.num_layers + mtp for mtp in chunk.mtp_layers)):
                for parameter in layer_parameters(self.shape, layer):
                    if parameter.expert is None or parameter.expert in experts:
                        yield parameter

    def slice_of(self, parameter: Parameter, file: RankFile) -> tuple[int, int]:
        """Return (rank, size) of the tensor-parallel slice of ``parameter`` in ``file``."""
        if parameter.expert is None:
            return file.tp, self.layout.tp
        return file.etp, self.layout.etp

    def slice_shape(self, parameter: Parameter) -> tuple[int, ...]:
        """Return the shape that ``parameter`` has in any file that holds it."""
        return slice_shape(parameter, self.layout.tp if parameter.expert is None else self.layout.etp)

    def elements(self, file: RankFile) -> dict[str, int]:
        """Return how many elements of each parameter are in ``file``, by name."""
        return {parameter.name: math.prod(self.slice_shape(parameter)) for parameter in self.owned(file)}


_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")


def _chunk_holds(shape: ModelShape, chunk: Chunk, parameter: Parameter) -> bool:
    """Whether some rank that runs ``chunk`` holds a slice of ``parameter``."""
    if (match := _LAYER.match(parameter.name)) is None:
        return parameter in _outside_owned(shape, (chunk,))
    return int(match[2]) in (chunk.layers if match[1] == "decoder" else chunk.mtp_layers)


def _outside_owned(shape: ModelShape, stage: tuple[Chunk, ...]) -> Iterator[Parameter]:
    embedding, final_norm, *output_layer = outside_parameters(shape)
    has_loss = any(chunk.has_loss for chunk in stage)
    if any(chunk.needs_embedding for chunk in stage):
        yield embedding
    # Megatron-Core puts the final norm behind the last decoder layer if MTP layers follow, else next to the loss.
    if any(shape.num_layers - 1 in chunk.layers for chunk in stage) if shape.mtp_layers else has_loss:
        yield final_norm
    if has_loss:
        yield from output_layer


@dataclass(frozen=True, slots=True)
class WrongCopies:
    """A parameter that the ranks of a job do not hold in as many copies as they should."""

    parameter: str
    held: float
    """Elements on all ranks together, over those of one copy (not divided where no copy is expected)."""
    expected: int
    """0: it is not a parameter of the checkpoint."""


def wrong_copies(shards: ShardsLayout, ranks: Iterable[Mapping[str, int]]) -> list[WrongCopies]:
    """Check that the ranks tile the checkpoint: each element is held by as many ranks as there are replicas of it.

    Args:
        ranks: Of every rank of the job, how many elements of each parameter it holds.
    """
    held: Counter[str] = Counter()
    for elements in ranks:
        held.update(elements)
    sizes, wrong = shards.layout, []
    for name, parameter in parameters(shards.shape).items():
        size, routed = math.prod(parameter.shape), parameter.expert is not None
        expected = sizes.edp if routed else sizes.dp * sizes.cp
        if parameter.split is Split.REPLICATED:
            expected *= sizes.etp if routed else sizes.tp
        if name.startswith("embedding."):
            expected *= len({chunk.stage for chunk in shards.placement.chunks if chunk.needs_embedding})
        if (found := held.pop(name, 0)) != expected * size:
            wrong.append(WrongCopies(name, found / size, expected))
    return wrong + [WrongCopies(name, count, 0) for name, count in held.items()]
