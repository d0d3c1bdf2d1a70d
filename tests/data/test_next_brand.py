"""Purchases become rows that know only earlier days; the real file is used where it is."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.config.data import AdsTask, DataConfig, HistoryConfig, SourceConfig, SourceKind, SplitBy
from megatron_ads.data.corpus import read_corpus
from megatron_ads.data.next_brand import DEFAULT_VIEW, FILE, next_brand_rows, read_items
from megatron_ads.data.public_data import DATA_ROOT
from megatron_ads.data.user_features import view_chooser
from megatron_ads.errors import DataError
from megatron_ads.rows import Fact

ITEMS: list[dict[str, Any]] = [
    {"item_id": number, "title": f"Thing {number}", "brand": brand, "sid": ["<a_1>", f"<b_{number}>"]}
    for number, brand in enumerate(("Acme", "Bolt", "", "Core"))
]  # fmt: skip


def write(folder: Path, *users: dict[str, Any], items: list[dict[str, Any]] = ITEMS) -> Path:
    for name, records in (("items.jsonl", items), ("users.jsonl", users)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder / "users.jsonl"


def user(name: str, *purchases: tuple[int, int]) -> dict[str, Any]:
    """Return a record of (day, item) pairs."""
    return {"user_id": name, "events": [{"t": day * 86_400, "item_id": item} for day, item in purchases]}


def test_each_later_day_is_a_target_and_shows_earlier_days_only(tmp_path: Path) -> None:
    file = write(tmp_path, user("u", (1, 0), (3, 1), (3, 3), (7, 0)))
    first, second = next_brand_rows(file, AdsTask.next_advertiser)
    assert (first.label, first.group, first.time) == ("Bolt", "u", 3 * 86_400)
    assert first.messages[0].content.splitlines()[1:] == [
        "Bought from: Acme",
        "Bought elsewhere: Thing 0 (Acme)",
        "Top brands: Acme",
    ]
    assert second.label == "Acme"
    assert "Bought from: Bolt; Core; Acme" in second.messages[0].content


def test_a_purchase_without_brand_is_history_but_no_target(tmp_path: Path) -> None:
    file = write(tmp_path, user("u", (1, 0), (2, 2), (3, 1)))
    (row,) = next_brand_rows(file, AdsTask.next_advertiser)
    assert row.label == "Bolt"
    assert "Bought elsewhere: Thing 2; Thing 0 (Acme)" in row.messages[0].content


def test_semantic_ids_are_shown_where_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, user("u", (1, 0), (2, 1)))
    view_of = view_chooser(HistoryConfig(without=[]), DEFAULT_VIEW)
    (row,) = next_brand_rows(file, AdsTask.next_advertiser, view_of=view_of)
    assert "Recent items: <a_1><b_0>" in row.messages[0].content
    assert read_items(file.with_name("items.jsonl"))[3].semantic_id == "<a_1><b_3>"


def test_a_split_by_time_trains_on_nothing_from_after_what_it_holds_out(tmp_path: Path) -> None:
    write(tmp_path, *(user(f"u{number}", (1, 0), (number + 2, 1), (number + 9, 3)) for number in range(6)))
    source = SourceConfig(kind=SourceKind.next_brand, path=str(tmp_path))
    corpus = read_corpus(DataConfig(sources=[source], validation_rows=4, split_by=SplitBy.time))
    trained = [row.time for row in corpus.training[0]]
    held_out = [row.time for row in corpus.validation]
    assert len(trained) == 8
    assert len(held_out) == 4
    assert max(trained) < min(held_out)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"user_id": 3, "events": []}, "row 2: user_id or events is missing"),
        ({"user_id": "a", "events": [{"t": 1, "item_id": 77}]}, "row 2: an event is .*77"),
        ({"user_id": "a", "events": [{"t": "1", "item_id": 1}]}, "row 2: an event is"),
    ],
)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        next_brand_rows(write(tmp_path, user("u", (1, 0), (2, 1)), record), AdsTask.next_advertiser)


def test_broken_items_and_missing_targets_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items.jsonl, row 1: item_id, title or sid"):
        next_brand_rows(write(tmp_path, items=[{"item_id": 0}]), AdsTask.next_advertiser)
    with pytest.raises(DataError, match="no user with purchases on two days"):
        next_brand_rows(write(tmp_path, user("u", (1, 0))), AdsTask.next_advertiser)


REAL = Path(os.environ.get(DATA_ROOT, "")) / FILE


@pytest.mark.skipif(
    not (os.environ.get(DATA_ROOT) and REAL.exists()), reason=f"{DATA_ROOT} names no folder with {FILE}"
)
@pytest.mark.parametrize("task", [AdsTask.next_advertiser, AdsTask.user_profile])
def test_the_real_purchases_are_read_without_a_faulty_row(task: AdsTask) -> None:
    source = SourceConfig(kind=SourceKind.next_brand, task=task)
    corpus = read_corpus(DataConfig(sources=[source], validation_rows=1000, split_by=SplitBy.time))
    assert corpus.faulty == []
    assert len(corpus.validation) == 1000
    assert len(corpus.training[0]) > 4000
    assert max(row.time for row in corpus.training[0]) < min(row.time for row in corpus.validation)
    rows = [*corpus.training[0], *corpus.validation]
    assert len({row.id for row in rows}) == len(rows)


def test_ids_of_a_table_are_shown_in_place_of_the_files_own_and_tell_the_next_item(tmp_path: Path) -> None:
    file = write(tmp_path, user("u", (1, 0), (2, 3), (3, 1)))
    table = {"0": "<sid_0_1>", "1": "<sid_0_2>"}  # of item 3 nothing is known
    plain, rows = (
        next_brand_rows(file, AdsTask.next_advertiser, view_of=lambda _, view=view: view)
        for view in (DEFAULT_VIEW, replace(DEFAULT_VIEW, without=frozenset(), semantic_ids=table))
    )
    for before, after in zip(plain, rows, strict=True):
        assert after.messages[0].content == f"{before.messages[0].content}\nRecent items: <sid_0_1>"
    assert [row.facts.get(Fact.next_item) for row in rows] == ["3", "1"]
    assert [row.facts.get(Fact.next_semantic_id) for row in rows] == [None, "<sid_0_2>"]
