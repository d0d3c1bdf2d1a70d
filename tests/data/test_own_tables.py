"""A team's own files: the same rows from every format, and a name and a count for every way a row can be broken."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from megatron_ads.config.data import AdsTask, SourceConfig, SourceKind
from megatron_ads.data import table_files
from megatron_ads.data.own_tables import FORMS, table_rows
from megatron_ads.data.sources import describe_source, read_source
from megatron_ads.errors import ConfigError, DataError
from megatron_ads.tasks.registry import TASKS
from tests.data import tables

COLUMNS = {"id": "key", "query": "search term", "title": "ad", "label": "grade"}
GOOD = {"key": "a1", "search term": "running shoes", "ad": "Tempo Runner", "grade": "good", "unused": 1}
FORMATS = ("jsonl", "parquet", "csv", "tsv")
PAIRS = AdsTask.query_ad_relevance


def write(folder: Path, form: str, *records: dict[str, Any]) -> Path:
    """Write records; text given as bytes goes into the file as it is."""
    file = folder / f"rows.{form}"
    names = list(records[0])
    if form == "parquet":
        columns = {name: [record[name] for record in records] for name in names}
        arrays = {
            name: pa.array([v.encode() if isinstance(v, str) else v for v in values], pa.binary()).view(pa.string())
            if any(isinstance(value, str | bytes) for value in values)
            else pa.array(values)
            for name, values in columns.items()
        }
        pq.write_table(pa.table(arrays), file)
        return file
    if form == "jsonl":
        lines = [
            b"{" + b", ".join(json.dumps(name).encode() + b": " + in_json(record[name]) for name in names) + b"}"
            for record in records
        ]
    else:
        mark = "," if form == "csv" else "\t"
        lines = [mark.join(names).encode()]
        lines += [mark.encode().join(in_csv(record[name]) for name in names) for record in records]
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def in_json(value: Any) -> bytes:
    return b'"' + value + b'"' if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()


def in_csv(value: Any) -> bytes:
    return b'"' + (value if isinstance(value, bytes) else str("" if value is None else value).encode()) + b'"'


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    file = write(tmp_path, form, GOOD, GOOD | {"key": "a2", "ad": "Zelt für vier\nPersonen", "grade": "Bad"})
    first, second = table_rows(file, columns=COLUMNS, task=PAIRS)
    assert (first.id, first.group, first.label, first.task) == ("a1", "running shoes", "Good", "query_ad_relevance")
    assert first.target == "<think></think><Label>Good</Label>"
    assert "Ad: Zelt für vier\nPersonen" in second.messages[0].content


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "10 MB cell": ({"ad": "x" * 10_000_000}, "cell_too_long"),
    "latin-1": ({"ad": "für".encode("latin-1")}, "invalid_utf8"),
    "unknown label": ({"grade": "splendid"}, "unknown_label"),
    "empty text": ({"search term": "  "}, "empty_text"),
    "missing text": ({"search term": None}, "empty_text"),
    "repeated id": ({"key": "a1"}, "duplicate_id"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_with_its_number(tmp_path: Path, form: str, name: str) -> None:
    change, reason = BROKEN[name]
    file = write(tmp_path, form, GOOD, GOOD | {"key": "a2"} | change)
    with pytest.raises(DataError, match=rf"rows\.{form}, row 2: {reason}: .*setting rejected") as caught:
        table_rows(file, columns=COLUMNS, task=PAIRS)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("form", FORMATS)
def test_all_broken_rows_are_counted_and_written_aside_and_the_others_used(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    records = [GOOD]
    for number, (change, _) in enumerate(BROKEN.values(), 2):
        records += [GOOD | {"key": f"a{number}"} | change, GOOD | {"key": f"b{number}"}]
    file, aside = write(tmp_path, form, *records), tmp_path / "aside" / "rejected.jsonl"
    rows = table_rows(file, columns=COLUMNS, task=PAIRS, rejected=aside)
    assert [row.id for row in rows] == ["a1", *(f"b{number}" for number in range(2, len(BROKEN) + 2))]
    rejected = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [record["row"] for record in rejected] == [2, 4, 6, 8, 10, 12]
    assert [record["reason"] for record in rejected] == [reason for _, reason in BROKEN.values()]
    assert all(len(record["content"]) < 300 for record in rejected)
    assert "7 rows used" in caplog.text
    assert "2 empty_text, 1 invalid_utf8, 1 unknown_label" in caplog.text


def test_a_file_of_rejected_rows_is_there_even_if_there_is_none(tmp_path: Path) -> None:
    table_rows(write(tmp_path, "csv", GOOD), columns=COLUMNS, task=PAIRS, rejected=tmp_path / "none.jsonl")
    assert (tmp_path / "none.jsonl").read_text() == ""


def test_rows_of_a_csv_file_with_too_few_or_many_cells_have_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("q,t,l\na,b\none,two,Good\nx,y,z,w\nthree,four,Bad\nlast,\n")
    columns = {"query": "q", "title": "t", "label": "l"}
    rows = table_rows(file, columns=columns, task=PAIRS, rejected=tmp_path / "r.jsonl")
    assert [row.id for row in rows] == ["rows.csv-2", "rows.csv-4"]
    rejected = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(record["row"], record["reason"]) for record in rejected] == [
        (1, "unreadable_row"), (3, "unreadable_row"), (5, "unreadable_row"),
    ]  # fmt: skip
    assert rejected[1]["message"] == "4 cells; the head has 3."


@pytest.mark.parametrize(
    ("line", "reason"), [(b'{"key": ', "unreadable_row"), (b"[1]", "unreadable_row"), (b'"\xff"', "invalid_utf8")]
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(DataError, match=rf"row 3: {reason}"):
        table_rows(file, columns=COLUMNS, task=PAIRS)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD | {"ad": "\ud800"}))
    with pytest.raises(DataError, match="row 1: invalid_utf8: ad holds half a surrogate pair"):
        table_rows(file, columns=COLUMNS, task=PAIRS)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grade": True}, "wrong_type"),
        ({"ad": ["a"]}, "wrong_type"),
        ({"why": "</think>"}, "unusable_text"),
        ({"place": "Good"}, "unusable_text"),
        ({"place": "Good", "made": "7"}, "unknown_label"),
    ],
)
def test_cells_that_do_not_suit_the_task_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = write(tmp_path, "jsonl", GOOD | {"why": "Fits.", "place": None, "made": None} | change)
    columns = COLUMNS | {"reasoning": "why", "location": "place", "quality": "made"}
    with pytest.raises(DataError, match=f"row 1: {reason}"):
        table_rows(file, columns=columns, task=PAIRS)


def test_prompts_and_targets_need_no_task(tmp_path: Path) -> None:
    record = {"q": "2 + 2?", "a": "4", "w": 0.5, "who": "u1"}
    file = write(tmp_path, "jsonl", record)
    (row,) = table_rows(file, columns={"prompt": "q", "target": "a", "weight": "w", "group": "who"})
    assert (row.id, row.task, row.weight, row.group, row.label) == ("rows.jsonl-1", "chat", 0.5, "u1", None)
    assert (row.messages[0].content, row.target) == ("2 + 2?", "4")
    for weight in ("many", -1, "nan", "inf", "1e39", "1e-46", "1" + 400 * "0"):
        with pytest.raises(DataError, match="row 1: wrong_type: weight is"):
            table_rows(
                write(tmp_path, "jsonl", record | {"w": weight}), columns={"prompt": "q", "target": "a", "weight": "w"}
            )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"query": "q", "title": "t"}, "does not say which column holds label"),
        ({"query": "q", "title": "t", "labels": "l"}, r"the field 'labels'; known: .* Did you mean label\?"),
    ],
)
def test_a_mapping_that_does_not_fit_the_task_is_refused(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        table_rows(write(tmp_path, "csv", GOOD), columns=columns, task=PAIRS)


def test_every_task_can_be_read_from_a_table() -> None:
    assert set(FORMS) == {None, *AdsTask}


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv"])
def test_a_missing_column_is_named(tmp_path: Path, form: str) -> None:
    with pytest.raises(DataError, match="stars"):
        table_rows(write(tmp_path, form, GOOD), columns=COLUMNS | {"label": "stars"}, task=PAIRS)


def test_files_that_cannot_be_read_at_all_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("absent.csv", None, "is not a file"),
        ("rows.xlsx", b"x", "ends in '.xlsx'; known: .jsonl, .parquet, .csv, .tsv"),
        ("rows.parquet", b"not parquet", "is no Parquet file"),
        ("empty.csv", b"", "cannot be read as CSV"),
        ("empty.jsonl", b"", "has no rows"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            table_rows(tmp_path / name, columns=COLUMNS, task=PAIRS)


def test_a_huge_row_cannot_be_used_and_is_named_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_ROW_BYTES", 5000)
    file = write(tmp_path, "jsonl", GOOD, GOOD | {"ad": "x" * 6000})
    with pytest.raises(DataError, match="row 2: cell_too_long: longer than 5,000 bytes"):
        table_rows(file, columns=COLUMNS, task=PAIRS)


def test_limit_reads_no_further(tmp_path: Path) -> None:
    file = write(tmp_path, "csv", GOOD, GOOD | {"key": "a2"}, GOOD | {"grade": "?"})
    assert len(table_rows(file, columns=COLUMNS, task=PAIRS, limit=2)) == 2


def test_a_recipe_names_the_file_the_columns_and_the_rejected_rows(tmp_path: Path) -> None:
    file = write(tmp_path, "parquet", GOOD, GOOD | {"key": "a2", "grade": "?"})
    source = SourceConfig(
        kind=SourceKind.table, path=str(file), task=PAIRS, columns=COLUMNS, rejected=str(tmp_path / "r.jsonl")
    )
    (row,) = read_source(source, seed=0)
    assert row.id == "a1"
    assert describe_source(source) == f"own rows, query_ad_relevance ({file})"


def test_dictionary_columns_and_numbers_of_parquet_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    queries = pa.array(["tent", "tent"]).dictionary_encode()
    pq.write_table(pa.table({"q": queries, "t": ["a", "b"], "l": ["Good", "Bad"], "n": [7, 8]}), file)
    rows = table_rows(file, columns={"query": "q", "title": "t", "label": "l", "id": "n"}, task=PAIRS)
    assert [row.id for row in rows] == ["7", "8"]
    pa_csv.write_csv(pq.read_table(file), tmp_path / "rows.csv")
    again = table_rows(tmp_path / "rows.csv", columns={"query": "q", "title": "t", "label": "l", "id": "n"}, task=PAIRS)
    assert [row.id for row in again] == ["7", "8"]


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
    file = tables.write(tmp_path, form.split()[-1], pa.table(typed))
    source = SourceConfig(kind=SourceKind.table, path=str(file), task=task, columns=columns)
    source.check("data.sources[0]")
    (row,) = read_source(source, seed=0)
    assert shown in row.messages[0].content
    assert row.time == datetime(2025, 3, 1, tzinfo=UTC).timestamp()
    answer = TASKS[row.task].parse(row.target)
    assert getattr(answer, "reasoning", None) == "Because.", answer


def test_queries_need_as_many_reasons(tmp_path: Path) -> None:
    file = tables.write(tmp_path, "csv", pa.table({"k": ["tent"], "q": ["a; b"], "r": ["why"]}))
    with pytest.raises(DataError, match="there are 2 queries, but 1 reasons"):
        table_rows(file, columns={"keyword": "k", "queries": "q", "reasons": "r"}, task=AdsTask.query_generation)


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize("task", [AdsTask.ad_user_relevance, AdsTask.user_profile, AdsTask.next_advertiser_ranking])
def test_histories_come_from_a_log_and_end_at_each_rows_time(tmp_path: Path, task: AdsTask, form: str) -> None:
    kinds, shops = ["find", "buy", "find", "impression"], [None, "Acme", None, None]
    events = tables.log([20250101, 20250110, 20250120, 20250101], kinds, ["tent", None, "sofa", "x"], shops)
    record = {name: EXAMPLES[task][0][name] for name in EXAMPLES[task][0].keys() - HISTORY.keys()} | {"user": 5}
    texts = pa.list_(pa.string())
    times = [datetime(2025, 1, 5), datetime(2025, 1, 10), datetime(2025, 1, 11)]
    typed = {name: pa.array([cell] * 3, texts if isinstance(cell, list) else None) for name, cell in record.items()}
    file = tables.write(tmp_path, "parquet", pa.table(typed | {"when": times}))
    settings: dict[str, Any] = {"kind": SourceKind.table, "path": str(file), "task": task}
    source = SourceConfig(
        **settings,
        columns={name: name for name in record} | {"time": "when"},
        events=str(tables.write(tmp_path, form, events, name="log")),
        event_columns=tables.EVENTS,
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
