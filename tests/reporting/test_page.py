import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ads.reporting.chart import Chart, Series, line_chart
from megatron_ads.reporting.page import short, templates, text_table, write_report

VOID = {"meta"}
PAGE = """
{%- extends "reporting/page.html.jinja" %}
{%- from "reporting/macros.html.jinja" import chart, figure, small_charts, table %}
{%- block title %}{{ title }}{% endblock %}
{%- block lead %}{{ title }}{% endblock %}
{%- block figures %}{{ figure(title, title, title, state) }}{% endblock %}
{%- block sections %}
<section><p>{{ title }}</p>{{ table([cells, cells], cells, [1]) }}
{{ chart(one.svg, one.caption) }}{{ small_charts([one, one]) }}</section>
{%- endblock %}"""


def page_of(title: str, *, name: str, state: str) -> str:
    svg = line_chart([Series(name=name, points=[(1, 2.0), (2, 1.0)])], x_label=name, y_label=name)
    cells = [title, "a & b"]
    return templates().from_string(PAGE).render(title=title, state=state, cells=cells, one=Chart(svg, title))


class Tags(HTMLParser):
    """Fails on tags that do not nest; collects the tags and attributes seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def page() -> str:
    return page_of("Run <7>", name="loss", state="good")


def test_tags_nest_and_every_block_is_there(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    counted = [tag for tag, _ in tags.seen]
    assert (counted.count("svg"), counted.count("table"), counted.count("section")) == (3, 1, 1)


def test_nothing_is_loaded_and_nothing_runs(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.seen}
    assert not [attributes for _, attributes in tags.seen if {"src", "href"} & attributes.keys()]
    assert not re.search(r"url\(|@import|https?://", page)


def test_text_is_escaped_and_numbers_are_marked(page: str) -> None:
    assert page.count("Run &lt;7&gt;") == 13
    assert page.count('<td class="number">a &amp; b</td>') == 2


def test_text_from_data_cannot_become_a_script() -> None:
    page = page_of("<script>x</script>", name="<script>x</script>", state='"><script>')
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def test_both_colour_schemes_and_printing_are_provided_for(page: str) -> None:
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in page


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    write_report(tmp_path, "<!DOCTYPE html>", {"loss": 1.5})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.5}


def test_a_number_json_cannot_hold_leaves_the_old_report(tmp_path: Path) -> None:
    write_report(tmp_path, "<p>", {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, "<p>", {"loss": float("nan")})
    assert json.loads((tmp_path / "report.json").read_text()) == {"loss": 1.5}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1500, "1500"),
        (15000, "15k"),
        (2.5e6, "2.5M"),
        (1.23456e12, "1.235T"),
        (1e-5, "1e-5"),
        (0.0008, "8e-4"),
        (-0.00123, "-1.23e-3"),
        (0.5, "0.5"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_text_table_is_aligned_and_folds_at_its_width() -> None:
    rows = [("a", "1.5"), ("long [name]", "100")]
    assert text_table(rows, ["name", "of"], left=["name"]) == [
        "name          of",
        "a            1.5",
        "long [name]  100",
    ]
    assert text_table([("x" * 6, "1")], ["", ""], left=[""], width=6) == ["xxx  1", "xxx"]
