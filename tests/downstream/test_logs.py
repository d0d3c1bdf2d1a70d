"""A team's tables become logs and examples; what is missing or wrong is one line with the file and the row."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ads.downstream.examples import held_out_examples, training_examples
from megatron_ads.downstream.logs import Impression, Item
from megatron_ads.downstream.simulated_logs import read_logs
from megatron_ads.errors import DataError
from megatron_ads.tasks.user_history import EventKind
from tests.downstream.logs import TABLES, settings, write_tables

MARCH_1 = 1740787200.0
DAY = 86400.0


def test_tables_become_logs(tmp_path: Path) -> None:
    logs = read_logs(write_tables(tmp_path / "logs"))
    assert logs.items == [Item("Acme Shoes", "running shoes"), Item("Blue Travel", "flights, hotels")]
    assert [event.kind for event in logs.events["u1"]] == [
        EventKind.onsite_search,
        EventKind.onsite_search,
        EventKind.matched_conversion,
    ]
    assert (logs.about["u1"].age, logs.about["u2"].age) == ("25-34", "")
    assert logs.impressions[1] == Impression("u1", MARCH_1 + 9 * DAY + 36000, 1, "x", clicked=True, converted=True)
    assert logs.end == MARCH_1 + 10 * DAY


def test_examples_end_at_the_anchor_and_know_the_search_shortly_before(tmp_path: Path) -> None:
    logs = read_logs(write_tables(tmp_path / "logs"))
    # The end is March 11: the anchor one day before it lies before u1's search, conversion and click.
    examples = held_out_examples(logs, settings("held_out=0.99", "answer_days=1"))
    (history,) = (each for each in examples.histories if each.user_id == "u1")
    assert [event.text for event in history.events] == ["running shoes"]
    (purchase,) = examples.purchases
    assert (purchase.item, purchase.query) == (1, "flights to rome")
    assert [shown.query for _, shown in examples.impressions] == ["x"]
    late = held_out_examples(logs, settings("held_out=0.99", "answer_days=1", "query_minutes=20"))
    assert [each.query for each in late.purchases] == [""]


def test_too_little_to_learn_from_is_said_with_what_there_is(tmp_path: Path) -> None:
    logs = read_logs(write_tables(tmp_path / "logs"))
    with pytest.raises(DataError, match=r"There are no purchases of items to learn from: 6 histories end at"):
        training_examples(logs, settings("held_out=0.01", "answer_days=1"))


def changed(table: str, row: int, **cells: Any) -> dict[str, list[dict[str, Any]]]:
    tables = {name: [dict(each) for each in rows] for name, rows in TABLES.items()}
    tables[table][row] |= cells
    return tables


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (changed("impressions", 1, item="Nobody"), "impressions.jsonl, row 2: item is 'Nobody', which the table items"),
        (changed("impressions", 0, clicked="maybe"), "impressions.jsonl, row 1: clicked is 'maybe'; it must be true"),
        (changed("impressions", 0, clicked=0.5), "impressions.jsonl, row 1: clicked is 0.5; it must be true"),
        (changed("events", 3, event="bought"), "events.jsonl, row 4: event is 'bought'; known: onsite_search"),
        (changed("events", 2, time="soon"), "events.jsonl, row 3: time is 'soon'"),
        (changed("items", 1, item=""), "items.jsonl, row 2: item is ''"),
        (changed("items", 1, item="ACME  shoes"), "1 rows of items have the name of another"),
        ({**TABLES, "impressions": []}, "impressions.jsonl has no rows"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_table_is_one_line(tables: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_logs(write_tables(tmp_path / "logs", tables))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_tables_and_columns_are_named(tmp_path: Path) -> None:
    folder = write_tables(tmp_path / "logs")
    (folder / "events.jsonl").unlink()
    with pytest.raises(DataError, match=r"logs has no table events: events.parquet, or .jsonl"):
        read_logs(folder)
    (folder / "events.csv").write_text("user,time,kind,text\nu,2025-03-01,click,x\n")
    with pytest.raises(DataError, match=r"events.csv has no column 'event'; it has kind, text, time, user"):
        read_logs(folder)
    with pytest.raises(DataError, match="is not a folder of logs"):
        read_logs(tmp_path / "nowhere")
