"""A history of releases: added to, shown, and never lost to a damaged line."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.errors import DataError
from megatron_ads.regress.history import add_release, chart_of, read_history, rows_of


def report(tuned: str, score: float, *, passed: bool = True) -> dict[str, Any]:
    lines = [{"name": "gsm8k", "tuned": score, "questions": 8}, {"name": "mmlu_stem", "tuned": 0.5, "questions": 4}]
    return {"base": "r1", "tuned": tuned, "passed": passed, "benchmarks": lines}


def test_releases_are_added_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    assert read_history(file) == []
    first = add_release(file, report("one", 0.9), [])
    assert chart_of(first) is None
    add_release(file, report("one", 0.9), read_history(file))  # the same once more
    both = add_release(file, report("two", 0.4, passed=False), read_history(file))
    assert read_history(file) == both and len(both) == 2
    assert [row[2:] for row in rows_of(both)] == [
        ["r1", "one", "12", "0.700", ""], ["r1", "two", "12", "0.450", "FAILED"],
    ]  # fmt: skip
    chart = chart_of(both)
    assert chart is not None and "gsm8k" in chart.svg and "mmlu_stem" in chart.svg


@pytest.mark.parametrize("line", ["no json", "{}", '{"scores": {"a": "b"}}', "[]"])
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    file = tmp_path / "history.jsonl"
    add_release(file, report("one", 0.9), [])
    before = file.read_text() + line + "\n"
    file.write_text(before)
    with pytest.raises(DataError, match=r"line 2 is no release"):
        read_history(file)
    assert file.read_text() == before
    assert json.loads(before.splitlines()[0])["tuned"] == "one"
