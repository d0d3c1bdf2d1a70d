"""Try layouts, microbatches and recomputation for the same step on as many cards, and rank what fits by speed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import Recompute
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.job import PlannedJob
from megatron_ads.planning.plan import Plan, make_plan

_TENSOR_SIZES = (1, 2, 4, 8)
_VIRTUAL_CHUNKS = (1, 2, 4)
_MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """What a search found."""

    tried: int
    """Layouts that are possible at all."""
    best: tuple[Plan, ...]
    """What fits, fastest first."""
    nearest: Plan | None
    """Where nothing fits: the one that lacks the least."""


def interleaved(job: PlannedJob, vpp: int) -> PlannedJob | None:
    """Return the same job with ``vpp`` virtual chunks a stage; None where that is impossible."""
    sizes = job.layout
    found = _arrangement(job, pp=sizes.pp, tp=sizes.tp, vpp=vpp, ep=sizes.ep)
    if found is None or sizes.cp > 1 or sizes.etp > 1:
        return None
    return _rearranged(job, *found, job.micro_batch_size, job.model.recompute)


def search(job: PlannedJob, card: Card, *, keep: int = 10) -> SearchResult:
    """Rank every arrangement of a job's step; the one that ``job`` has takes part."""
    tried, fitting, nearest = 0, [], None
    for candidate in (job, *_candidates(job, card)):
        tried += 1
        plan = make_plan(candidate, card)
        if plan.fits:
            fitting.append(plan)
        elif nearest is None or plan.spare_bytes > nearest.spare_bytes:
            nearest = plan
    fitting.sort(key=_quick_step_seconds)
    best = sorted(fitting[: 4 * keep], key=lambda plan: plan.step_seconds)[:keep]
    return SearchResult(tried=tried, best=tuple(best), nearest=None if best else nearest)


def _quick_step_seconds(plan: Plan) -> float:
    """Estimate the step without playing it through: the busiest stage, stretched by the ideal bubble."""
    sizes = plan.job.layout
    rate = plan.card.flops_per_second * plan.card.efficiency
    busiest = max(
        stage.flops_per_step / rate
        + sum(group.seconds(plan.card) for group in stage.traffic if group.group in ("ep", "tp"))
        for stage in plan.stages
    )
    work = sizes.vpp * plan.job.microbatches
    return busiest * (work + sizes.pp - 1) / work + plan.update_seconds


def _candidates(job: PlannedJob, card: Card) -> Iterator[PlannedJob]:
    sizes, experts = _divisors(job.layout.world), _divisors(job.shape.num_experts)
    for pp, tp, vpp, ep in product(sizes, _TENSOR_SIZES, _VIRTUAL_CHUNKS, experts):
        found = _arrangement(job, pp=pp, tp=tp, vpp=vpp, ep=ep)
        if found is None or tp > card.cards_per_node:
            continue
        for micro_batch_size, recompute in product(_MICRO_BATCHES, Recompute):
            candidate = _rearranged(job, *found, micro_batch_size, recompute)
            if candidate is not None and candidate != job:
                yield candidate


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _arrangement(
    job: PlannedJob, *, pp: int, tp: int, vpp: int, ep: int
) -> tuple[ParallelLayout, PipelinePlacement] | None:
    shape = job.shape
    if pp * vpp > shape.num_layers + shape.mtp_layers or (vpp > 1 and pp == 1) or (pp == 1 and shape.mtp_layers > 1):
        return None
    try:
        layout = ParallelLayout(world=job.layout.world, pp=pp, tp=tp, vpp=vpp, ep=ep)
        layout.check_model(shape)
        return layout, place_layers(shape, layout, pipeline=even_pipeline(shape, pp * vpp))
    except ConfigError:
        return None


def even_pipeline(shape: ModelShape, chunks: int) -> str:
    """Return a pipeline string with equal chunks; the loss and each MTP layer count as a layer where there is room.

    What does not divide evenly goes to the first chunks, whose dense layers are smaller.
    """
    for beside_layers in (shape.mtp_layers + 1, shape.mtp_layers, 0):
        share, extra = divmod(shape.num_layers + beside_layers, chunks)
        if share >= beside_layers:
            break
    counts = [share + (chunk < extra) for chunk in range(chunks)]
    counts[-1] -= beside_layers
    pieces = ["t" * count for count in counts]
    return "E" + "|".join(pieces) + "m" * shape.mtp_layers + "L"


def _rearranged(
    job: PlannedJob, layout: ParallelLayout, placement: PipelinePlacement, micro_batch_size: int, recompute: Recompute
) -> PlannedJob | None:
    """Return the same step (model, rows, everything trained) under another layout; None if it cannot be divided so."""
    rows = job.microbatches * job.micro_batch_size * job.layout.dp
    microbatches, rest = divmod(rows, micro_batch_size * layout.dp)
    uneven = layout.vpp > 1 and microbatches % layout.pp
    if rest or uneven or job.seq_length * micro_batch_size % layout.tp:
        return None
    return replace(
        job,
        layout=layout,
        placement=placement,
        micro_batch_size=micro_batch_size,
        microbatches=microbatches,
        model=replace(job.model, recompute=recompute),
    )
