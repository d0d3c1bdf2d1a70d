"""The HTML page of a parity check: verdicts, and the difference by layer and by position as pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_ads.parity.verdict import Comparison, LayerResult, Limits, LogitResult, RungResult
from megatron_ads.reporting.chart import Series, line_chart
from megatron_ads.reporting.page import Chart, Figure, PageSection, Table, render_page

_SMALLEST = 1e-9
"""Differences below are drawn there; the axes are logarithmic."""
_POINTS_SHOWN = 400


def render(
    title: str, results: Sequence[RungResult], comparison: Comparison, limits: Limits, facts: Mapping[str, Any]
) -> str:
    """Return the page. ``facts`` are the rows of its last table."""
    sections = [
        _verdicts(results),
        _layers(comparison.layers, limits),
        _positions(comparison.logits),
        _routers(comparison.layers),
        PageSection(
            title="What was compared", blocks=[Table(head=["", ""], rows=[[k, str(v)] for k, v in facts.items()])]
        ),
    ]
    return render_page(title, _LEAD, _figures(results, comparison.logits), sections)


_LEAD = (
    "The checkpoint ran in Hugging Face transformers and in Megatron-Core, one layer at a time. Each layer was given "
    "the same input on both sides, which shows its own error, and its own side's output of the layer before, which "
    "shows what gathers."
)


def _figures(results: Sequence[RungResult], logits: LogitResult) -> list[Figure]:
    failed = [one for one in results if one.passed is False]
    passed = sum(one.passed is True for one in results)
    return [
        Figure(
            label="verdict",
            value="passed" if not failed else f"rung {failed[0].rung} failed",
            note=f"{passed} rungs passed, {len(failed)} failed",
            state="bad" if failed else "good",
        ),
        Figure(label="KL divergence", value=f"{logits.divergence:.1e}", note="nats, mean over positions"),
        Figure(label="largest logit difference", value=f"{logits.max_abs_difference:.1e}"),
        Figure(label="same best token", value=f"{100 * logits.agreement:.2f} %", note=f"of {logits.tokens} positions"),
    ]


def _verdicts(results: Sequence[RungResult]) -> PageSection:
    words = {True: "passed", False: "FAILED", None: "not run"}
    rows = [[str(one.rung), one.name, words[one.passed], one.detail] for one in results]
    text = "The first rung that failed is where to look."
    return PageSection(title="Rungs", blocks=[text, Table(head=["rung", "", "", ""], rows=rows)])


def _layers(layers: Sequence[LayerResult], limits: Limits) -> PageSection:
    def points(name: str) -> list[tuple[float, float | None]]:
        return [(one.layer, _log(getattr(one, name))) for one in layers]

    series = [
        Series(name="same input", points=points("difference"), style="dots"),
        Series(name="own input", points=points("carried"), color=2),
        Series(name="limit", points=[(one.layer, _log(limits.layer)) for one in layers], style="faint", color=3),
    ]
    svg = line_chart(series, x_label="layer", y_label="log10 of the difference")
    caption = "Root mean square of the difference over that of Hugging Face's output; MTP layers follow the decoder's."
    rows = [
        [str(one.layer), one.kind, f"{one.difference:.1e}", f"{one.largest:.1e}", f"{one.carried:.1e}"]
        for one in layers
    ]
    table = Table(
        head=["layer", "kind", "same input", "largest element", "own input"], rows=rows, numbers=frozenset({2, 3, 4})
    )
    return PageSection(title="Difference by layer", blocks=[Chart(svg=svg, caption=caption), table])


def _positions(logits: LogitResult) -> PageSection:
    every = math.ceil(len(logits.by_position) / _POINTS_SHOWN)
    points = [(position, _log(value)) for position, value in enumerate(logits.by_position) if position % every == 0]
    series = [Series(name="largest logit difference", points=points)]
    svg = line_chart(series, x_label="position", y_label="log10 of the difference")
    caption = "Largest difference of any logit at each position. A step at the original context length points at YaRN."
    return PageSection(title="Difference by position", blocks=[Chart(svg=svg, caption=caption)])


def _routers(layers: Sequence[LayerResult]) -> PageSection:
    routed = [(one.layer, one.router) for one in layers if one.router is not None]
    points: list[tuple[float, float | None]] = [(layer, 100 * (1 - one.rerouted / one.tokens)) for layer, one in routed]
    svg = line_chart([Series(name="same experts", points=points, style="dots")], x_label="layer", y_label="tokens, %")
    caption = "Tokens that each router sends to the same set of experts, near ties counted as the same."
    rows = [
        [str(layer), str(one.tokens), str(one.rerouted), str(one.near_ties), f"{one.weight_difference:.1e}"]
        for layer, one in routed
    ]
    head = ["layer", "tokens", "other experts", "near ties", "largest weight difference"]
    table = Table(head=head, rows=rows, numbers=frozenset({1, 2, 3, 4}))
    return PageSection(title="Router agreement", blocks=[Chart(svg=svg, caption=caption), table])


def _log(value: float) -> float:
    return math.log10(max(value, _SMALLEST))
