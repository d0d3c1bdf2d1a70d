"""What a parity check found, the limits of a checkpoint, one result for each rung of the ladder, and its page.

The records become ``parity.json``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from conversion.convert import check_coverage
from conversion.rank_files import ShardsLayout
from conversion.sources import WeightSource
from conversion.to_shards import ShardsTarget
from megatron_ads.config.model import Precision
from megatron_ads.errors import ConversionError
from megatron_ads.reporting.chart import Points, Series, line_chart
from megatron_ads.reporting.page import render as render_template


class LayerKind(StrEnum):
    """The kinds of layers."""

    DENSE = "dense"
    EXPERTS = "experts"
    MTP = "mtp"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterResult:
    """How one router compares over all tokens, given the layer's same input."""

    tokens: int
    rerouted: int
    """Tokens sent to another set of experts, near ties apart."""
    near_ties: int
    """Tokens whose other choice lies within the limit for ties."""
    weight_difference: float
    """Largest |difference| of a weight, over the tokens that keep their experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerResult:
    """How one layer compares. Differences are root mean squares over that of Hugging Face's output.

    A token that the other side sends to other experts has another output, however right the layer is: given the same
    input, such tokens are counted by ``router`` and left out here.
    """

    layer: int
    kind: LayerKind
    difference: float
    """Given the same input: what this layer alone contributes."""
    carried: float
    """Each side on its own output of the layer before: what has gathered so far."""
    largest: float
    """Largest single |difference| given the same input, over the root mean square of the output."""
    changed_tensors: tuple[str, ...]
    """Parameters whose slices, joined again, are not the stored bits."""
    router: RouterResult | None
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitResult:
    """The next-token logits of the whole model, each side on its own."""

    tokens: int
    rerouted: int
    """Positions that some router of the decoder sends to other experts than the other side's; near ties too."""
    max_abs_difference: float
    divergence: float
    """Mean KL(Hugging Face || ours), nats, over the other positions (over all, where there are no others)."""
    agreement: float
    """Share of positions with the same most probable token."""
    by_position: tuple[float, ...]
    """Largest |difference| of any logit at each position, over all prompts that reach it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RungResult:
    """One rung of the ladder on this checkpoint."""

    rung: int
    name: str
    passed: bool | None
    """None: it does not fit a checkpoint check, and ``detail`` says why."""
    detail: str


@dataclass(frozen=True, slots=True)
class StreamResult:
    """Everything measured by streaming once through the layers."""

    layers: tuple[LayerResult, ...]
    logits: LogitResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one number format. Differences must stay below."""

    layer: float
    """Root mean square of a layer's difference, given the same input, over that of its output."""
    divergence: float
    """Mean over positions of KL(Hugging Face || ours), in nats, of the whole model's next-token distribution; positions
    that are rerouted on the way are left out, as another choice of experts is another answer."""
    near_tie: float
    """How far apart the last chosen and the first left-out score may be for either choice to count as right."""
    rerouted: float
    """Share of tokens that a router, its layer given the same input, may send to other experts; near ties apart."""

    def allows(self, routers: Sequence[RouterResult]) -> bool:
        """Whether few enough tokens are rerouted: the share is a mean, and a count scatters by its square root."""
        expected = self.rerouted * sum(one.tokens for one in routers)
        return sum(one.rerouted for one in routers) <= expected + 3 * math.sqrt(expected)


LIMITS = {
    Precision.fp32: Limits(layer=1e-5, divergence=1e-6, near_tie=1e-5, rerouted=1e-9),
    Precision.bf16: Limits(layer=2e-2, divergence=2e-2, near_tie=1e-2, rerouted=0.02),
}
"""FP32: sums of up to 20,000 terms in another order, 2^-24 * sqrt(20,000) = 8e-6 of their size at worst, usually 1e-6;
a router's scores inherit it, and a token at a tie closer than that may go either way.

BF16: each operation rounds to 2^-9 = 2e-3 of its size and a layer chains some ten of them, so 6e-3 to 1e-2; the scores
inherit 1e-2 of their spread, so that about one token in a hundred changes one expert.
"""


NOT_HERE = (
    (5, "gradients", "needs optimizer-sized memory; run pytest parity_tests"),
    (7, "generation", "needs the whole model in memory; run pytest parity_tests"),
    (8, "layouts", "needs one process per rank; run pytest parity_tests"),
    (9, "training", "needs optimizer-sized memory; run pytest parity_tests"),
    (10, "pipeline", "a script of its own: parity_tests/rung_10_pipeline.py"),
)


def names_rung(source: WeightSource, layout: ShardsLayout) -> RungResult:
    """Check, from headers alone, that the layout's files hold every element of the model."""
    try:
        plan = ShardsTarget(source, source.path, layout).plan()
        check_coverage(plan, source)
        passed, detail = True, f"{plan.tensor_count} parameters, each filled once, in {len(plan.files)} rank files"
    except ConversionError as error:
        passed, detail = False, str(error)
    return RungResult(rung=1, name="names", passed=passed, detail=detail)


def rungs(names: RungResult, comparison: StreamResult, outside: Sequence[str], limits: Limits) -> list[RungResult]:
    """Return every rung in order; those that do not fit a checkpoint check have no verdict."""
    decoder = [one for one in comparison.layers if one.kind is not LayerKind.MTP]
    mtp = [one for one in comparison.layers if one.kind is LayerKind.MTP]
    changed = [*outside, *(name for one in comparison.layers for name in one.changed_tensors)]
    first = f"{len(changed)} parameters differ, first {changed[0]}" if changed else "every bit comes back"
    found = [
        names,
        RungResult(rung=2, name="round trip", passed=not changed, detail=first),
        _logits(decoder, comparison.logits, limits),
        _router(decoder, limits),
        _mtp(mtp, limits),
        *(RungResult(rung=number, name=name, passed=None, detail=why) for number, name, why in NOT_HERE),
    ]
    return sorted(found, key=lambda one: one.rung)


def first_departure(layers: Sequence[LayerResult], limits: Limits) -> LayerResult | None:
    """Return the first layer whose output differs although its input is the same."""
    return next((one for one in layers if not one.difference < limits.layer), None)


def _logits(layers: Sequence[LayerResult], logits: LogitResult, limits: Limits) -> RungResult:
    departure = first_departure(layers, limits)
    worst = max(layers, key=lambda one: one.difference)
    detail = (
        f"KL {logits.divergence:.1e} nats (limit {limits.divergence:.0e}; {logits.rerouted} of "
        f"{logits.tokens} positions are rerouted on the way and left out), largest logit difference "
        f"{logits.max_abs_difference:.1e}; worst layer {worst.layer}: {worst.difference:.1e} (limit {limits.layer:.0e})"
    )
    if departure is not None:
        detail = f"layer {departure.layer} departs first, by {departure.difference:.1e} of its size; {detail}"
    passed = departure is None and logits.divergence < limits.divergence
    return RungResult(rung=3, name="logits", passed=passed, detail=detail)


def _choices(routers: Sequence[RouterResult]) -> str:
    tokens, rerouted = sum(one.tokens for one in routers), sum(one.rerouted for one in routers)
    return f"{rerouted} of {tokens} choices differ, {sum(one.near_ties for one in routers)} more at near ties"


def _router(layers: Sequence[LayerResult], limits: Limits) -> RungResult:
    routers = [one.router for one in layers if one.router is not None]
    if not routers:
        return RungResult(rung=4, name="router", passed=None, detail="the model has no experts")
    weight = max(one.weight_difference for one in routers)
    choices = f"{_choices(routers)}; weights of equal choices differ by {weight:.1e} at most"
    return RungResult(rung=4, name="router", passed=limits.allows(routers), detail=choices)


def _mtp(layers: Sequence[LayerResult], limits: Limits) -> RungResult:
    if not layers:
        return RungResult(rung=6, name="MTP", passed=None, detail="the checkpoint has no MTP layer")
    routers = [one.router for one in layers if one.router is not None]
    worst = max(one.difference for one in layers)
    detail = f"difference {worst:.1e} of its size (limit {limits.layer:.0e}); {_choices(routers)}"
    passed = first_departure(layers, limits) is None and limits.allows(routers)
    return RungResult(rung=6, name="MTP", passed=passed, detail=detail)


_SMALLEST = 1e-9
"""Differences below are drawn there; the axes are logarithmic."""
_POINTS_SHOWN = 400
_VERDICTS = {True: "passed", False: "FAILED", None: "not run"}


def render(
    title: str, results: Sequence[RungResult], comparison: StreamResult, limits: Limits, facts: Mapping[str, Any]
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
    kept = [(layer, 100 * (1 - one.rerouted / one.tokens)) for layer, one in routed]
    same = Series(name="same experts", points=kept, style="dots")
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
        router_chart=line_chart([same], x_label="layer", y_label="tokens, %", y_limits=(0.0, 100.0)),
        routers=[
            (layer, one.tokens, one.rerouted, one.near_ties, f"{one.weight_difference:.1e}") for layer, one in routed
        ],
    )


def _logs(points: Iterable[tuple[int, float]]) -> Points:
    return [(x, math.log10(max(y, _SMALLEST))) for x, y in points]
