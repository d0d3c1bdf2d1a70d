"""What one setting of a job buys: the same step with one of them changed, and all else as it is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ads.architecture import ModelShape
from megatron_ads.config.model import Recompute
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, PipelinePlacement, place_layers
from megatron_ads.planning.job import PlannedJob
from megatron_ads.planning.plan import Plan, make_plan
from megatron_ads.planning.search import arrangements, rearranged

_MTP_LOSS_WEIGHT = 0.1
"""Of DeepSeek-V3's last pre-training phase (arXiv:2412.19437, section 4.2), to compare with."""


@dataclass(frozen=True, slots=True)
class Switch:
    """One setting that is changed, and the plan with it."""

    setting: str
    plan: Plan


def switches(plan: Plan) -> list[Switch]:
    """Return what each change of one setting comes to; where layers must move, the fastest way to place them."""
    found = dict[str, Plan]()
    for setting, job in _changed(plan.job):
        tried = make_plan(job, plan.card)
        if setting not in found or tried.step_seconds < found[setting].step_seconds:
            found[setting] = tried
    return [Switch(*each) for each in found.items()]


def _changed(job: PlannedJob) -> Iterator[tuple[str, PlannedJob]]:
    sizes, model = job.layout, job.model
    if job.shape.mtp_layers and job.lora is None:
        weight = 0.0 if job.trains_mtp else _MTP_LOSS_WEIGHT
        yield f"model.mtp_loss_weight={weight:g}", replace(job, model=replace(model, mtp_loss_weight=weight))
    for moved, placement in _moved(job.shape, sizes, job.placement):
        yield f"{moved} layer{'s' * (moved != 1)} on stage 0", replace(job, placement=placement)
    if job.trains_mtp and sizes.cp == sizes.etp == 1:
        for _, placement in arrangements(job, pp=sizes.pp, tp=sizes.tp, vpp=sizes.vpp, ep=sizes.ep):
            if placement.chunks[-1].mtp_layers == ():
                yield "MTP layers before the loss", replace(job, placement=placement)
    if sizes.pp > 1:
        yield from _laid_out(job, "vpp", 2 if sizes.vpp == 1 else 1)
    for tp in (sizes.tp // 2, sizes.tp * 2):
        if tp:
            yield from _laid_out(job, "tp", tp)
    for recompute in Recompute:
        if recompute is not model.recompute:
            changed = replace(model, recompute=recompute, recompute_stages=None)
            yield f"model.recompute={recompute}", replace(job, model=changed)
    if model.recompute_stages is not None:
        yield "model.recompute_stages=null", replace(job, model=replace(model, recompute_stages=None))


def _laid_out(job: PlannedJob, size: str, value: int) -> Iterator[tuple[str, PlannedJob]]:
    sizes = job.layout
    if sizes.cp > 1 or sizes.etp > 1:
        return
    wanted = {"pp": sizes.pp, "tp": sizes.tp, "vpp": sizes.vpp, "ep": sizes.ep, size: value}
    for layout, placement in arrangements(job, **wanted):
        if size == "tp":
            placement = job.placement
        if changed := rearranged(job, layout, placement, job.micro_batch_size, job.model.recompute):
            stages = job.model.recompute_stages if layout.vpp == 1 else None
            yield f"layout.{size}={value}", replace(changed, model=replace(changed.model, recompute_stages=stages))


def _moved(
    shape: ModelShape, layout: ParallelLayout, placement: PipelinePlacement
) -> Iterator[tuple[int, PipelinePlacement]]:
    """Yield the placements with one layer more, and one less, on stage 0 and the other way round on the last one."""
    pieces = placement.string.split("|")
    if layout.pp == 1 or layout.vpp > 1:
        return
    for first, last in ((pieces[0] + "t", pieces[-1].replace("t", "", 1)), (pieces[0][:-1], "t" + pieces[-1])):
        try:
            pipeline = "|".join([first, *pieces[1:-1], last])
            yield first.count("t"), place_layers(shape, layout, pipeline=pipeline)
        except ConfigError:  # none is left to move
            continue
