"""A plan as lines for a terminal or a log of 120 columns, as a page, and as values for programs."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from megatron_ads.config.model import LoraTarget
from megatron_ads.layout import describe_ranks
from megatron_ads.models.parts import parameters_by_part
from megatron_ads.planning.hardware import Card
from megatron_ads.planning.plan import Plan, StagePlan
from megatron_ads.planning.preference import PreferenceCosts
from megatron_ads.planning.rollout import RolloutCosts
from megatron_ads.planning.schedule import ideal_bubble
from megatron_ads.planning.search import SearchResult
from megatron_ads.planning.switches import Switch
from megatron_ads.reporting.page import render, text_table

_COLUMNS = 120
"""Width that tables and paragraphs keep to, on a terminal and in a log."""


def plan_lines(plan: Plan) -> list[str]:
    """Return what the terminal shows. Stages that are equal in all they show share a line."""
    wrap = textwrap.TextWrapper(_COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False).wrap
    summary = [piece for line in summary_lines(plan) for piece in wrap(line)]
    return [*wrap(_title(plan)), "", *_stage_table(plan), "", *summary]


def _title(plan: Plan) -> str:
    job, sizes = plan.job, plan.job.layout
    of_experts = ("ep", "edp", "etp") if job.shape.num_experts else ()
    axes = " x ".join(
        f"{name} {size}" for name in ("pp", "vpp", "dp", "cp", "tp", *of_experts) if (size := getattr(sizes, name)) > 1
    )
    return (
        f"{sizes.world} x {plan.card.name} of {plan.card.memory_bytes / 1e9:g} GB: {axes or 'one rank'}; "
        f"{job.model.precision.value}, recompute {_recomputation(plan)}, {job.microbatches} microbatches of "
        f"{job.micro_batch_size} x {job.seq_length} tokens per replica"
    )


def _stage_table(plan: Plan) -> list[str]:
    kinds = ("weights", "grads", "optim", "activ.", "buffers")
    head = ["stage", "layers", "params B", "experts B", *kinds, "peak GB", "PFLOP"]
    rows = []
    for cells, equal in groupby(plan.stages, key=_cells):
        stages = list(equal)
        number, contents = str(stages[0].stage), stages[0].contents
        if len(stages) > 1:
            number = f"{number}-{stages[-1].stage}"
            contents = "+".join(str(len(chunk.layers)) for chunk in stages[0].chunks) + " each"
        rows.append((number, contents, *cells))
    return text_table(rows, head, left=["layers"], width=_COLUMNS)


def _cells(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    kinds = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers)
    return (
        f"{stage.parameters / 1e9:.4f}",
        f"{stage.expert_parameters / 1e9:.4f}" if stage.expert_parameters else "none",
        *(f"{value / 1e9:.1f}" for value in kinds),
        f"{memory.peak / 1e9:.2f}",
        f"{stage.flops_per_step / 1e15:.3g}",
    )


def summary_lines(plan: Plan) -> list[str]:
    """Return what there is to say below the table of stages."""
    job, sizes = plan.job, plan.job.layout
    traffic = [group for stage in plan.stages for group in stage.traffic if group.bytes_per_step]
    text = render(
        "planning/summary.txt.jinja",
        plan=plan,
        over=[stage for stage in plan.stages if stage.memory.peak > plan.card.memory_bytes],
        targets=[target for target in LoraTarget if job.lora and target in job.lora.targets],
        adapters=job.lora.parameters(job.shape) if job.lora else 0,
        weights=parameters_by_part(job.shape).total(),
        expert_less_ranks=describe_ranks(
            [rank for stage in plan.expert_less_stages for rank in sizes.stage_ranks(stage)]
        ),
        ideal=ideal_bubble(sizes.pp, sizes.vpp, job.microbatches),
        traffic=[
            max((group for group in traffic if group.group == name), key=lambda group: group.bytes_per_step)
            for name in dict.fromkeys(group.group for group in traffic)
        ],
    )
    return text.splitlines()


def plan_page(recipe: str, plan: Plan) -> str:
    """Return the plan as one HTML document: the pipeline x expert grid coloured by memory, and a step's timeline."""
    stages = []
    for stage in plan.stages:
        memory = stage.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers, memory.peak)
        gigabytes = (f"{value / 1e9:.2f}" for value in parts)
        stages.append((stage.stage, stage.contents, f"{stage.parameters / 1e9:.4f}", *gigabytes))
    lead, summary = _title(plan), summary_lines(plan)
    return render("planning/plan.html.jinja", recipe=recipe, lead=lead, plan=plan, stages=stages, summary=summary)


def search_lines(result: SearchResult, card: Card) -> list[str]:
    if result.nearest is not None:
        missing = -result.nearest.spare_bytes / 1e9
        return [
            f"search: none of {result.tried} arrangements fits {card.memory_bytes / 1e9:g} GB; the nearest, "
            f"{_arrangement(result.nearest)}, lacks {missing:.2f} GB"
        ]
    lines = [
        f"search: {result.tried} arrangements tried; fastest of those that fit, by the step and the adding up of "
        "weight gradients:",
        *_ranked(result.best),
    ]
    if result.expert_less:
        lines += ["", "fastest without routed experts on the first stage:", *_ranked(result.expert_less)]
    return lines


def _ranked(plans: Sequence[Plan]) -> list[str]:
    head = ("arrangement", "pipeline", "peak GB", "bubble", "step s", "grads s", "tokens/s", "of peak")
    rows = [
        (
            _arrangement(plan),
            _shortened(plan.job.placement.string),
            f"{plan.fullest.memory.peak / 1e9:.1f}",
            f"{plan.timeline.bubble:.1%}",
            f"{plan.step_seconds:.1f}",
            f"{plan.accumulation_seconds:.1f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.model_flops_utilization:.1%}",
        )
        for plan in plans
    ]
    return text_table(rows, head, left=["arrangement", "pipeline"], width=_COLUMNS)


def _arrangement(plan: Plan) -> str:
    job, sizes = plan.job, plan.job.layout
    names = [f"{name}{getattr(sizes, name)}" for name in ("pp", "vpp", "tp", "ep")]
    return f"{' '.join(names)} micro {job.micro_batch_size} {_recomputation(plan)}"


def _recomputation(plan: Plan) -> str:
    """Such as ``selective`` or, where the last stages keep everything, ``selective to 26``."""
    model = plan.job.model
    return model.recompute.value + ("" if model.recompute_stages is None else f" to {model.recompute_stages - 1}")


def _shortened(pipeline: str) -> str:
    """Write runs of equal chunks as Megatron's ``(...)*n``."""
    pieces = pipeline.split("|")
    runs = [(piece, len(list(equal))) for piece, equal in groupby(pieces[:-1])]
    return "".join(f"({piece}|)*{count}" if count > 1 else f"{piece}|" for piece, count in runs) + pieces[-1]


def switch_lines(plan: Plan, found: Sequence[Switch]) -> list[str]:
    rows = [("as it is", plan), *((switch.setting, switch.plan) for switch in found)]
    head = ("one setting changed", "pipeline", "peak GB", "bubble", "step s", "gain")
    cells = [
        (
            setting,
            _shortened(each.job.placement.string),
            f"{each.fullest.memory.peak / 1e9:.1f}" + ("" if each.fits else " over"),
            f"{each.timeline.bubble:.1%}",
            f"{each.step_seconds:.2f}",
            f"{plan.step_seconds / each.step_seconds - 1:+.1%}",
        )
        for setting, each in rows
    ]
    return text_table(cells, head, left=["one setting changed", "pipeline"], width=_COLUMNS)


def search_values(result: SearchResult, found: Sequence[Switch]) -> dict[str, Any]:
    return {
        "tried": result.tried,
        "best": [_brief(plan) for plan in result.best],
        "expert_less": [_brief(plan) for plan in result.expert_less],
        "nearest": _brief(result.nearest) if result.nearest else None,
        "switches": [{"setting": switch.setting, **_brief(switch.plan)} for switch in found],
    }


def _brief(plan: Plan) -> dict[str, Any]:
    sizes = plan.job.layout
    return {
        "layout": {name: getattr(sizes, name) for name in ("pp", "vpp", "tp", "cp", "ep", "etp")},
        "pipeline": plan.job.placement.string,
        "micro_batch_size": plan.job.micro_batch_size,
        "recompute": plan.job.model.recompute.value,
        "recompute_stages": plan.job.model.recompute_stages,
        "mtp_loss_weight": plan.job.model.mtp_loss_weight,
        "peak_bytes": plan.fullest.memory.peak,
        "spare_bytes": plan.spare_bytes,
        "bubble": plan.timeline.bubble,
        "step_seconds": plan.step_seconds,
        "accumulation_seconds": plan.accumulation_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "model_flops_utilization": plan.model_flops_utilization,
    }


def _step_values(found: RolloutCosts | PreferenceCosts | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return asdict(found) | {"bound_by": found.bound_by, "estimated_step_seconds": found.step_seconds}


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return a plan for programs; bytes, seconds and counts, nothing rounded."""
    return {
        "ranks": plan.job.layout.world,
        "card": asdict(plan.card),
        "fits": plan.fits,
        **_brief(plan),
        "ideal_bubble": ideal_bubble(plan.job.layout.pp, plan.job.layout.vpp, plan.job.microbatches),
        "expert_less_stages": list(plan.expert_less_stages),
        "imbalance": plan.imbalance,
        "routing_imbalance": plan.job.routing_imbalance,
        "rollouts": _step_values(plan.rollouts),
        "preference": _step_values(plan.preference),
        "checkpoint": asdict(plan.checkpoint) | {"seconds": plan.checkpoint.seconds},
        "stages": [
            {
                "stage": stage.stage,
                "contents": stage.contents,
                "parameters": stage.parameters,
                "expert_parameters": stage.expert_parameters,
                "weights": [asdict(weight) for weight in stage.weights],
                "memory": asdict(stage.memory) | {"peak": stage.memory.peak},
                "flops_per_step": stage.flops_per_step,
                "traffic": [asdict(group) for group in stage.traffic],
            }
            for stage in plan.stages
        ],
    }
