import math
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_ads.reporting.chart import Series, line_chart, logarithmic_ticks, smooth, ticks

SVG = "{http://www.w3.org/2000/svg}"


def _parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def _chart(*series: Series) -> ElementTree.Element:
    return _parse(line_chart(series, x_label="step", y_label="loss <nats>", size=(184, 152)))


def test_points_land_where_the_axes_say() -> None:
    # 184 x 152 leaves 184 - 68 - 16 = 100 by 152 - 12 - 40 = 100 units, from (68, 112) up to (168, 12)
    chart = _chart(Series(name="loss", points=[(0, 0.0), (5, 10.0), (10, 5.0)]))
    path = chart.find(f"{SVG}path")
    assert path is not None
    assert path.get("d") == "M68.0 112.0 L118.0 12.0 L168.0 62.0"


def test_values_that_are_not_finite_are_gaps() -> None:
    chart = _chart(Series(name="loss", points=[(0, 1.0), (1, None), (2, math.nan), (3, 2.0)]))
    assert len(chart.findall(f"{SVG}circle")) == 2


def test_each_point_tells_its_value() -> None:
    chart = _chart(Series(name="loss", points=[(1, 2.5)]))
    assert [title.text for title in chart.iter(f"{SVG}title")] == ["loss: 2.5 at 1"]


def test_text_is_escaped() -> None:
    assert "<nats>" not in line_chart([Series(name="a", points=[(0, 1)])], x_label="step", y_label="loss <nats>")


def test_one_line_needs_no_legend_and_two_have_one() -> None:
    one, two = Series(name="alpha", points=[(0, 1), (1, 2)]), Series(name="beta", points=[(0, 2), (1, 1)], color=2)
    assert "alpha" not in {text.text for text in _chart(one).iter(f"{SVG}text")}
    assert {"alpha", "beta"} <= {text.text for text in _chart(one, two).iter(f"{SVG}text")}


def test_a_legend_of_many_names_has_the_lines_it_needs_above_the_chart() -> None:
    # 184 wide leaves 100 units a line; a name of 5 letters takes 35 + 40: one a line, 16 units each.
    chart = _chart(*(Series(name=f"line{number}", points=[(0, 1), (1, number)]) for number in range(3)))
    assert chart.get("viewBox") == f"0 0 184 {152 + 3 * 16}"
    legend = list(chart.findall(f"{SVG}text"))
    assert [(text.text, text.get("y")) for text in legend] == [("line0", "12"), ("line1", "28"), ("line2", "44")]
    assert chart.find(f"{SVG}g").get("transform") == "translate(0 48)"  # type: ignore[union-attr]


def test_nothing_to_draw_is_said_in_words() -> None:
    assert "No values were recorded" in line_chart([Series(name="a", points=[(0, None)])], x_label="x", y_label="y")


def test_long_runs_are_thinned_out_but_end_where_they_end() -> None:
    svg = line_chart([Series(name="a", points=[(step, step) for step in range(10_001)])], x_label="x", y_label="y")
    assert svg.count("<circle") <= 402
    assert "10k at 10k" in svg


@pytest.mark.parametrize(
    ("low", "high", "most", "whole", "expected"),
    [
        (0, 10, 5, False, [0, 2, 4, 6, 8, 10]),
        (0.93, 2.41, 5, False, [1.0, 1.5, 2.0]),
        (1, 4, 8, True, [1, 2, 3, 4]),
        (1, 4, 8, False, [1, 1.5, 2, 2.5, 3, 3.5, 4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, most: int, whole: bool, expected: list[float]) -> None:
    assert ticks(low, high, most, whole=whole) == pytest.approx(expected)


def test_a_logarithmic_axis_gives_each_factor_the_same_room() -> None:
    series = Series(name="loss", points=[(0, 0.01), (1, 0.1), (2, 1.0), (3, -1.0)])
    svg = line_chart([series], x_label="x", y_label="y", y_logarithmic=True, size=(184, 152))
    heights = [float(circle.get("cy", "nan")) for circle in _parse(svg).findall(f"{SVG}circle")]
    assert heights == [112.0, 62.0, 12.0]  # what is not positive has no place on it


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.18, 7.4, [0.2, 0.5, 1, 2, 5]),
        (0.001, 20, [0.001, 0.01, 0.1, 1, 10]),
        (3.1, 3.9, [3.2, 3.4, 3.6, 3.8]),
        (2.16, 7.5, [4, 6]),
    ],
)
def test_logarithmic_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert logarithmic_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [1.0, 2.0, 3.0, 0.0])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_constant_is_drawn_in_the_middle(value: float, logarithmic: bool) -> None:
    points = [(0, value), (1, value)]
    svg = line_chart(
        [Series(name="a", points=points)], x_label="x", y_label="y", y_logarithmic=logarithmic, size=(184, 152)
    )
    if logarithmic and value == 0:
        assert "No values were recorded" in svg
    else:
        assert [40 < float(circle.get("cy", "0")) < 85 for circle in _parse(svg).iter(f"{SVG}circle")] == [True, True]


def test_smoothing_is_a_weighted_mean_of_what_came_before() -> None:
    # half-life 1: weights 1, 1/2, 1/4 -> (4*1 + 2*1/2 + 1*1/4) / (7/4) = 3
    smoothed = smooth([(0, 1.0), (1, 2.0), (2, 4.0)], 1)
    assert [x for x, _ in smoothed] == [0, 1, 2]
    assert [y for _, y in smoothed] == pytest.approx([1.0, 5 / 3, 3.0])
