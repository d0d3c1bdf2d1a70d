"""Markdown tables: what a cell holds stays in the cell."""

from megatron_ads.reporting.markdown import markdown


def test_a_table_has_a_head_a_ruler_and_a_line_a_row() -> None:
    assert markdown([["a", "b", "c"], ["x", "1", ""]]) == "| a | b | c |\n| --- | --- | --- |\n| x | 1 |  |\n"
    assert markdown([["a", "b"], ["x", "1"]], numbers=True).splitlines()[1] == "| --- | ---: |"


def test_bars_and_line_breaks_in_a_cell_do_not_end_it() -> None:
    lines = markdown([["a|b", "c"], ["x\ny\r\nz\r", "\\|"], ["\u2028", "C:\\n"]]).splitlines()
    # GitHub's tables end a cell at a bar unless a backslash is before it that is not escaped itself.
    assert lines == [r"| a\|b | c |", "| --- | --- |", r"| x y z | \\\| |", r"|  | C:\n |"]
