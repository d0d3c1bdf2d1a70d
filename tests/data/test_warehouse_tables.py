"""What warehouses write is read: every ordinary type in every format, files in parts, and values of a team's own."""

import bz2
import gzip
import json
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import AdsTask, HistoryConfig, SourceConfig, SourceKind
from megatron_ads.data.bad_rows import BadRowError
from megatron_ads.data.event_tables import event_rows, read_anchors
from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.own_tables import table_rows
from megatron_ads.data.source_files import parts_of
from megatron_ads.data.sources import read_source
from megatron_ads.data.table_fields import time_of
from megatron_ads.data.user_features import view_chooser
from megatron_ads.errors import ConfigError, DataError, MegatronAdsError
from megatron_ads.rows import ChatRow
from megatron_ads.tasks.registry import TASKS

PAIR = {"query": "q", "title": "t", "label": "l"}
COLUMNS = {"id": "i", **PAIR}
PAIRS = AdsTask.query_ad_relevance
NUMBERS = {"label": {3: "Good", 2: "Good", 1: "fair", "0": "Bad", "E": "Good"}}
TRUTH = {"label": {True: "Good", False: "Bad"}}
FORMATS = ("jsonl", "parquet", "csv", "csv.gz", "JSONL.bz2", "CSV", "tsv", "ndjson", "pq")


def plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | list) else str(value)


def write(folder: Path, form: str, table: pa.Table, name: str = "rows") -> Path:
    """Write a table as another program would, without this project's code."""
    folder.mkdir(parents=True, exist_ok=True)
    file, kind = folder / f"{name}.{form}", form.lower().split(".")[0]
    if kind in ("parquet", "pq"):
        pq.write_table(table, file)
        return file
    if kind in ("csv", "tsv"):
        sink = pa.BufferOutputStream()
        table = pa.table(
            {
                column: table[column].cast(pa.string()) if pa.types.is_decimal(table[column].type) else table[column]
                for column in table.column_names
            }
        )
        pa_csv.write_csv(table, sink, pa_csv.WriteOptions(delimiter="," if kind == "csv" else "\t"))
        content = sink.getvalue().to_pybytes()
    else:
        table = pa.table({
            name: column.cast(pa.string()) if column.type == pa.timestamp("ns") else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        })  # fmt: skip
        rows = [{key: plain(cell) for key, cell in row.items()} for row in table.to_pylist()]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = (
        gzip.compress(content) if form.endswith(".gz") else bz2.compress(content) if form.endswith(".bz2") else content
    )
    file.write_bytes(packed)
    return file


def log(times: Any, kinds: list[str], texts: list[str | None], shops: list[str | None]) -> pa.Table:
    return pa.table({"u": [5] * len(kinds), "t": times, "e": kinds, "x": texts, "a": pa.array(shops, pa.string())})


def pairs(**columns: Any) -> pa.Table:
    rows = {"i": ["a", "b"], "q": ["tent", "sofa"], "t": ["Big Tent", "Sofa"], "l": ["Good", "Bad"]}
    return pa.table({**rows, **columns})


def told(rows: list[ChatRow]) -> list[tuple[Any, ...]]:
    return [(row.id, row.group, row.label, row.target, row.facts, row.time) for row in rows]


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


UUIDS = [uuid.UUID(int=1), uuid.UUID(int=2)]
PARQUET_TYPES: dict[str, tuple[pa.Array, list[str]]] = {
    "categories": (pa.array(["tent", "sofa"]).dictionary_encode(), ["tent", "sofa"]),
    "large text": (pa.array(["tent", "sofa"], pa.large_string()), ["tent", "sofa"]),
    "views of text": (pa.array(["tent", "sofa"], pa.string_view()), ["tent", "sofa"]),
    "bytes": (pa.array([b"tent", b"sofa"], pa.binary()), ["tent", "sofa"]),
    "broken categories": (pa.array([b"tent", b"\xff"]).view(pa.string()).dictionary_encode(), ["tent"]),
    "decimals of BigQuery": (pa.array([Decimal("12"), Decimal("3.5")], pa.decimal128(38, 9)), ["12", "3.5"]),
    "UUIDs": (
        pa.ExtensionArray.from_storage(pa.uuid(), pa.array([each.bytes for each in UUIDS], pa.binary(16))),
        list(map(str, UUIDS)),
    ),
}


@pytest.mark.parametrize("name", PARQUET_TYPES)
def test_types_that_parquet_alone_has_are_text(tmp_path: Path, name: str) -> None:
    column, wanted = PARQUET_TYPES[name]
    file = write(tmp_path, "parquet", pairs(q=column))
    rows = table_rows(file, columns=COLUMNS, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert [row.group for row in rows] == wanted


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_nan_is_missing_and_never_a_word(tmp_path: Path, form: str) -> None:
    table = pairs(d=[float("nan"), 2.5], l=["Good", "Good"])
    first, second = table_rows(write(tmp_path, form, table), columns=COLUMNS | {"description": "d"}, task=PAIRS)
    assert "nan" not in first.messages[0].content
    assert "Text: 2.5" in second.messages[0].content
    for column, value in (("q", float("nan")), ("q", float("inf")), ("l", float("nan"))):
        broken = write(tmp_path, form, pairs(**{column: [value, value]}))
        with pytest.raises(DataError, match=r"row 1: (empty_text: \w+ is None|wrong_type: query is inf)"):
            table_rows(broken, columns=COLUMNS, task=PAIRS)


def test_nan_in_a_chat_row_is_null(tmp_path: Path) -> None:
    row = {"label": float("nan"), "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert jsonl_rows(tmp_path / "rows.jsonl")[0].label is None


SEARCH, SALE = datetime(2025, 2, 27, tzinfo=UTC), datetime(2025, 3, 4, 1, 2, 3, 456789, tzinfo=UTC)
MOMENTS = [SEARCH, SALE]
VIEW_OF = view_chooser(HistoryConfig())
EVENTS = {"user": "u", "time": "t", "event": "e", "text": "x", "advertiser": "a"}


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


def test_events_of_ones_own_are_mapped_or_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    shops = [None, None, "Acme"]
    table = log([20250227, 20250301, 20250304], ["find", "impression", "BUY"], ["tent", "", None], shops)
    values = {"event": {"Find": "onsite_search", "buy": "matched_conversion", "impression": None}}
    source = SourceConfig(kind=SourceKind.table, task=AdsTask.next_advertiser, path=str(write(tmp_path, "csv", table)),
                          columns=EVENTS, values=values, anchor="2025-03-01")  # fmt: skip
    (row,) = read_source(source, seed=0)
    assert (row.label, "Searched here: tent" in row.messages[0].content) == ("Acme", True)
    assert "1 rows left out" in caplog.text


def test_several_anchors_give_a_user_several_rows(tmp_path: Path) -> None:
    days = [20250101, 20250110, 20250120, 20250214]
    file = write(tmp_path, "csv", log(days, ["click", *["matched_conversion"] * 3], ["x"] * 4, [None, "A", "B", "C"]))
    source: dict[str, Any] = {
        "kind": SourceKind.table, "task": AdsTask.next_advertiser, "path": str(file), "columns": EVENTS,
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


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet", "jsonl", "tsv", "CSV"])
def test_a_folder_or_glob_of_parts_is_read_in_order(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "log"
    for number, query in ((1, "b"), (0, "a")):
        table = pairs(q=[query, query + query], i=[f"{query}1", f"{query}2"])
        write(folder / f"day={number}", form, table, name=f"part-{number}")
    (folder / "_SUCCESS").touch()
    (folder / ".hidden.csv").write_text("x")
    (folder / "day=0" / "empty.csv").touch()
    columns = {**PAIR, "description": "day"}
    rows = table_rows(folder, columns=columns, task=PAIRS)
    assert [row.group for row in rows] == ["a", "aa", "b", "bb"]
    assert [row.id for row in rows] == [f"day={n}/part-{n}.{form}-{i}" for n in (0, 1) for i in (1, 2)]
    assert [row.messages[0].content[-7:] for row in rows] == ["Text: 0", "Text: 0", "Text: 1", "Text: 1"]
    assert told(table_rows(folder / "day=*", columns=columns, task=PAIRS)) == told(rows)
    assert told(table_rows(folder / "**" / f"*.{form}", columns=columns, task=PAIRS)) == told(rows)
    bad = write(folder / "day=2", form, pairs(l=["Good", "?"]), name="part-2")
    with pytest.raises(DataError, match=f"{bad.name}, row 2: unknown_label"):
        table_rows(folder, columns=columns, task=PAIRS)
    table_rows(folder, columns=columns, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text())["file"] == f"day=2/part-2.{form}"


def test_ids_repeat_over_parts_by_name(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path, "csv", pairs(), name=name)
    with pytest.raises(DataError, match=r"b\.csv, row 1: duplicate_id: id 'a' was row 1's in a\.csv"):
        table_rows(tmp_path, columns=COLUMNS, task=PAIRS)


def test_chat_rows_are_read_from_parts(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}).encode()
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line + b"\n" + line))
    (tmp_path / "notes.csv").write_text("not rows")
    wanted = ["a.jsonl.gz-1", "a.jsonl.gz-2", "b.jsonl-1"]
    assert [row.id for row in jsonl_rows(tmp_path)] == wanted
    assert [row.id for row in jsonl_rows(tmp_path / "*.jsonl*")] == wanted
    assert [row.id for row in jsonl_rows(tmp_path / "b.jsonl")] == ["b.jsonl-1"]


BOM16 = "q,t,l\ntent,Tent,Good\n"
FILES: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.csv", BOM16.encode("utf-16"), "^[^ ]*a.csv is UTF-16 text, not UTF-8"),
    "UTF-16 without a mark": ("a.csv", BOM16.encode("utf-16-le"), "a.csv is UTF-16 text or no text"),
    "UTF-16 in JSON": ("a.jsonl", '{"q": 1}'.encode("utf-16-be"), "a.jsonl is UTF-16 text"),
    "Parquet": ("a.csv", b"PAR1xxxx", "a.csv is a Parquet file"),
    "Excel": ("a.csv", b"PK\x03\x04xxxx", "a.csv is a ZIP archive or an Excel workbook"),
    "half a gzip file": ("a.csv.gz", gzip.compress(BOM16.encode() * 999)[:40], r"a\.csv\.gz cannot be"),
    "half a gzip file of JSON": ("a.jsonl.gz", gzip.compress(b"{}\n" * 9999)[:40], r"a\.jsonl\.gz cannot be|row 1"),
    "the head alone": ("a.csv", b"", "a.csv cannot be read as CSV"),
    "other columns": ("a.csv", b"x,y,z\n1,2,3\n", "a.csv has no column 'q'; it has x, y, z"),
    "a column misspelt": ("a.csv", b"query,Q,t,l\n1,2,3,4\n", "no column 'q'; it has Q, l, query, t"),
    "other columns, semicolons": ("a.csv", b"x;y\n1;2\n", "a.csv has no column 'q'; it has x, y"),
    "a column twice": ("a.csv", b"q,t,l,q\n1,2,Good,4\n", "a.csv has the column 'q' 2 times"),
    "no suffix of a table": ("a.xls", b"x", "ends in '.xls'; known: .jsonl, .parquet, .csv"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str) -> None:
    file, content, message = FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(MegatronAdsError, match=message) as caught:
        table_rows(tmp_path / file, columns=PAIR, task=PAIRS)
    assert "\n" not in str(caught.value)


GOOD_FILES: dict[str, tuple[str, bytes]] = {
    "semicolons": ("a.csv", b"q;t;l\ntent;Big, red;Good\n"),
    "semicolons as Excel says": ("a.csv", b"sep=;\nq;t;l\ntent;Big, red;Good\n"),
    "tabs in .csv": ("a.csv", b"q\tt\tl\ntent\tBig, red\tGood\n"),
    "byte order mark": ("a.csv", b'\xef\xbb\xbfq,t,l\ntent,"Big, red",Good\n'),
    "gzip without its suffix": ("a.csv", gzip.compress(b'q,t,l\ntent,"Big, red",Good\n')),
    "empty lines first": ("a.csv", b'\n\nq,t,l\ntent,"Big, red",Good\n'),
    "a quoted head": ("a.csv", b'"q","t","two\nlines","l"\ntent,"Big, red",x,Good\n'),
    "another column twice": ("a.csv", b'q,t,l,x,x\ntent,"Big, red",Good,1,2\n'),
    "CR LF": ("a.csv", b'q,t,l\r\ntent,"Big, red",Good\r\n'),
    "JSON with a mark": ("a.jsonl", b'\xef\xbb\xbf{"q": "tent", "t": "Big, red", "l": "Good"}\n'),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_common_habits_of_writing_tables_are_read(tmp_path: Path, name: str) -> None:
    file, content = GOOD_FILES[name]
    (tmp_path / file).write_bytes(content)
    (row,) = table_rows(tmp_path / file, columns=PAIR, task=PAIRS)
    assert (row.id, row.group, row.label, row.facts["ad"]["title"]) == (f"{file}-1", "tent", "Good", "Big, red")  # type: ignore[call-overload, index]


def test_rows_have_their_numbers_below_a_mark_of_excel(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sep=;\nq;t;l\ntent;x;Good\ntent;Good\n")
    with pytest.raises(DataError, match="row 2: unreadable_row: 2 cells; the head has 3"):
        table_rows(tmp_path / "a.csv", columns=PAIR, task=PAIRS)


def test_a_row_that_is_broken_in_two_ways_spoils_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_bytes("größe,t,l\nzelt,für,Good\n\xff\n".encode("latin-1").replace(b"\xfc", "ü".encode())
                                     .replace("größe".encode("latin-1"), "größe".encode()))  # fmt: skip
    columns = {"query": "größe", "title": "t", "label": "l"}
    (row,) = table_rows(tmp_path / "a.csv", columns=columns, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert "Ad: für" in row.messages[0].content
    assert json.loads((tmp_path / "r.jsonl").read_text())["message"] == "1 cells; the head has 3."
    assert "Exception ignored" not in capfd.readouterr().err


def test_parquet_with_a_column_twice_and_folders_of_several_forms_are_refused(tmp_path: Path) -> None:
    column = pa.array(["x"])
    pq.write_table(pa.Table.from_arrays([column] * 4, names=["q", "t", "l", "q"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has the column 'q' 2 times"):
        table_rows(tmp_path / "a.parquet", columns=PAIR, task=PAIRS)
    write(tmp_path, "csv", pairs())
    with pytest.raises(DataError, match=r"several forms, \.csv, \.parquet"):
        parts_of(tmp_path)
    for path in (tmp_path / "absent*.csv", tmp_path / "absent"):
        with pytest.raises(DataError, match="is not a file"):
            parts_of(path)


def test_a_cell_of_many_lines_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ["", *["sofa,Sofa,Good"] * 21, ""]
    lines[0] = 'tent,"24 inch screen,Good'
    (tmp_path / "a.csv").write_text("q,t,l\n" + "\n".join([*lines[:-1], 'lamp,12",Bad']) + "\n")
    table_rows(tmp_path / "a.csv", columns=PAIR, task=PAIRS)
    assert "row 1: t has 23 lines. Is a quote sign not closed" in caplog.text


HISTORY = {"onsite_search": ["tent", "lamp; green"], "past_advertisers": ["Acme"], "age": "25-34"}
EXAMPLES: dict[AdsTask, tuple[dict[str, Any], str]] = {
    AdsTask.query_ad_relevance: ({"query": "tent", "title": "T", "label": "good"}, "Query: tent\nAd: T"),
    AdsTask.query_ad_three_labels: (
        {"query": "tent", "title": "T", "label": "Good", "location": "bad", "quality": "Good"}, "Ad: T"),
    AdsTask.ad_user_relevance: (
        {"user": 7, "title": "T", "score": 3.0, **HISTORY}, "Searched here: tent; lamp; green\nAd: T"),
    AdsTask.query_generation: (
        {"keyword": "tent", "queries": ["tent 2 people", "green tent"], "reasons": ["a", "b"]}, "Queries: 2"),
    AdsTask.next_advertiser: ({"user": 7, "advertiser": "Bolt", **HISTORY}, "Bought from: Acme"),
    AdsTask.next_advertiser_ranking: (
        {"user": 7, "advertiser": "Bolt", "advertisers": ["Bolt", "Acme"], "interests": ["tents"], **HISTORY},
        "Bought from: Acme"),
    AdsTask.user_profile: (
        {"user": 7, "summary": "Camps.", "interests": ["tents", "lamps"], "avoid": [], **HISTORY}, "Profile: 25-34"),
    AdsTask.model_comparison: (
        {"request": "r", "current": "c", "new": "n", "risk": "none", "verdict": "better", "strengths": ["s"]},
        "Request: r"),
    AdsTask.ad_rewriting: (
        {"title": "T", "new_title": "N", "new_text": "x", "rationale": "why", "new_keywords": ["k", "l"]}, "Ad: T"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet", "JSON in csv", "Python in csv"])
@pytest.mark.parametrize("task", list(AdsTask))
def test_every_task_has_rows_from_a_table_that_its_parser_reads(tmp_path: Path, task: AdsTask, form: str) -> None:
    record, shown = EXAMPLES[task]
    record = {**record, "reasoning": "Because.", "when": "2025-03-01"}
    columns = {name: name for name in record if name != "when"} | {"time": "when"}
    if form.endswith("csv"):
        as_text = json.dumps if form.startswith("JSON") else str
        record = {name: as_text(value) if isinstance(value, list) else value for name, value in record.items()}
    texts = pa.list_(pa.string())
    typed = {name: pa.array([cell], texts if isinstance(cell, list) else None) for name, cell in record.items()}
    file = write(tmp_path, form.split()[-1], pa.table(typed))
    source = SourceConfig(kind=SourceKind.table, path=str(file), task=task, columns=columns)
    source.check("data.sources[0]")
    (row,) = read_source(source, seed=0)
    assert shown in row.messages[0].content
    assert row.time == datetime(2025, 3, 1, tzinfo=UTC).timestamp()
    answer = TASKS[row.task].parse(row.target)
    assert getattr(answer, "reasoning", None) == "Because.", answer


def test_queries_need_as_many_reasons(tmp_path: Path) -> None:
    file = write(tmp_path, "csv", pa.table({"k": ["tent"], "q": ["a; b"], "r": ["why"]}))
    with pytest.raises(DataError, match="there are 2 queries, but 1 reasons"):
        table_rows(file, columns={"keyword": "k", "queries": "q", "reasons": "r"}, task=AdsTask.query_generation)


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("task", [AdsTask.ad_user_relevance, AdsTask.user_profile, AdsTask.next_advertiser_ranking])
def test_histories_come_from_a_log_and_end_at_each_rows_time(tmp_path: Path, task: AdsTask, form: str) -> None:
    kinds, shops = ["find", "buy", "find", "impression"], [None, "Acme", None, None]
    events = log([20250101, 20250110, 20250120, 20250101], kinds, ["tent", None, "sofa", "x"], shops)
    record = {name: EXAMPLES[task][0][name] for name in EXAMPLES[task][0].keys() - HISTORY.keys()} | {"user": 5}
    texts = pa.list_(pa.string())
    times = [datetime(2025, 1, 5), datetime(2025, 1, 10), datetime(2025, 1, 11)]
    typed = {name: pa.array([cell] * 3, texts if isinstance(cell, list) else None) for name, cell in record.items()}
    file = write(tmp_path, "parquet", pa.table(typed | {"when": times}))
    settings: dict[str, Any] = {"kind": SourceKind.table, "path": str(file), "task": task}
    source = SourceConfig(
        **settings,
        columns={name: name for name in record} | {"time": "when"},
        events=str(write(tmp_path, form, events, name="log")),
        event_columns=EVENTS,
        values={"event": {"find": "onsite_search", "buy": "matched_conversion", "impression": None}},
    )
    source.check("data.sources[0]")
    shown = [row.messages[0].content for row in read_source(source, seed=0)]
    assert [("tent" in text, "Acme (Acme)" in text, "sofa" in text) for text in shown] == [
        (True, False, False),
        (True, False, False),
        (True, True, False),
    ]
    source.columns.pop("time")
    with pytest.raises(ConfigError, match=r"columns must say which column holds time"):
        source.check("data.sources[0]")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("task: query_ad_relevance, events: e.csv, event_columns: {user: u}", "events has no effect"),
        ("task: user_profile, event_columns: {user: u}", "event_columns"),
        ("task: next_advertiser, anchor: 2025-03-01, events: e.csv", "events has no effect"),
    ],
)
def test_a_log_that_nothing_reads_is_refused(settings: str, message: str) -> None:
    from megatron_ads.config.recipes import load_recipe

    source = f"{{kind: table, path: a.csv, columns: {{time: t}}, {settings}}}"
    with pytest.raises(ConfigError, match=message):
        load_recipe("sft/quickstart", ["model.load=x", f"data.sources=[{source}]"]).data.check()
