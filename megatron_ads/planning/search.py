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
    expert_less: tuple[Plan, ...]
    """The same, of those whose first stage owns no routed expert."""
    nearest: Plan | None
    """Where nothing fits: the one that lacks the least."""


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
    return SearchResult(
        tried=tried,
        best=_fastest(fitting[: 4 * keep], keep),
        expert_less=_fastest([plan for plan in fitting if 0 in plan.expert_less_stages][:keep], keep // 3),
        nearest=None if fitting else nearest,
    )


def _fastest(plans: list[Plan], keep: int) -> tuple[Plan, ...]:
    best = list[Plan]()
    for plan in sorted(map(_keeping, sorted(plans, key=ranking_seconds)[:keep]), key=ranking_seconds):
        if all(plan.job != other.job for other in best):
            best.append(plan)
    return tuple(best)


def ranking_seconds(plan: Plan) -> float:
    """Return the step with the adding up of weight gradients on top, which small microbatches do more often.

    The efficiency that the step assumes is the same for all arrangements, and would favour many small ones.
    """
    return plan.step_seconds + plan.accumulation_seconds


def _keeping(plan: Plan) -> Plan:
    """Return the plan in which as many of the last stages as there is memory for keep everything.

    They hold fewer microbatches than those in front of them, unless there are several chunks a stage.
    """
    job = plan.job
    if job.layout.vpp > 1 or job.model.recompute is Recompute.none:
        return plan
    for stages in range(job.layout.pp - 1, 0, -1):
        kept = make_plan(replace(job, model=replace(job.model, recompute_stages=stages)), plan.card)
        if not kept.fits:
            break
        plan = kept
    return plan


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
    return busiest * (work + sizes.pp - 1) / work + plan.update_seconds + plan.accumulation_seconds


def _candidates(job: PlannedJob, card: Card) -> Iterator[PlannedJob]:
    sizes, experts = _divisors(job.layout.world), _divisors(max(job.shape.num_experts, 1))
    for pp, tp, vpp, ep in product(sizes, _TENSOR_SIZES, _VIRTUAL_CHUNKS, experts):
        if tp > card.cards_per_node:
            continue
        for layout, placement in arrangements(job, pp=pp, tp=tp, vpp=vpp, ep=ep):
            for micro_batch_size, recompute in product(_MICRO_BATCHES, Recompute):
                candidate = rearranged(job, layout, placement, micro_batch_size, recompute)
                if candidate is not None and candidate != job:
                    yield candidate


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def arrangements(
    job: PlannedJob, *, pp: int, tp: int, vpp: int, ep: int
) -> list[tuple[ParallelLayout, PipelinePlacement]]:
    """Return the ways to lay a job's layers over these sizes that are worth trying; none where they do not fit."""
    shape = job.shape
    if pp * vpp > shape.num_layers + shape.mtp_layers or (vpp > 1 and pp == 1) or (pp == 1 and shape.mtp_layers > 1):
        return []
    found = []
    for pipeline in pipelines(shape, pp * vpp, trains_mtp=job.trains_mtp):
        try:
            layout = ParallelLayout(world=job.layout.world, pp=pp, tp=tp, vpp=vpp, ep=ep)
            layout.check_model(shape)
            found.append((layout, place_layers(shape, layout, pipeline=pipeline)))
        except ConfigError:
            continue
    return found


def pipelines(shape: ModelShape, chunks: int, *, trains_mtp: bool) -> list[str]:
    """Return pipeline strings with equal chunks, but for the last one: the loss takes the place of some layers.

    An output layer is about as much work as a layer; each trained MTP layer passes one more and is a layer itself. It
    can also have the chunk before the last. What does not divide evenly goes to the first chunks, whose dense layers
    own no routed experts.
    """
    mtp, heads = "m" * shape.mtp_layers, 1 + shape.mtp_layers * trains_mtp
    rooms = range(heads + shape.mtp_layers * trains_mtp + 1)
    ways = [(_even_counts(shape.num_layers, chunks, room), "L") for room in rooms]
    if trains_mtp and chunks > 2:
        ways.append((_even_counts(shape.num_layers, chunks - 1, shape.mtp_layers), "|L"))
    strings = ("E" + "|".join("t" * count for count in counts) + mtp + end for counts, end in ways if counts)
    return list(dict.fromkeys(strings))


def _even_counts(layers: int, chunks: int, room: int) -> list[int]:
    """Return the layers of every chunk where the last has room for ``room`` more; none where they leave it too few."""
    share, extra = divmod(layers + room, chunks)
    if share < room:
        return []
    counts = [share + (chunk < extra) for chunk in range(chunks)]
    counts[-1] -= room
    return counts


def rearranged(
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
        model=replace(job.model, recompute=recompute, recompute_stages=None),
    )
