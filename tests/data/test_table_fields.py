"""Every type of a label, an id or a time means the same in every format; values of a team's own are mapped."""

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron_ads.config.data import HistoryConfig
from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.event_tables import event_rows, read_anchors
from megatron_ads.data.own_tables import table_rows
from megatron_ads.data.sources import read_source
from megatron_ads.data.table_fields import time_of
from megatron_ads.data.user_features import view_chooser
from megatron_ads.errors import ConfigError, DataError
from tests.data.tables import COLUMNS, EVENTS, FORMATS, PAIRS, log, pairs, write

NUMBERS = {"label": {3: "Good", 2: "Good", 1: "fair", "0": "Bad", "E": "Good"}}
TRUTH = {"label": {True: "Good", False: "Bad"}}


Wanted = list[tuple[str, str, str]]
PLAIN: Wanted = [("a", "tent", "Good"), ("b", "sofa", "Bad")]
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], Wanted]] = {
    "text": ({}, {}, PLAIN),
    "integer ids and labels": (
        {"i": [7, 2**60 + 1], "l": [3, 0]}, NUMBERS, [("7", "tent", "Good"), (str(2**60 + 1), "sofa", "Bad")]),
    "small integers": ({"l": pa.array([2, 0], pa.int8())}, NUMBERS, PLAIN),
    "labels as floats, as pandas has them": ({"l": [3.0, 0.0]}, NUMBERS, PLAIN),
    "labels as decimals": ({"l": pa.array([Decimal(3), Decimal(0)], pa.decimal128(10, 2))}, NUMBERS, PLAIN),
    "decimal ids, as Spark has them": (
        {"i": pa.array([Decimal(12), Decimal(10**20)], pa.decimal128(38, 0))}, {},
        [("12", "tent", "Good"), (str(10**20), "sofa", "Bad")]),
    "letters as labels": ({"l": ["e", "0"]}, NUMBERS, PLAIN),
    "truth as label": ({"l": [True, False]}, TRUTH, PLAIN),
    "words for truth": ({"l": ["yes", "No"]}, TRUTH, PLAIN),
    "capitals aside": ({"l": ["GOOD", " bad "]}, {}, PLAIN),
    "dates as text": (
        {"q": [date(2025, 3, 1), date(2025, 3, 2)]}, {}, [("a", "2025-03-01", "Good"), ("b", "2025-03-02", "Bad")]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TYPES)
def test_every_type_gives_the_same_rows_in_every_format(tmp_path: Path, name: str, form: str) -> None:
    change, values, wanted = TYPES[name]
    rows = table_rows(write(tmp_path, form, pairs(**change)), columns=COLUMNS, task=PAIRS, values=values)
    assert [(row.id, row.group, row.label) for row in rows] == wanted
    assert [row.facts["query"] for row in rows] == [query for _, query, _ in wanted]


SEARCH, SALE = datetime(2025, 2, 27, tzinfo=UTC), datetime(2025, 3, 4, 1, 2, 3, 456789, tzinfo=UTC)
MOMENTS = [SEARCH, SALE]
VIEW_OF = view_chooser(HistoryConfig())


def epochs(per_second: int) -> list[int]:
    return [round(moment.timestamp() * 10**6) * per_second // 10**6 for moment in MOMENTS]


TIMES: dict[str, tuple[Any, float]] = {
    **{f"timestamp[{unit}]": (pa.array(MOMENTS, pa.timestamp("us")).cast(pa.timestamp(unit), safe=False), size)
       for unit, size in (("s", 1), ("ms", 1e-3), ("us", 0), ("ns", 0))},
    "timestamp[ns] with nanoseconds": (pa.array([each * 1000 + 789 for each in epochs(10**6)], pa.timestamp("ns")), 0),
    "timestamp[ns] with a zone": (pa.array(MOMENTS, pa.timestamp("ns", "America/New_York")), 0),
    "timestamp[ms] with an offset": (pa.array(MOMENTS, pa.timestamp("ms", "+02:00")), 1e-3),
    "date32": (pa.array([moment.date() for moment in MOMENTS], pa.date32()), 86400),
    "date64": (pa.array([moment.date() for moment in MOMENTS], pa.date64()), 86400),
    "epoch s": (epochs(1), 1),
    "epoch ms": (epochs(10**3), 1e-3),
    "epoch us": (epochs(10**6), 0),
    "epoch ns": (epochs(10**9), 0),
    "epoch s as floats": ([moment.timestamp() for moment in MOMENTS], 1e-6),
    "epoch ms as decimals": (pa.array([Decimal(each) for each in epochs(10**3)], pa.decimal128(20, 3)), 1e-3),
    "epoch ms as text": (list(map(str, epochs(10**3))), 1e-3),
    "ISO text": ([moment.isoformat() for moment in MOMENTS], 0),
    "text of BigQuery": ([moment.strftime("%Y-%m-%d %H:%M:%S.%f UTC") for moment in MOMENTS], 0),
    "days as numbers": ([20250227, 20250304], 86400),
    "days as text": (["20250227", "2025-03-04"], 86400),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", TIMES)
def test_every_form_of_time_is_the_same_moment(tmp_path: Path, name: str, form: str) -> None:
    times, coarse = TIMES[name]
    table = log(times, ["Onsite_Search", "MATCHED_CONVERSION"], ["tent", None], [None, "Acme"])
    options: dict[str, Any] = {"columns": EVENTS, "view_of": VIEW_OF}
    (row,) = event_rows(write(tmp_path, form, table), anchors=read_anchors(["2025-03-01"]), **options)
    assert (row.id, row.group, row.label) == ("next-5", "5", "Acme")
    assert row.facts["events"] == [{"kind": "onsite_search", "days_ago": pytest.approx(2.0, abs=1e-9), "text": "tent"}]
    assert row.time is not None
    assert 0 <= SALE.timestamp() - row.time + 1e-6 <= coarse + 1e-5


NO_TIMES = ["nan", "inf", "-Infinity", float("inf"), 10**21, "yesterday", True, [1], "2025-13-01"]


@pytest.mark.parametrize("value", NO_TIMES)
def test_what_is_no_time_is_a_bad_row(value: Any) -> None:
    with pytest.raises(BadRowError, match="t is "):
        time_of({"t": value}, "t")


@pytest.mark.parametrize("unit", ["ms", "ns"])
def test_years_that_no_calendar_has_are_bad_rows(tmp_path: Path, unit: str) -> None:
    times = pa.array([2**61, 1, None], pa.timestamp(unit))
    table = log(times, ["click"] * 3, ["x"] * 3, [None] * 3)
    options: dict[str, Any] = {"columns": EVENTS, "view_of": VIEW_OF}
    aside = tmp_path / "r.jsonl"
    with pytest.raises(DataError, match=r"none of the 1 users.* the events are from 1970-01-01"):
        event_rows(write(tmp_path, "parquet", table), anchors=read_anchors(["2025-03-01"]), rejected=aside, **options)
    reasons = [json.loads(line)["reason"] for line in aside.read_text().splitlines()]
    assert reasons == (["wrong_type", "empty_text"] if unit == "ms" else ["empty_text"])


def test_a_recipe_maps_numbers_and_truth(tmp_path: Path) -> None:
    from megatron_ads.config.recipes import load_recipe

    file = write(tmp_path, "parquet", pairs(l=[3, 0]))
    columns, values = "{query: q, title: t, label: l}", "{label: {3: Good, 0: Bad, e: Good}}"
    source = f"{{kind: table, path: {file}, task: {PAIRS}, columns: {columns}, values: {values}}}"
    config = load_recipe("sft/quickstart", ["model.load=x", f"data.sources=[{source}]"]).data
    config.check()
    assert [row.label for row in read_source(config.sources[0], seed=0)] == ["Good", "Bad"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label": {"E": "Great"}}, "'E' stands for 'Great'; known: Bad, Fair, Good, or null"),
        ({"grade": {"E": "Good"}}, "values names the field 'grade'; known: query, title, label"),
        ({"quality": {"E": "Good"}}, "Say in columns which column holds quality"),
        ({"label": {"e": "Good", "E": "Bad"}}, "says twice what 'E' stands for"),
    ],
)
def test_values_that_stand_for_nothing_are_refused(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_rows(write(tmp_path, "csv", pairs()), columns=COLUMNS, task=PAIRS, values=values)


def test_a_label_without_a_meaning_says_how_to_give_it_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label is '3'; known: Bad, Fair, Good\. .* values: \{label: \{3: Good\}\}"):
        table_rows(write(tmp_path, "csv", pairs(l=[3, 0])), columns=COLUMNS, task=PAIRS)
