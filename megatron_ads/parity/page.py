"""The HTML page of a parity check: verdicts, and the difference by layer and by position as pictures."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_ads.parity.verdict import Comparison, Limits, RungResult
from megatron_ads.reporting.chart import Points, Series, line_chart
from megatron_ads.reporting.page import render as render_template

_SMALLEST = 1e-9
"""Differences below are drawn there; the axes are logarithmic."""
_POINTS_SHOWN = 400
_VERDICTS = {True: "passed", False: "FAILED", None: "not run"}


def render(
    title: str, results: Sequence[RungResult], comparison: Comparison, limits: Limits, facts: Mapping[str, Any]
) -> str:
    """Return the page. ``facts`` are the rows of its last table."""
    layers, logits = comparison.layers, comparison.logits
    routed = [(one.layer, one.router) for one in layers if one.router is not None]
    every = math.ceil(len(logits.by_position) / _POINTS_SHOWN)
    differences = [
        Series(name="same input", points=_logs((one.layer, one.difference) for one in layers), style="dots"),
        Series(name="own input", points=_logs((one.layer, one.carried) for one in layers), color=2),
        Series(name="limit", points=_logs((one.layer, limits.layer) for one in layers), style="faint", color=3),
    ]
    positions = Series(name="largest logit difference", points=_logs([*enumerate(logits.by_position)][::every]))
    same = [(layer, 100 * (1 - one.rerouted / one.tokens)) for layer, one in routed]
    return render_template(
        "parity/parity.html.jinja",
        title=title,
        results=results,
        logits=logits,
        facts=facts,
        rungs=[(one.rung, one.name, _VERDICTS[one.passed], one.detail) for one in results],
        layer_chart=line_chart(differences, x_label="layer", y_label="log10 of the difference"),
        layers=[
            (one.layer, one.kind, f"{one.difference:.1e}", f"{one.largest:.1e}", f"{one.carried:.1e}") for one in layers
        ],
        position_chart=line_chart([positions], x_label="position", y_label="log10 of the difference"),
        router_chart=line_chart(
            [Series(name="same experts", points=same, style="dots")], x_label="layer", y_label="tokens, %"
        ),
        routers=[
            (layer, one.tokens, one.rerouted, one.near_ties, f"{one.weight_difference:.1e}") for layer, one in routed
        ],
    )


def _logs(points: Iterable[tuple[int, float]]) -> Points:
    return [(x, math.log10(max(y, _SMALLEST))) for x, y in points]
