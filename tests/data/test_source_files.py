"""One file, or a folder or glob of parts, compressed or not; what is no text of a table is named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ads.data.jsonl import jsonl_rows
from megatron_ads.data.own_tables import table_rows
from megatron_ads.data.source_files import parts_of
from megatron_ads.errors import DataError, MegatronAdsError
from megatron_ads.rows import ChatRow
from tests.data.tables import COLUMNS, PAIR, PAIRS, pairs, write


def told(rows: list[ChatRow]) -> list[tuple[Any, ...]]:
    return [(row.id, row.group, row.label, row.target, row.facts, row.time) for row in rows]


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


def test_folders_of_several_forms_and_paths_of_nothing_are_refused(tmp_path: Path) -> None:
    for form in ("parquet", "csv"):
        write(tmp_path, form, pairs())
    with pytest.raises(DataError, match=r"several forms, \.csv, \.parquet"):
        parts_of(tmp_path)
    for path in (tmp_path / "absent*.csv", tmp_path / "absent"):
        with pytest.raises(DataError, match="is not a file"):
            parts_of(path)
