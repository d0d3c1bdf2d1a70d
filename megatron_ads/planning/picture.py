"""A plan as a page: the pipeline x expert grid coloured by memory, and the timeline of a step."""

from html import escape

from megatron_ads.planning.plan import Plan, StagePlan
from megatron_ads.planning.schedule import WorkSpan
from megatron_ads.planning.table import plan_lines, summary_lines
from megatron_ads.progress import readable_duration
from megatron_ads.reporting.page import Chart, Figure, PageSection, Table, render_page

_WIDTH = 900
_LEFT = 46
_ROW = 14
_MOST_COLUMNS = 64


def page(recipe: str, plan: Plan) -> str:
    """Return the plan as one HTML document."""
    sizes = plan.job.layout
    return render_page(
        f"Plan of {recipe}",
        plan_lines(plan)[0] + ".",
        _figures(plan),
        [
            PageSection(
                title="Memory of every rank", blocks=[Chart(svg=memory_grid(plan), caption=_grid_caption(plan))]
            ),
            PageSection(
                title="Pipeline",
                blocks=[
                    Chart(
                        svg=timeline(plan),
                        caption="One step: forward passes light, backward passes dark, a gap is waiting. "
                        f"{plan.timeline.bubble:.1%} of the time of {sizes.pp} stages is waiting.",
                    )
                ],
            ),
            PageSection(title="Stages", blocks=[_stage_table(plan)]),
            PageSection(title="In words", blocks=[line.strip() for line in summary_lines(plan)]),
        ],
    )


def _figures(plan: Plan) -> list[Figure]:
    spare = plan.spare_bytes / 1e9
    return [
        Figure(
            label="memory",
            value=f"{plan.fullest.memory.peak / 1e9:.1f} GB",
            note=f"fullest rank; {abs(spare):.2f} GB {'spare' if plan.fits else 'too much'}",
            state="good" if plan.fits else "bad",
        ),
        Figure(label="waiting", value=f"{plan.timeline.bubble:.1%}", note="of the stages' time"),
        Figure(label="step", value=readable_duration(plan.step_seconds), note="estimated"),
        Figure(label="tokens per second", value=f"{plan.tokens_per_second:,.0f}", note="whole job, estimated"),
    ]


def _grid_caption(plan: Plan) -> str:
    text = "Columns are pipeline stages, rows are the ranks of a stage; the number is gigabytes."
    if plan.expert_less_stages:
        text += f" Dashed: no routed experts (stage {', '.join(map(str, plan.expert_less_stages))})."
    return text


def memory_grid(plan: Plan) -> str:
    """Draw one cell for every rank: stages across, the ranks of a stage down."""
    stages = plan.stages
    down = min(plan.job.layout.world // plan.job.layout.pp, _MOST_COLUMNS)
    width = (_WIDTH - _LEFT) / len(stages)
    cells = [_cell(plan, stage, row, _LEFT + stage.stage * width, width) for stage in stages for row in range(down)]
    height = (down + 2) * _ROW
    marks = [
        f'<text class="tick" x="{_LEFT + (stage.stage + 0.5) * width:.1f}" y="{(down + 1) * _ROW:.0f}" '
        f'text-anchor="middle">{stage.stage}</text>'
        for stage in stages
    ]
    axis = [
        f'<text class="tick" x="{_LEFT - 6}" y="{(row + 0.8) * _ROW:.0f}" text-anchor="end">{row}</text>'
        for row in range(down)
    ]
    return _svg(height, [*cells, *marks, *axis], "memory of every rank")


def _cell(plan: Plan, stage: StagePlan, row: int, x: float, width: float) -> str:
    sizes = plan.job.layout
    rank = sizes.stage_ranks(stage.stage)[row]
    share = stage.memory.peak / plan.card.memory_bytes
    color = "var(--bad)" if share > 1 else "var(--c1)"
    dashed = ' stroke="var(--ink)" stroke-dasharray="2 2"' if stage.stage in plan.expert_less_stages else ""
    opacity = 0.1 + 0.75 * min(share, 1.0) ** 2
    ink = "var(--card)" if opacity > 0.45 else "var(--ink)"
    title = f"rank {rank}, ep {sizes.coordinates(rank).ep}: {stage.memory.peak / 1e9:.2f} GB ({stage.contents})"
    return (
        f'<g><title>{escape(title)}</title><rect x="{x + 0.5:.1f}" y="{row * _ROW + 0.5:.1f}" width="{width - 1:.1f}" '
        f'height="{_ROW - 1}" fill="{color}" fill-opacity="{opacity:.2f}"{dashed}/>'
        f'<text x="{x + width / 2:.1f}" y="{(row + 0.8) * _ROW:.1f}" text-anchor="middle" font-size="9" '
        f'style="fill: {ink}">{stage.memory.peak / 1e9:.0f}</text></g>'
    )


def timeline(plan: Plan) -> str:
    """Draw what every stage does in one step; virtual chunks alternate in colour."""
    line = plan.timeline
    scale = (_WIDTH - _LEFT) / line.seconds
    rows = [
        f'<text class="tick" x="{_LEFT - 6}" y="{(stage + 0.8) * _ROW:.0f}" text-anchor="end">{stage}</text>'
        for stage in range(line.stages)
    ]
    end = (
        f'<text class="tick" x="{_WIDTH}" y="{(line.stages + 1) * _ROW}" text-anchor="end">{line.seconds:.1f} s</text>'
    )
    return _svg(
        (line.stages + 2) * _ROW, [*(_bar(span, scale) for span in line.spans), *rows, end], "pipeline timeline"
    )


def _bar(span: WorkSpan, scale: float) -> str:
    kind = "backward" if span.work.backward else "forward"
    title = f"{kind} of microbatch {span.work.microbatch}, chunk {span.work.virtual}: {span.end - span.start:.3g} s"
    return (
        f'<rect x="{_LEFT + span.start * scale:.2f}" y="{span.stage * _ROW + 1}" '
        f'width="{max((span.end - span.start) * scale - 0.3, 0.2):.2f}" height="{_ROW - 2}" '
        f'fill="var(--c{1 + span.work.virtual % 3})" fill-opacity="{0.9 if span.work.backward else 0.45}">'
        f"<title>{title}</title></rect>"
    )


def _svg(height: int, body: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{label}">{"".join(body)}</svg>'


def _stage_table(plan: Plan) -> Table:
    rows = [
        [
            str(stage.stage),
            stage.contents,
            f"{stage.parameters / 1e9:.4f}",
            *(
                f"{value / 1e9:.2f}"
                for value in (
                    stage.memory.weights,
                    stage.memory.gradients,
                    stage.memory.optimizer,
                    stage.memory.activations,
                    stage.memory.buffers,
                    stage.memory.peak,
                )
            ),
        ]
        for stage in plan.stages
    ]
    head = [
        "stage",
        "layers",
        "parameters, B",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "buffers",
        "peak, GB",
    ]
    return Table(head=head, rows=rows, numbers=frozenset(range(2, 9)))
