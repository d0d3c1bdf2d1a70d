"""Line charts as SVG text: no script, nothing to load. Colours come from the page's CSS variables."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from megatron_ads.reporting.page import render

Points = Sequence[tuple[float, float | None]]
COLORS = 8
WIDTH, HEIGHT = 720, 260
"""Size of a full chart in SVG units; the page scales it to the room there is."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 16, 12, 40
_LEGEND_LINE = 16
_MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line. Points whose ``y`` is None or not finite are gaps."""

    name: str
    points: Points
    style: str = "line"
    """``line``, ``faint`` (raw values behind a smoothed line) or ``dots`` (few, separate values)."""
    color: int = 1
    """1 to ``COLORS``: the page's chart colours."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with the sentence under it."""

    svg: Markup
    caption: str


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_from_zero: bool = False,
    y_logarithmic: bool = False,
    y_limits: tuple[float, float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """Draw ``series`` over one pair of axes; return an ``<svg>`` element, or a sentence when there is nothing to draw.

    With more than one series, a legend is above the chart, which is higher by its lines. A logarithmic axis
    leaves out values that are not positive. ``y_limits`` are those of what is drawn, such as 0 and 100 of percentages.
    """
    found = [(one, _thinned([(x, y) for x, y in _finite(one.points) if y > 0 or not y_logarithmic])) for one in series]
    drawn = [(one, points) for one, points in found if points]
    if not drawn:
        return Markup('<p class="empty">No values were recorded.</p>')
    right, base = size[0] - _RIGHT, size[1] - _BOTTOM
    x_extent = _extent([x for _, points in drawn for x, _ in points])
    values = [y for _, points in drawn for _, y in points]
    y_extent = y_limits or _extent([0.0, *values] if y_from_zero else values)
    y_ticks = logarithmic_ticks(*y_extent) if y_logarithmic else ticks(*y_extent, 5)
    place_x = _scale(*x_extent, _LEFT, right)
    place_y = _scale(*y_extent, base, _TOP, logarithmic=y_logarithmic)
    legend = list(_legend([one for one, _ in drawn], right)) if len(drawn) > 1 else []
    svg = render(
        "reporting/chart.svg.jinja",
        left=_LEFT, right=right, margin=_RIGHT, top=_TOP, base=base, height=size[1],
        x_label=x_label, y_label=y_label,
        x_ticks=[(place_x(tick), tick) for tick in ticks(*x_extent, 8, whole=True)],
        y_ticks=[(place_y(tick), tick) for tick in y_ticks],
        drawn=[(one, [(place_x(x), place_y(y), x, y) for x, y in points]) for one, points in drawn],
        legend=legend, legend_line=_LEGEND_LINE, above=_LEGEND_LINE * len(legend),
    )  # fmt: skip
    return Markup(svg)  # the template escapes what it is given


def smooth(points: Points, half_life: float) -> list[tuple[float, float | None]]:
    """Return the exponential moving average with ``half_life`` in points, unbiased at the start."""
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    smoothed: list[tuple[float, float | None]] = []
    for x, y in _finite(points):
        total, weight = decay * total + y, decay * weight + 1
        smoothed.append((x, total / weight))
    return smoothed


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Return at most ``most`` + 1 round numbers (steps of 1, 2 or 5 times a power of ten) within ``low`` .. ``high``.

    With ``whole`` the step is at least 1.
    """
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
    step = max(step, 1.0) if whole else step
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] or [low]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten within ``low`` .. ``high``; only the powers over three decades or more.

    Where fewer than two are within, an axis is nearly even, and has the round numbers of an even one.
    """
    factors = (1,) if high / low > 1e3 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return found if len(found) > 1 else ticks(low, high, 5)


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep as many points as a screen can show, the last one among them."""
    every = math.ceil(len(points) / _MAX_POINTS)
    return [point for index, point in enumerate(points) if index % every == 0 or index == len(points) - 1]


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.0 if low < high else abs(low) * 0.1 or 1.0
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float, *, logarithmic: bool = False) -> Callable[[float], float]:
    if logarithmic:
        linear = _scale(math.log(low), math.log(high), start, end)
        return lambda value: linear(math.log(value))
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _legend(series: Sequence[Series], right: int) -> Iterator[list[tuple[int, Series]]]:
    """Yield the lines of the legend, set right, as many series in each as there is room for, and where each begins."""
    lines: list[list[Series]] = [[]]
    for one in series:
        if lines[-1] and sum(map(_legend_width, [*lines[-1], one])) > right - _LEFT:
            lines.append([])
        lines[-1].append(one)
    for line in lines:
        widths = list(map(_legend_width, line))
        yield list(zip(accumulate(widths[:-1], initial=right - sum(widths)), line, strict=True))


def _legend_width(series: Series) -> int:
    return 7 * len(series.name) + 40
