"""A log of events becomes next-advertiser rows: the anchor divides history from answer, bad lines are named."""

import json
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import AdsTask, HistoryConfig, SourceConfig, SourceKind
from megatron_ads.data.event_tables import ANSWER_DAYS, event_rows, read_anchors
from megatron_ads.data.simulator.simulated_rows import DEFAULT_VIEW, next_advertiser_examples, users_at_anchor
from megatron_ads.data.simulator.world import draw_world
from megatron_ads.data.sources import read_source
from megatron_ads.data.user_features import SECONDS_PER_DAY, view_chooser
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.rows import ChatRow
from tests.data import tables

COLUMNS = {"user": "uid", "time": "ts", "event": "what", "text": "words", "advertiser": "shop", "age": "age"}
(ANCHOR,) = read_anchors(["2025-03-01"])
VIEW_OF = view_chooser(HistoryConfig())
SEARCH = {"uid": "u1", "ts": "2025-02-27", "what": "onsite_search", "words": "tent", "shop": None, "age": "25-34"}
SALE = SEARCH | {"ts": "2025-03-04", "what": "matched_conversion", "words": None, "shop": "Acme"}


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    file = folder / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def read(file: Path, **options: Any) -> list[ChatRow]:
    return event_rows(file, **({"columns": COLUMNS, "anchors": [ANCHOR], "view_of": VIEW_OF} | options))


def test_the_anchor_divides_history_from_answer(tmp_path: Path) -> None:
    earlier, later = SALE | {"ts": "2025-02-20", "shop": "Bolt"}, SALE | {"ts": "2025-03-09", "shop": "Core"}
    (row,) = read(write(tmp_path, later, SALE, SEARCH, earlier))
    assert (row.id, row.group, row.label) == ("next-u1", "u1", "Acme")
    assert row.time == datetime(2025, 3, 4, tzinfo=UTC).timestamp()
    assert row.messages[0].content.splitlines()[1:] == [
        "Bought from: Bolt",
        "Profile: 25-34",
        "Bought elsewhere: Bolt (Bolt)",
        "Searched here: tent",
    ]


def test_an_event_at_the_anchor_is_answer_and_not_history(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path, SEARCH, SALE | {"ts": "2025-03-01"}))
    assert row.label == "Acme"
    assert "Acme" not in row.messages[0].content


def test_users_that_give_no_row_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    late = SALE | {"uid": "u3", "ts": ANCHOR + ANSWER_DAYS * SECONDS_PER_DAY}
    lines = [SEARCH, SALE, SEARCH | {"uid": "u2"}, SEARCH | {"uid": "u3"}, late, SALE | {"uid": "u4"}]
    assert len(read(write(tmp_path, *lines))) == 1
    assert "2 without a later conversion, 1 without history" in caplog.text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"uid": " "}, "empty_text"),
        ({"what": "purchase"}, "unknown_label: event is 'purchase'; known: onsite_search"),
        ({"ts": "yesterday"}, "wrong_type: time is 'yesterday'"),
        ({"ts": None}, "empty_text"),
        ({"words": ""}, "empty_text"),
        ({"shop": ["a"]}, "wrong_type"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_or_written_aside(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    file = write(tmp_path, SEARCH, SEARCH | change, SALE)
    with pytest.raises(DataError, match=rf"log\.jsonl, row 2: {reason}"):
        read(file)
    assert len(read(file, rejected=tmp_path / "r.jsonl")) == 1
    (rejected,) = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (rejected["row"], rejected["reason"]) == (2, reason.split(":")[0])


@pytest.mark.parametrize("time", ["2025-02-27", "2025-02-27T00:00+00:00", 1740614400, "1740614400.0"])
def test_times_are_read_in_every_common_form(tmp_path: Path, time: Any) -> None:
    log = write(tmp_path, SEARCH | {"ts": time}, SALE)
    old = view_chooser(HistoryConfig(window_days={"onsite_searches": 2}))
    young = view_chooser(HistoryConfig(window_days={"onsite_searches": 1.9}))
    assert "Searched here" in read(log, view_of=old)[0].messages[0].content
    assert "Searched here" not in read(log, view_of=young)[0].messages[0].content


def test_timestamps_of_parquet_are_read(tmp_path: Path) -> None:
    moments = [datetime(2025, 2, 27, tzinfo=UTC), datetime(2025, 3, 4, tzinfo=UTC)]
    table = {name: [SEARCH[name], SALE[name]] for name in SEARCH} | {"ts": pa.array(moments, pa.timestamp("us", "UTC"))}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet") == read(write(tmp_path, SEARCH, SALE))


def test_a_wrong_anchor_or_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="anchor is 'soon'"):
        read_anchors(["soon"])
    with pytest.raises(ConfigError, match="does not say which column holds time, event"):
        read(write(tmp_path, SEARCH), columns={"user": "uid"})
    with pytest.raises(DataError, match="none of the 1 users has events before the anchor 2030"):
        read(write(tmp_path, SEARCH), anchors=read_anchors(["2030-01-01"]))


def test_the_simulators_events_in_a_file_give_the_simulators_rows(tmp_path: Path) -> None:
    world = draw_world(0)
    users = [known for known in islice(users_at_anchor(world), 40) if known.next_advertiser is not None]
    lines: list[dict[str, Any]] = []
    for known in users:
        user = known.history
        who = {"uid": user.user_id, "age": user.demographics.age, "gender": user.demographics.gender}
        who["state"] = user.demographics.state
        for event in user.events:
            told = {"what": event.kind, "words": event.text, "shop": event.advertiser}
            kind = {"category": event.category, "brand": event.brand}
            lines.append(who | told | kind | {"ts": ANCHOR - event.days_ago * SECONDS_PER_DAY})
        assert known.next_advertiser is not None
        sale = {"what": "matched_conversion", "shop": world.advertisers[known.next_advertiser].name}
        lines.append({**who, **sale, "ts": ANCHOR})
    names = {name: name for name in ("category", "brand", "gender", "state")}
    source = SourceConfig(
        kind=SourceKind.table,
        task=AdsTask.next_advertiser,
        path=str(write(tmp_path, *lines)),
        columns=COLUMNS | names,
        anchor="2025-03-01",
        history=HistoryConfig(max_entries=3),
    )
    wanted = [example.row for example in next_advertiser_examples(world, iter(users), lambda _: DEFAULT_VIEW)]

    def told(row: ChatRow) -> tuple[list[str], str, str]:  # the wording of the question depends on the row's id
        return row.messages[0].content.splitlines()[1:], row.target, row.group

    assert len(wanted) > 20
    assert [told(row) for row in read_source(source, seed=0)] == [told(row) for row in wanted]


def test_events_of_ones_own_are_mapped_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shops = [None, None, "Acme"]
    table = tables.log([20250227, 20250301, 20250304], ["find", "impression", "BUY"], ["tent", "", None], shops)
    values = {"event": {"Find": "onsite_search", "buy": "matched_conversion", "impression": None}}
    file = tables.write(tmp_path, "csv", table)
    source = SourceConfig(kind=SourceKind.table, task=AdsTask.next_advertiser, path=str(file),
                          columns=tables.EVENTS, values=values, anchor="2025-03-01")  # fmt: skip
    (row,) = read_source(source, seed=0)
    assert (row.label, "Searched here: tent" in row.messages[0].content) == ("Acme", True)
    assert "1 rows left out" in caplog.text


def test_several_anchors_give_a_user_several_rows(tmp_path: Path) -> None:
    days = [20250101, 20250110, 20250120, 20250214]
    file = tables.write(
        tmp_path, "csv", tables.log(days, ["click", *["matched_conversion"] * 3], ["x"] * 4, [None, "A", "B", "C"])
    )
    source: dict[str, Any] = {
        "kind": SourceKind.table, "task": AdsTask.next_advertiser, "path": str(file), "columns": tables.EVENTS,
    }  # fmt: skip

    def read(**settings: Any) -> list[tuple[str, str | None]]:
        return [(row.id, row.label) for row in read_source(SourceConfig(**source, **settings), seed=0)]

    assert read(anchor="2025-01-05") == [("next-5", "A")]
    listed = read(anchors=["2025-01-05", "2025-01-15"])
    assert listed == [("next-5-2025-01-05", "A"), ("next-5-2025-01-15", "B")]
    assert read(anchors=["2025-01-05", "2025-01-24"], anchor_spacing_days=10) == listed
    assert read(anchors=["2025-01-05", "2025-01-25"], anchor_spacing_days=10) == [*listed, ("next-5-2025-01-25", "C")]
    assert read(anchors=["2025-01-05", "2025-01-25"], anchor_spacing_days=10, answer_days=6) == listed
    with pytest.raises(ConfigError, match="each must be later"):
        read(anchors=["2025-01-15", "2025-01-05"])


SETTINGS = [
    ("task: next_advertiser, anchor: 2025-03-01, anchors: [2025-03-01]", "Remove one"),
    ("task: next_advertiser, anchors: [2025-03-01], anchor_spacing_days: 7", "name two dates"),
    ("task: next_advertiser, anchor: 2025-03-01, answer_days: 0", "answer_days is 0.0; it must be above 0"),
    ("answer_days: 3", "no effect without an anchor"),
    ("anchors: [2025-03-01]", "others have no use for it"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_anchors_that_contradict_one_another_are_refused(settings: str, message: str) -> None:
    from megatron_ads.config.recipes import load_recipe

    source = f"{{kind: table, path: a.csv, columns: {{user: u, event: e}}, {settings}}}"
    with pytest.raises(ConfigError, match=message):
        load_recipe("sft/quickstart", ["model.load=x", f"data.sources=[{source}]"]).data.check()
