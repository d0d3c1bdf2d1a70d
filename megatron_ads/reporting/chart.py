"""Line charts as SVG text: no library, no script, nothing to load. Colours come from the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
    points: Sequence[tuple[float, float | None]]
    style: str = "line"
    """``line``, ``faint`` (raw values behind a smoothed line) or ``dots`` (few, separate values)."""
    color: int = 1
    """1 to ``COLORS``: the page's chart colours."""


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_from_zero: bool = False,
    y_logarithmic: bool = False,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> str:
    """Draw ``series`` over one pair of axes; return an ``<svg>`` element, or a sentence when there is nothing to draw.

    With more than one series, a legend is above the chart, which is higher by its lines. A logarithmic axis
    leaves out values that are not positive.
    """
    drawn = [(one, _thinned(_finite(one.points))) for one in series]
    if y_logarithmic:
        drawn = [(one, [(x, y) for x, y in points if y > 0]) for one, points in drawn]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return '<p class="empty">No values were recorded.</p>'
    width, height = size
    x_ticks = ticks(*_extent([x for _, points in drawn for x, _ in points]), 8, whole=True)
    values = [y for _, points in drawn for _, y in points]
    extent = _extent([0.0, *values] if y_from_zero else values)
    y_ticks = logarithmic_ticks(*extent) if y_logarithmic else ticks(*extent, 5)
    x_scale = _Scale(*_extent([x for _, points in drawn for x, _ in points]), _LEFT, width - _RIGHT)
    y_scale = _Scale(
        min(y_ticks[0], *values), max(y_ticks[-1], *values), height - _BOTTOM, _TOP, logarithmic=y_logarithmic
    )
    body = [
        *_axes(x_ticks, y_ticks, x_scale, y_scale, size),
        *_labels(x_label, y_label, size),
        *(_draw(one, points, x_scale, y_scale) for one, points in drawn),
    ]
    legend = _legend([one for one, _ in drawn], width) if len(drawn) > 1 else []
    above = _LEGEND_LINE * len(legend)
    marks = "".join(body)
    if above:
        marks = f'<g transform="translate(0 {above})">{marks}</g>'
    label = escape(f"{y_label} against {x_label}")
    return f'<svg viewBox="0 0 {width} {height + above}" role="img" aria-label="{label}">{marks}{"".join(legend)}</svg>'


def smooth(points: Sequence[tuple[float, float | None]], half_life: float) -> list[tuple[float, float | None]]:
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

    At least one number is returned, whatever the limits.
    """
    factors = (1,) if high / low > 1e3 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in found if low <= tick <= high] or [low]


def _finite(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep as many points as a screen can show, the last one among them."""
    every = math.ceil(len(points) / _MAX_POINTS)
    return [point for index, point in enumerate(points) if index % every == 0 or index == len(points) - 1]


def _extent(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        margin = abs(low) * 0.1 or 1.0
        return low - margin, high + margin
    return low, high


def _axes(
    x_ticks: Sequence[float], y_ticks: Sequence[float], x_scale: _Scale, y_scale: _Scale, size: tuple[int, int]
) -> list[str]:
    width, height = size
    lines = []
    for tick in y_ticks:
        y = y_scale(tick)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    base = height - _BOTTOM
    lines.append(f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        x = x_scale(tick)
        lines.append(f'<text class="tick" x="{x:.1f}" y="{base + 16}" text-anchor="middle">{short(tick)}</text>')
    return lines


def _labels(x_label: str, y_label: str, size: tuple[int, int]) -> list[str]:
    width, height = size
    middle_x, middle_y = (_LEFT + width - _RIGHT) / 2, (_TOP + height - _BOTTOM) / 2
    return [
        f'<text class="label" x="{middle_x:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(13 {middle_y:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]


def _draw(series: Series, points: Sequence[tuple[float, float]], x_scale: _Scale, y_scale: _Scale) -> str:
    placed = [(x_scale(x), y_scale(y)) for x, y in points]
    marks = "".join(
        f'<circle class="{series.style}-point c{series.color}" cx="{px:.1f}" cy="{py:.1f}" r="4">'
        f"<title>{escape(series.name)}: {short(y)} at {short(x)}</title></circle>"
        for (px, py), (x, y) in zip(placed, points, strict=True)
        if series.style != "faint"
    )
    if series.style == "dots":
        return marks
    path = " ".join(f"{'L' if index else 'M'}{px:.1f} {py:.1f}" for index, (px, py) in enumerate(placed))
    return f'<path class="{series.style} c{series.color}" d="{path}"/>{marks}'


def _legend(series: Sequence[Series], width: int) -> list[str]:
    """Return the lines of the legend, set right, as many series in each as there is room for."""
    lines: list[list[Series]] = [[]]
    for one in series:
        if lines[-1] and sum(map(_legend_width, [*lines[-1], one])) > width - _LEFT - _RIGHT:
            lines.append([])
        lines[-1].append(one)
    return [_legend_line(line, width - _RIGHT, 4 + _LEGEND_LINE * number) for number, line in enumerate(lines)]


def _legend_width(series: Series) -> int:
    return 7 * len(series.name) + 40


def _legend_line(series: Sequence[Series], x: int, y: int) -> str:
    items = []
    for one in reversed(series):
        x -= _legend_width(one)
        swatch = (
            f'<circle class="dots-point c{one.color}" cx="{x + 20}" cy="{y + 4}" r="4"/>'
            if one.style == "dots"
            else f'<path class="{one.style} c{one.color}" d="M{x + 12} {y + 4} h16"/>'
        )
        items.append(f'<text class="tick" x="{x + 34}" y="{y + 8}">{escape(one.name)}</text>{swatch}')
    return "".join(items)


def short(value: float) -> str:
    """Write a number in at most four digits, large ones with k, M, G, T: ``15k``, ``0.012``, ``1.2e-5``."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    if 0 < abs(value) < 0.01:
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"
