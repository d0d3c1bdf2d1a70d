import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_ads.reporting.chart import Series, line_chart
from megatron_ads.reporting.page import Chart, Figure, PageSection, Table, render_page, write_report

VOID = {"meta"}


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
    series = Series(name="loss", points=[(1, 2.0), (2, 1.0)])
    chart = Chart(svg=line_chart([series], x_label="step", y_label="loss"), caption="one line")
    table = Table(head=["name", "value"], rows=[["a & b", "<1>"]], numbers=frozenset({1}))
    sections = [PageSection(title="Training", blocks=["It fell.", table, chart, [chart, chart]])]
    return render_page("Run <7>", "what it was", [Figure(label="loss", value="1.0", state="good")], sections)


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


def test_text_is_escaped(page: str) -> None:
    assert "Run &lt;7&gt;" in page
    assert "a &amp; b" in page
    assert "&lt;1&gt;" in page


def test_text_from_data_cannot_become_a_script() -> None:
    evil = "<script>x</script>"
    svg = line_chart([Series(name=evil, points=[(1, 2.0)], style="dots")], x_label=evil, y_label=evil)
    other = line_chart([Series(name="a", points=[(1, 2.0)])], x_label="step", y_label="loss")
    blocks = [evil, Table(head=[evil], rows=[[evil]]), Chart(svg=svg, caption=evil), [Chart(svg=other, caption=evil)]]
    figure = Figure(label=evil, value=evil, note=evil, state='"><script>')
    page = render_page(evil, evil, [figure], [PageSection(title=evil, blocks=blocks)])
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
